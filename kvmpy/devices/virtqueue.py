"""The device's side of a split virtqueue, to read: a driver's rings become checked chains, and used entries go back.

::

    descriptor table (16 bytes each)           available ring            used ring
    0  addr 8 | len 4 | flags 2 | next 2       flags 2                   flags 2
    1  addr   | len   | flags   | next         idx 2     driver counts   idx 2        device counts
    2  ...                                     ring[0] 2 a head          ring[0] 8    id 4 (the head) | len 4 (written)
    :                                          :                         :
    size-1                                     ring[size-1]              ring[size-1]
                                               used_event 2              avail_event 2

    head --> descriptor --NEXT--> descriptor --NEXT--> ...      device-readable buffers first, then device-writable
                                  descriptor --INDIRECT--> a table of its own somewhere in RAM, whose chain goes on

The driver is hostile and may run while we read. So each descriptor is copied once, checked, and only the copy is used;
`SplitQueue.pop` returns a whole chain of which every byte is RAM, or raises, and then has moved nothing. The indices
run freely modulo 2**16 and are never wrapped to the queue's size.

This is the readable twin of csrc/virtqueue.c and the oracle that it is compared with; it calls none of it. The packed
ring is in `kvmpy.devices.virtqueue_packed`; what a chain means to a disk, in `kvmpy.devices.block_request`.

Source: virtio 1.2 §2.7. Floor: devices.
"""

import struct
from enum import IntEnum
from threading import Lock
from typing import NamedTuple

from kvmpy._shim import lib
from kvmpy.errors import VirtqueueError
from kvmpy.machine.memory import GuestMemory

QUEUE_SIZE_MAX = 256
"""The most descriptors that a queue of ours may have."""

DESCRIPTOR = struct.Struct("<QIHH")
"""addr, len, flags, next; in a packed ring addr, len, id, flags."""
INDIRECT_ENTRIES_MAX = 1 << 16
CHAIN_BYTES_MAX = 1 << 32

AVAIL_FLAGS, AVAIL_IDX, AVAIL_RING = 0, 2, 4
USED_FLAGS, USED_IDX, USED_RING = 0, 2, 4
USED_ELEMENT = struct.Struct("<II")

DESCRIPTOR_FLAGS = lib.VRING_DESC_F_NEXT | lib.VRING_DESC_F_WRITE | lib.VRING_DESC_F_INDIRECT


class Fault(IntEnum):
    """What a driver did that breaks its queue for good: the device then says DEVICE_NEEDS_RESET."""

    RING_ADDRESS = lib.KVMPY_FAULT_RING_ADDRESS
    AVAIL_INDEX = lib.KVMPY_FAULT_AVAIL_INDEX
    HEAD = lib.KVMPY_FAULT_HEAD
    NEXT = lib.KVMPY_FAULT_NEXT
    CHAIN_TOO_LONG = lib.KVMPY_FAULT_CHAIN_TOO_LONG
    UNKNOWN_FLAGS = lib.KVMPY_FAULT_UNKNOWN_FLAGS
    INDIRECT_NOT_NEGOTIATED = lib.KVMPY_FAULT_INDIRECT_NOT_NEGOTIATED
    INDIRECT_NESTED = lib.KVMPY_FAULT_INDIRECT_NESTED
    INDIRECT_AND_NEXT = lib.KVMPY_FAULT_INDIRECT_AND_NEXT
    INDIRECT_LENGTH = lib.KVMPY_FAULT_INDIRECT_LENGTH
    INDIRECT_ADDRESS = lib.KVMPY_FAULT_INDIRECT_ADDRESS
    BUFFER_ADDRESS = lib.KVMPY_FAULT_BUFFER_ADDRESS
    BUFFER_ORDER = lib.KVMPY_FAULT_BUFFER_ORDER
    CHAIN_LENGTH = lib.KVMPY_FAULT_CHAIN_LENGTH
    BUFFER_ID = lib.KVMPY_FAULT_BUFFER_ID
    PACKED_NOT_AVAILABLE = lib.KVMPY_FAULT_PACKED_NOT_AVAILABLE

    @property
    def message(self) -> str:
        """What it is in one line, with the section that forbids it."""
        return f"{_MESSAGES[self]} (virtio 1.2 §{_SECTIONS[self]})"


_MESSAGES = {
    Fault.RING_ADDRESS: "a ring is not aligned, or not inside RAM",
    Fault.AVAIL_INDEX: "the available index is further ahead than the queue is long",
    Fault.HEAD: "a head lies beyond the descriptor table",
    Fault.NEXT: "a next lies beyond its descriptor table",
    Fault.CHAIN_TOO_LONG: "the chain is longer than the queue",
    Fault.UNKNOWN_FLAGS: "a descriptor has flags that are not defined",
    Fault.INDIRECT_NOT_NEGOTIATED: "an indirect descriptor, but INDIRECT_DESC was not negotiated",
    Fault.INDIRECT_NESTED: "an indirect table refers to another",
    Fault.INDIRECT_AND_NEXT: "a descriptor has both INDIRECT and NEXT",
    Fault.INDIRECT_LENGTH: "the length of an indirect table is 0, no multiple of 16, or more than 65536 entries",
    Fault.INDIRECT_ADDRESS: "an indirect table is not inside RAM",
    Fault.BUFFER_ADDRESS: "a buffer is not inside RAM",
    Fault.BUFFER_ORDER: "a device-readable buffer stands behind a device-writable one",
    Fault.CHAIN_LENGTH: "the buffers of a chain have more than 2^32 bytes",
    Fault.BUFFER_ID: "the buffer id is not below the size of the queue",
    Fault.PACKED_NOT_AVAILABLE: "the chain runs on into a descriptor that is not available",
}
_SECTIONS = {
    Fault.RING_ADDRESS: "2.7.1",
    Fault.AVAIL_INDEX: "2.7.13",
    Fault.HEAD: "2.7.6",
    Fault.NEXT: "2.7.5",
    Fault.CHAIN_TOO_LONG: "2.7.5.2",
    Fault.UNKNOWN_FLAGS: "2.7.5",
    Fault.INDIRECT_NOT_NEGOTIATED: "2.7.5.3.1",
    Fault.INDIRECT_NESTED: "2.7.5.3.1",
    Fault.INDIRECT_AND_NEXT: "2.7.5.3.1",
    Fault.INDIRECT_LENGTH: "2.7.5.3",
    Fault.INDIRECT_ADDRESS: "2.7.5.3",
    Fault.BUFFER_ADDRESS: "2.7.5",
    Fault.BUFFER_ORDER: "2.7.4.2",
    Fault.CHAIN_LENGTH: "2.7.5.2",
    Fault.BUFFER_ID: "2.8.13",
    Fault.PACKED_NOT_AVAILABLE: "2.8.17",
}


class QueueFault(VirtqueueError):
    """A driver broke its queue; ``fault`` says how."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.message)
        self.fault = fault


class QueueSetup(NamedTuple):
    """One virtqueue as driver and device have agreed on it."""

    queue_index: int
    size: int
    """Descriptors: 1 to `QUEUE_SIZE_MAX`; a power of two when split."""
    descriptor_area: int
    """gpa of the descriptor table, or of the packed ring."""
    driver_area: int
    """gpa of the available ring, or of the driver's event suppression structure."""
    device_area: int
    """gpa of the used ring, or of the device's event suppression structure."""
    features: int
    """Negotiated, as 64 bits."""

    def has(self, feature: int) -> bool:
        """Tell whether the feature with this bit number was negotiated."""
        return bool(self.features >> feature & 1)


class Segment(NamedTuple):
    """``size`` bytes of guest RAM from ``gpa`` on, inside one region; a size of 0 is nowhere."""

    gpa: int
    size: int


class Chain(NamedTuple):
    """A descriptor chain, copied and checked: nothing in the guest can change it any more."""

    head: int
    """What its used entry carries: the index of the first descriptor; in a packed ring the buffer id."""
    readable: tuple[Segment, ...]
    writable: tuple[Segment, ...]
    slots: int = 1
    """Packed: descriptors of the ring that it takes. Those of an indirect table are not among them."""


# --- the rings themselves ---------------------------------------------------------------------------------------


def ring_fault(memory: GuestMemory, setup: QueueSetup) -> Fault | None:
    """Check where a driver has put its rings; to be asked when it makes the queue ready.

    Each must be aligned and lie wholly inside one region of RAM. They may overlap: that harms the driver only.
    """
    if setup.has(lib.VIRTIO_F_RING_PACKED):
        needs = ((16, 16 * setup.size), (4, 4), (4, 4))  # virtio 1.2 §2.8.10.1
    else:
        needs = ((16, 16 * setup.size), (2, 6 + 2 * setup.size), (4, 6 + 8 * setup.size))  # virtio 1.2 §2.7
    areas = (setup.descriptor_area, setup.driver_area, setup.device_area)
    for gpa, (alignment, size) in zip(areas, needs, strict=True):
        if gpa % alignment or not memory.contains(gpa, size):
            return Fault.RING_ADDRESS
    return None


def full_barrier() -> None:
    """Let what this thread has written to guest memory be seen before anything that it reads from now on.

    Both sides write their own index and then look at what the other wants; without a barrier in between both may miss.
    x86 keeps all other orders by itself. Taking a lock is an atomic instruction, and that is one.
    """
    with _FENCE:
        pass


_FENCE = Lock()


class Buffers:
    """The buffers of one chain, collected and checked one by one."""

    def __init__(self, memory: GuestMemory, queue_size: int) -> None:
        self._memory = memory
        self._queue_size = queue_size
        self._readable: list[Segment] = []
        self._writable: list[Segment] = []
        self._bytes = 0

    def expect_room(self) -> None:
        """Raise QueueFault where the chain has as many buffers as the queue, before another descriptor is read."""
        if len(self._readable) + len(self._writable) == self._queue_size:
            raise QueueFault(Fault.CHAIN_TOO_LONG)

    def add(self, gpa: int, size: int, flags: int) -> None:
        """Take one more; raise QueueFault where it may not stand there."""
        writable = flags & lib.VRING_DESC_F_WRITE
        if self._writable and not writable:
            raise QueueFault(Fault.BUFFER_ORDER)
        # The address of nothing does not matter. Address 0 is RAM like any other.
        if size and not self._memory.contains(gpa, size):
            raise QueueFault(Fault.BUFFER_ADDRESS)
        self._bytes += size
        if self._bytes > CHAIN_BYTES_MAX:
            raise QueueFault(Fault.CHAIN_LENGTH)
        (self._writable if writable else self._readable).append(Segment(gpa, size))

    def chain(self, head: int, slots: int = 1) -> Chain:
        """Return all of them."""
        return Chain(head, tuple(self._readable), tuple(self._writable), slots)


def indirect_entries(memory: GuestMemory, setup: QueueSetup, gpa: int, size: int, flags: int) -> int:
    """Check a descriptor that refers to an indirect table, and return how many descriptors are there.

    Its WRITE flag is ignored, as the device must (virtio 1.2 §2.7.5.3.2).

    Raises:
        QueueFault: it may not refer to one, or not to this.
    """
    if not setup.has(lib.VIRTIO_RING_F_INDIRECT_DESC):
        raise QueueFault(Fault.INDIRECT_NOT_NEGOTIATED)
    if flags & lib.VRING_DESC_F_NEXT:
        raise QueueFault(Fault.INDIRECT_AND_NEXT)
    entries, rest = divmod(size, DESCRIPTOR.size)
    if not entries or rest or entries > INDIRECT_ENTRIES_MAX:
        raise QueueFault(Fault.INDIRECT_LENGTH)
    if not memory.contains(gpa, size):
        raise QueueFault(Fault.INDIRECT_ADDRESS)
    return entries


class SplitQueue:
    """A split virtqueue. One thread at a time; the rings must be where `ring_fault` found nothing wrong."""

    def __init__(self, memory: GuestMemory, setup: QueueSetup) -> None:
        self._memory = memory
        self._setup = setup
        self._event_idx = setup.has(lib.VIRTIO_RING_F_EVENT_IDX)
        self._last_avail = 0
        """Chains popped, modulo 2**16."""
        self._used_idx = 0
        """Chains pushed, modulo 2**16."""
        self._pushed = 0
        """Chains pushed since `wants_interrupt` last looked."""

    # --- chains ---

    def available(self) -> bool:
        """Tell whether the driver says that there is more; `pop` finds out what it is worth."""
        return self._pending() > 0

    def pop(self) -> Chain | None:
        """Take the next chain, or None where there is none.

        Raises:
            QueueFault: the driver has broken the queue. Nothing was taken.
        """
        pending = self._pending()
        if pending > self._setup.size:
            raise QueueFault(Fault.AVAIL_INDEX)
        if not pending:
            return None
        head = self._u16(self._setup.driver_area + AVAIL_RING + 2 * (self._last_avail % self._setup.size))
        if head >= self._setup.size:
            raise QueueFault(Fault.HEAD)
        chain = self._walk(head)
        self._last_avail = (self._last_avail + 1) % 2**16
        return chain

    def _pending(self) -> int:
        # Free-running, compared modulo 2**16: the driver never wraps idx to the queue's size (virtio 1.2 §2.7.6).
        return (self._u16(self._setup.driver_area + AVAIL_IDX) - self._last_avail) % 2**16

    def _walk(self, head: int) -> Chain:
        buffers = Buffers(self._memory, self._setup.size)
        table, entries, index = self._setup.descriptor_area, self._setup.size, head
        in_indirect_table = False
        while True:
            buffers.expect_room()
            descriptor = self._memory.read(table + DESCRIPTOR.size * index, DESCRIPTOR.size)
            gpa, size, flags, next_index = DESCRIPTOR.unpack(descriptor)
            if flags & ~DESCRIPTOR_FLAGS:
                raise QueueFault(Fault.UNKNOWN_FLAGS)
            if flags & lib.VRING_DESC_F_INDIRECT:
                if in_indirect_table:
                    raise QueueFault(Fault.INDIRECT_NESTED)
                entries = indirect_entries(self._memory, self._setup, gpa, size, flags)
                table, index, in_indirect_table = gpa, 0, True
                continue
            buffers.add(gpa, size, flags)
            if not flags & lib.VRING_DESC_F_NEXT:
                return buffers.chain(head)
            if next_index >= entries:
                raise QueueFault(Fault.NEXT)
            index = next_index

    def push(self, chain: Chain, written: int) -> None:
        """Give ``chain`` back, with the number of bytes that were written into its writable buffers."""
        element = self._setup.device_area + USED_RING + USED_ELEMENT.size * (self._used_idx % self._setup.size)
        self._memory.write(element, USED_ELEMENT.pack(chain.head, written))
        self._used_idx = (self._used_idx + 1) % 2**16
        # After the element: the driver reads what idx covers (virtio 1.2 §2.7.8.2).
        self._put_u16(self._setup.device_area + USED_IDX, self._used_idx)
        self._pushed += 1

    # --- who wants to be told (virtio 1.2 §2.7.7 and §2.7.10) ---

    def disable_notifications(self) -> None:
        """Ask the driver not to notify: we are looking anyway. With EVENT_IDX an old avail_event says so already."""
        if not self._event_idx:
            self._put_u16(self._setup.device_area + USED_FLAGS, lib.VRING_USED_F_NO_NOTIFY)

    def enable_notifications(self) -> None:
        """Ask the driver to notify of the next chain. What it made available before: look again."""
        if self._event_idx:
            avail_event = self._setup.device_area + USED_RING + USED_ELEMENT.size * self._setup.size
            self._put_u16(avail_event, self._last_avail)
        else:
            self._put_u16(self._setup.device_area + USED_FLAGS, 0)
        full_barrier()

    def wants_interrupt(self) -> bool:
        """Tell whether the driver wants an interrupt for what was pushed since this was last asked."""
        pushed, self._pushed = self._pushed, 0
        if not pushed:
            return False
        full_barrier()
        if not self._event_idx:
            return not self._u16(self._setup.driver_area + AVAIL_FLAGS) & lib.VRING_AVAIL_F_NO_INTERRUPT
        used_event = self._u16(self._setup.driver_area + AVAIL_RING + 2 * self._setup.size)
        # One of the pushed elements, whose indices begin at used_idx - pushed, is the one that the driver waits for.
        return (used_event - (self._used_idx - pushed)) % 2**16 < pushed

    # --- guest memory ---

    def _u16(self, gpa: int) -> int:
        return int.from_bytes(self._memory.read(gpa, 2), "little")

    def _put_u16(self, gpa: int, value: int) -> None:
        self._memory.write(gpa, value.to_bytes(2, "little"))

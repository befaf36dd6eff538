"""The device's side of a packed virtqueue, to read: one ring of descriptors that both sides write.

::

    descriptor ring (16 bytes each)                driver event suppression      device event suppression
    0  addr 8 | len 4 | id 2 | flags 2             off_wrap 2 | flags 2          off_wrap 2 | flags 2
    1  addr   | len   | id   | flags                when to interrupt             when to notify
    :
    size-1

    avail_slot   where the driver puts the next chain          each with a wrap counter, 1 at first,
    used_slot    where the next used descriptor goes           that flips when it passes the last slot

    flags        AVAIL == wrap, USED != wrap:  available       AVAIL == USED == wrap:  used

A chain lies in slots that follow each other, all but the last with NEXT; the last has the buffer id. It is given back
as one used descriptor in its first slot. An indirect table has no NEXT: its entries are the chain, from first to last.

What is said of the split queue in `kvmpy.devices.virtqueue` holds here too; the names and the checks are shared.

Source: virtio 1.2 §2.8. Floor: devices.
"""

import struct

from kvmpy._shim import lib
from kvmpy.devices.virtqueue import (
    DESCRIPTOR,
    DESCRIPTOR_FLAGS,
    Buffers,
    Chain,
    Fault,
    QueueFault,
    QueueSetup,
    full_barrier,
    indirect_entries,
)
from kvmpy.machine.memory import GuestMemory

AVAIL = 1 << lib.VRING_PACKED_DESC_F_AVAIL
USED = 1 << lib.VRING_PACKED_DESC_F_USED
PACKED_FLAGS = DESCRIPTOR_FLAGS | AVAIL | USED

LEN, FLAGS = 8, 14
"""Offsets in a descriptor."""
LEN_AND_ID = struct.Struct("<IH")

EVENT_OFF_WRAP, EVENT_FLAGS = 0, 2
EVENT_WRAP = 1 << lib.VRING_PACKED_EVENT_F_WRAP_CTR


class Position:
    """A slot of the ring and the wrap counter that goes with it."""

    def __init__(self, queue_size: int) -> None:
        self._queue_size = queue_size
        self.slot = 0
        self.wrap = True

    def advance(self, slots: int) -> None:
        """Go ``slots`` further, at most once around."""
        self.slot += slots
        if self.slot >= self._queue_size:
            self.slot -= self._queue_size
            self.wrap = not self.wrap

    def is_available(self, flags: int) -> bool:
        """Tell whether a descriptor with ``flags`` would be available here."""
        return bool(flags & AVAIL) == self.wrap != bool(flags & USED)


class PackedQueue:
    """A packed virtqueue. One thread at a time; the rings must be where `ring_fault` found nothing wrong."""

    def __init__(self, memory: GuestMemory, setup: QueueSetup) -> None:
        self._memory = memory
        self._setup = setup
        self._event_idx = setup.has(lib.VIRTIO_RING_F_EVENT_IDX)
        self._avail = Position(setup.size)
        self._used = Position(setup.size)
        self._pushed = 0
        """Slots used since `wants_interrupt` last looked."""

    # --- chains ---

    def available(self) -> bool:
        """Tell whether the driver says that there is more; `pop` finds out what it is worth."""
        return self._avail.is_available(self._flags(self._avail.slot))

    def pop(self) -> Chain | None:
        """Take the next chain, or None where there is none.

        Raises:
            QueueFault: the driver has broken the queue. Nothing was taken.
        """
        chain = self._walk()
        if chain is not None:
            self._avail.advance(chain.slots)
        return chain

    def _walk(self) -> Chain | None:
        buffers = Buffers(self._memory, self._setup.size)
        at = Position(self._setup.size)
        at.slot, at.wrap = self._avail.slot, self._avail.wrap
        slots = 0
        while True:
            buffers.expect_room()
            # The flags first, and those are what counts: they say that the rest is there.
            flags = self._flags(at.slot)
            if not at.is_available(flags):
                if not slots:
                    return None
                raise QueueFault(Fault.PACKED_NOT_AVAILABLE)
            gpa, size, buffer_id, _ = DESCRIPTOR.unpack(self._memory.read(self._descriptor(at.slot), DESCRIPTOR.size))
            if flags & ~PACKED_FLAGS:
                raise QueueFault(Fault.UNKNOWN_FLAGS)
            slots += 1
            if flags & lib.VRING_DESC_F_INDIRECT:
                self._walk_indirect_table(buffers, gpa, size, flags)
                break
            buffers.add(gpa, size, flags)
            if not flags & lib.VRING_DESC_F_NEXT:
                break
            at.advance(1)
        if buffer_id >= self._setup.size:
            raise QueueFault(Fault.BUFFER_ID)
        return buffers.chain(buffer_id, slots)

    def _walk_indirect_table(self, buffers: Buffers, table: int, table_size: int, table_flags: int) -> None:
        entries = indirect_entries(self._memory, self._setup, table, table_size, table_flags)
        for entry in range(table, table + DESCRIPTOR.size * entries, DESCRIPTOR.size):
            buffers.expect_room()
            gpa, size, _, flags = DESCRIPTOR.unpack(self._memory.read(entry, DESCRIPTOR.size))
            if flags & lib.VRING_DESC_F_INDIRECT:
                raise QueueFault(Fault.INDIRECT_NESTED)
            # Of the other flags only WRITE is valid; the device ignores the rest, and the id (virtio 1.2 §2.8.7).
            buffers.add(gpa, size, flags)

    def push(self, chain: Chain, written: int) -> None:
        """Give ``chain`` back, with the number of bytes that were written into its writable buffers."""
        descriptor = self._descriptor(self._used.slot)
        self._memory.write(descriptor + LEN, LEN_AND_ID.pack(written, chain.head))
        flags = (AVAIL | USED if self._used.wrap else 0) | (lib.VRING_DESC_F_WRITE if written else 0)
        # Last: they give the descriptor away (virtio 1.2 §2.8.15).
        self._put_u16(descriptor + FLAGS, flags)
        self._used.advance(chain.slots)
        self._pushed += chain.slots

    # --- who wants to be told (virtio 1.2 §2.8.10 and §2.8.14) ---

    def disable_notifications(self) -> None:
        """Ask the driver not to notify: we are looking anyway."""
        self._put_u16(self._setup.device_area + EVENT_FLAGS, lib.VRING_PACKED_EVENT_FLAG_DISABLE)

    def enable_notifications(self) -> None:
        """Ask the driver to notify of the next chain. What it made available before: look again."""
        flags = lib.VRING_PACKED_EVENT_FLAG_ENABLE
        if self._event_idx:
            off_wrap = self._avail.slot | (EVENT_WRAP if self._avail.wrap else 0)
            self._put_u16(self._setup.device_area + EVENT_OFF_WRAP, off_wrap)
            flags = lib.VRING_PACKED_EVENT_FLAG_DESC
        self._put_u16(self._setup.device_area + EVENT_FLAGS, flags)
        full_barrier()

    def wants_interrupt(self) -> bool:
        """Tell whether the driver wants an interrupt for what was pushed since this was last asked."""
        pushed, self._pushed = self._pushed, 0
        if not pushed:
            return False
        full_barrier()
        flags = self._u16(self._setup.driver_area + EVENT_FLAGS)
        if flags == lib.VRING_PACKED_EVENT_FLAG_DISABLE:
            return False
        if flags == lib.VRING_PACKED_EVENT_FLAG_DESC and self._event_idx:
            return self._has_passed(self._u16(self._setup.driver_area + EVENT_OFF_WRAP), pushed)
        return True

    def _has_passed(self, off_wrap: int, pushed: int) -> bool:
        """Tell whether the last ``pushed`` slots include the one that the driver waits for."""
        size = self._setup.size
        offset = off_wrap & ~EVENT_WRAP
        if offset >= size:
            return True  # there is no such slot: rather an interrupt too many
        # Twice around brings slot and wrap counter back: positions are counted modulo twice the size.
        event = offset + (0 if off_wrap & EVENT_WRAP else size)
        now = self._used.slot + (0 if self._used.wrap else size)
        return (event - (now - pushed)) % (2 * size) < pushed

    # --- guest memory ---

    def _descriptor(self, slot: int) -> int:
        return self._setup.descriptor_area + DESCRIPTOR.size * slot

    def _flags(self, slot: int) -> int:
        return self._u16(self._descriptor(slot) + FLAGS)

    def _u16(self, gpa: int) -> int:
        return int.from_bytes(self._memory.read(gpa, 2), "little")

    def _put_u16(self, gpa: int, value: int) -> None:
        self._memory.write(gpa, value.to_bytes(2, "little"))

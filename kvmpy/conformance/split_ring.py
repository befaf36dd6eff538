"""The driver's side of a split virtqueue, friendly by default, hostile on request.

Source: virtio 1.2 §2.7.
"""

from collections.abc import Sequence

from kvmpy.conformance.layout import (
    DESCRIPTOR_SIZE,
    INDIRECT,
    NEXT,
    SPLIT,
    U16,
    USED_ELEMENT,
    WRITE,
    Buffer,
    Descriptor,
    Used,
    ring_areas,
    write_table,
)
from kvmpy.devices.virtqueue import QueueSetup
from kvmpy.machine.memory import GuestMemory


class SplitRing:
    """A split virtqueue: descriptor table, available ring (driver area), used ring (device area); §2.7.

    ``free`` holds the descriptors not in use, in the order in which they will be taken: a test may shuffle it.
    """

    def __init__(self, memory: GuestMemory, setup: QueueSetup) -> None:
        self.memory, self.setup, self.size = memory, setup, setup.size
        for gpa, length in ring_areas(setup):
            memory.fill(gpa, length)
        self.free = list(range(setup.size))
        self.next_avail = self.last_used = 0
        self._chains: dict[int, list[int]] = {}

    def add(self, buffers: Sequence[Buffer], *, table: int | None = None, direct: int = 0) -> int:
        """Write a chain, and its head into the next slot of the available ring; return the head. Not yet published.

        ``table``: the gpa of an indirect table to hold the buffers, all but the first ``direct`` ones.

        Raises:
            IndexError: there are too few free descriptors.
        """
        used = self._take(len(buffers) if table is None else direct + 1)
        for i, (index, buffer) in enumerate(zip(used, buffers, strict=False), 1):
            flags = (WRITE if buffer.writable else 0) | (NEXT if i < len(used) else 0)
            following = used[i] if i < len(used) else 0
            self.set_descriptor(index, Descriptor(buffer.gpa, buffer.size, flags, following))
        if table is not None:
            length = write_table(self.memory, table, buffers[direct:], chained=True)
            self.set_descriptor(used[-1], Descriptor(table, length, INDIRECT))
        self._chains[used[0]] = used
        self.offer(used[0])
        return used[0]

    def _take(self, count: int) -> list[int]:
        if count > len(self.free):
            raise IndexError(f"{count} descriptors: {len(self.free)} of {self.size} are free")
        used, self.free = self.free[:count], self.free[count:]
        return used

    def offer(self, head: int) -> None:
        """Put ``head``, whatever it is, into the next slot of the available ring. Not yet published."""
        self.set_avail(self.next_avail % self.size, head)
        self.next_avail = (self.next_avail + 1) % 65536

    def publish(self) -> None:
        """Let the device see all that was added."""
        self.avail_idx = self.next_avail

    def used(self) -> list[Used]:
        """Return what the device has returned since the last call; its descriptors are free again."""
        returned = []
        while self.last_used != self.used_idx:
            slot = self.setup.device_area + 4 + USED_ELEMENT.size * (self.last_used % self.size)
            used = Used(*USED_ELEMENT.unpack(self.memory.read(slot, USED_ELEMENT.size)))
            self.free += self._chains.pop(used.head, [])
            self.last_used = (self.last_used + 1) % 65536
            returned.append(used)
        return returned

    @property
    def room(self) -> int:
        """The most descriptors that the next chain can have."""
        return len(self.free)

    def chain_of(self, head: int) -> Sequence[int]:
        """Return the descriptors of the chain that `add` called ``head`` and the device has not returned."""
        return self._chains[head]

    def edit(self, head: int, position: int, *, set_flags: int = 0, **fields: int) -> None:
        """Change fields of one descriptor of a chain, counted from 0; ``set_flags`` are set beside the others."""
        index = self._chains[head][position]
        descriptor = self.descriptor(index)
        self.set_descriptor(index, descriptor._replace(flags=descriptor.flags | set_flags)._replace(**fields))

    # --- every field by itself --------------------------------------------------------------------------------------

    def descriptor(self, index: int) -> Descriptor:
        """Return descriptor ``index`` of the table."""
        gpa = self.setup.descriptor_area + DESCRIPTOR_SIZE * index
        return Descriptor(*SPLIT.unpack(self.memory.read(gpa, DESCRIPTOR_SIZE)))

    def set_descriptor(self, index: int, descriptor: Descriptor) -> None:
        """Write descriptor ``index`` of the table."""
        self.memory.write(self.setup.descriptor_area + DESCRIPTOR_SIZE * index, SPLIT.pack(*descriptor))

    def set_avail(self, slot: int, head: int) -> None:
        """Write one slot of the available ring."""
        self.memory.write(self.setup.driver_area + 4 + 2 * slot, U16.pack(head))

    @property
    def avail_flags(self) -> int:
        """The available ring's flags: NO_INTERRUPT."""
        return self._u16(self.setup.driver_area)

    @avail_flags.setter
    def avail_flags(self, flags: int) -> None:
        self.memory.write(self.setup.driver_area, U16.pack(flags))

    @property
    def avail_idx(self) -> int:
        """How many chains were ever published, modulo 2^16."""
        return self._u16(self.setup.driver_area + 2)

    @avail_idx.setter
    def avail_idx(self, index: int) -> None:
        self.memory.write(self.setup.driver_area + 2, U16.pack(index))

    @property
    def used_event(self) -> int:
        """With EVENT_IDX: interrupt when used_idx passes this."""
        return self._u16(self.setup.driver_area + 4 + 2 * self.size)

    @used_event.setter
    def used_event(self, index: int) -> None:
        self.memory.write(self.setup.driver_area + 4 + 2 * self.size, U16.pack(index))

    @property
    def used_flags(self) -> int:
        """The used ring's flags: NO_NOTIFY."""
        return self._u16(self.setup.device_area)

    @property
    def used_idx(self) -> int:
        """How many chains the device ever returned, modulo 2^16."""
        return self._u16(self.setup.device_area + 2)

    @property
    def avail_event(self) -> int:
        """With EVENT_IDX: the device wants to be notified when avail_idx passes this."""
        return self._u16(self.setup.device_area + 4 + 8 * self.size)

    def _u16(self, gpa: int) -> int:
        return int(U16.unpack(self.memory.read(gpa, 2))[0])

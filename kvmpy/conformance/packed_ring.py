"""The driver's side of a packed virtqueue, friendly by default, hostile on request.

Source: virtio 1.2 §2.8.
"""

from collections.abc import Sequence

from kvmpy.conformance.layout import (
    AVAIL,
    DESCRIPTOR_SIZE,
    EVENT,
    INDIRECT,
    NEXT,
    PACKED,
    U16,
    USED,
    WRITE,
    Buffer,
    EventSuppression,
    PackedDescriptor,
    Used,
    ring_areas,
    write_table,
)
from kvmpy.devices.virtqueue import QueueSetup
from kvmpy.machine.memory import GuestMemory


class PackedRing:
    """A packed virtqueue: descriptor ring, driver and device event suppression; §2.8.

    A chain lies in slots that follow each other; its buffer id is the first of ``free``, which a test may shuffle.
    """

    def __init__(self, memory: GuestMemory, setup: QueueSetup) -> None:
        self.memory, self.setup, self.size = memory, setup, setup.size
        for gpa, length in ring_areas(setup):
            memory.fill(gpa, length)
        self.free = list(range(setup.size))
        self.next_slot = self.used_slot = 0
        self.wrap = self.used_wrap = True
        self._unpublished: dict[int, int] = {}
        self._chains: dict[int, list[list[int]]] = {}
        """The slots of what is out, by buffer id: a hostile driver may use one twice."""

    def add(self, buffers: Sequence[Buffer], *, table: int | None = None, direct: int = 0) -> int:
        """Write a chain into the next slots and return its buffer id. Its first flags wait for `publish`.

        ``table``: the gpa of an indirect table to hold the buffers, all but the first ``direct`` ones.

        Raises:
            IndexError: there are too few free slots.
        """
        pieces = [(b.gpa, b.size, WRITE if b.writable else 0) for b in buffers]
        if table is not None:
            length = write_table(self.memory, table, buffers[direct:], chained=False)
            pieces[direct:] = [(table, length, INDIRECT)]
        if len(pieces) > self.room:
            raise IndexError(f"{len(pieces)} slots: {self.room} of {self.size} are free")
        identity = self.free.pop(0)
        slots: list[int] = []
        self._chains.setdefault(identity, []).append(slots)
        for i, (gpa, size, flags) in enumerate(pieces, 1):
            flags |= self.available | (NEXT if i < len(pieces) else 0)
            if i == 1:
                self._unpublished[self.next_slot] = flags
                # Until `publish` the slot is not available: its AVAIL bit alone decides that (§2.8.1).
                flags ^= AVAIL
            self.set_descriptor(self.next_slot, PackedDescriptor(gpa, size, identity, flags))
            slots.append(self.next_slot)
            self._advance()
        return identity

    @property
    def room(self) -> int:
        """The most descriptors that the next chain can have."""
        return self.size - sum(len(slots) for chains in self._chains.values() for slots in chains)

    def chain_of(self, identity: int) -> Sequence[int]:
        """Return the slots of the chain that `add` called ``identity`` and the device has not returned."""
        return self._chains[identity][0]

    @property
    def available(self) -> int:
        """The AVAIL and USED bits that make the next slot available."""
        return AVAIL if self.wrap else USED

    def _advance(self) -> None:
        self.next_slot += 1
        if self.next_slot == self.size:
            self.next_slot, self.wrap = 0, not self.wrap

    def publish(self) -> None:
        """Let the device see all that was added: the last chain first, so that it never finds half of them."""
        for slot, flags in reversed(self._unpublished.items()):
            self.set_flags(slot, flags)
        self._unpublished.clear()

    def used(self) -> list[Used]:
        """Return what the device has returned since the last call; its slots and ids are free again."""
        returned = []
        while self._chains and self.is_used(self.descriptor(self.used_slot).flags):
            _, written, identity, _ = self.descriptor(self.used_slot)
            returned.append(Used(identity, written))
            if identity not in self._chains:
                break  # we never gave that id: nobody can say where the next used descriptor is
            self.used_slot += len(self._chains[identity].pop(0))
            if not self._chains[identity]:
                del self._chains[identity]
            self.free.append(identity)
            if self.used_slot >= self.size:
                self.used_slot, self.used_wrap = self.used_slot - self.size, not self.used_wrap
        return returned

    def is_used(self, flags: int) -> bool:
        """Tell whether ``flags`` mark the slot at `used_slot` as used (§2.8.1)."""
        return bool(flags & AVAIL) == bool(flags & USED) == self.used_wrap

    def edit(self, identity: int, position: int, *, set_flags: int = 0, **fields: int) -> None:
        """Change fields of one descriptor of a chain, counted from 0; ``set_flags`` are set beside the others."""
        slot = self._chains[identity][-1][position]
        descriptor = self.descriptor(slot)
        if slot in self._unpublished:
            self._unpublished[slot] = fields.pop("flags", self._unpublished[slot] | set_flags)
            self.set_descriptor(slot, descriptor._replace(**fields))
        else:
            self.set_descriptor(slot, descriptor._replace(flags=descriptor.flags | set_flags)._replace(**fields))

    # --- every field by itself --------------------------------------------------------------------------------------

    def descriptor(self, slot: int) -> PackedDescriptor:
        """Return the descriptor in ``slot``."""
        gpa = self.setup.descriptor_area + DESCRIPTOR_SIZE * slot
        return PackedDescriptor(*PACKED.unpack(self.memory.read(gpa, DESCRIPTOR_SIZE)))

    def set_descriptor(self, slot: int, descriptor: PackedDescriptor) -> None:
        """Write the descriptor in ``slot``, its flags too."""
        self.memory.write(self.setup.descriptor_area + DESCRIPTOR_SIZE * slot, PACKED.pack(*descriptor))

    def set_flags(self, slot: int, flags: int) -> None:
        """Write the flags in ``slot``."""
        self.memory.write(self.setup.descriptor_area + DESCRIPTOR_SIZE * slot + 14, U16.pack(flags))

    @property
    def driver_event(self) -> EventSuppression:
        """When the driver wants interrupts."""
        return EventSuppression(*EVENT.unpack(self.memory.read(self.setup.driver_area, EVENT.size)))

    @driver_event.setter
    def driver_event(self, event: EventSuppression) -> None:
        self.memory.write(self.setup.driver_area, EVENT.pack(*event))

    @property
    def device_event(self) -> EventSuppression:
        """When the device wants notifications."""
        return EventSuppression(*EVENT.unpack(self.memory.read(self.setup.device_area, EVENT.size)))

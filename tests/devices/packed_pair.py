"""A driver and a device that share one packed queue."""

from queue_pair import TABLE as TABLE
from queue_pair import Pair
from watched_memory import WatchedMemory

from kvmpy import MiB
from kvmpy._shim import lib
from kvmpy.conformance.layout import NEXT, Buffer, PackedDescriptor, place
from kvmpy.conformance.packed_ring import PackedRing
from kvmpy.devices.virtqueue import ring_fault
from kvmpy.devices.virtqueue_packed import PackedQueue

PACKED, EVENT_IDX = 1 << lib.VIRTIO_F_RING_PACKED, 1 << lib.VIRTIO_RING_F_EVENT_IDX
INDIRECT_DESC = 1 << lib.VIRTIO_RING_F_INDIRECT_DESC
RINGS, DATA = 0x1000, 0x1_0000
SIZE = 5
"""No power of two: a packed queue need not have one."""


class Packed(Pair):
    """``driver`` and ``device``, and ``memory`` that remembers who looked where."""

    def __init__(self, *, size: int = SIZE, features: int = INDIRECT_DESC, memory_size: int = 1 * MiB) -> None:
        self.memory = WatchedMemory(memory_size)
        self.setup = place(0, size, RINGS, PACKED | features)
        assert ring_fault(self.memory, self.setup) is None
        self.driver = PackedRing(self.memory, self.setup)
        self.device = PackedQueue(self.memory, self.setup)

    def offer(self, *descriptors: tuple[int, int, int, int]) -> None:
        """Write (gpa, len, id, flags without AVAIL and USED) into the next slots and make them available."""
        slots = []
        for gpa, size, identity, flags in descriptors:
            slots.append((self.driver.next_slot, PackedDescriptor(gpa, size, identity, flags | self.driver.available)))
            self.driver._advance()
        for slot, descriptor in reversed(slots):
            self.driver.set_descriptor(slot, descriptor)

    def turn(self, slots: int) -> None:
        """Serve chains that take so many slots together, at most the queue's size at a time."""
        while slots:
            step = min(slots, self.setup.size)
            self.driver.add([Buffer(DATA, 1)] * step)
            self.driver.publish()
            self.device.push(self.device.pop(), 0)
            assert len(self.driver.used()) == 1
            slots -= step


def chained(*descriptors: tuple[int, int, int, int]) -> list[tuple[int, int, int, int]]:
    """Return the descriptors with NEXT in all but the last."""
    return [(gpa, size, identity, flags | NEXT) for gpa, size, identity, flags in descriptors[:-1]] + [descriptors[-1]]

"""A driver and a device that share one split queue."""

from queue_pair import TABLE as TABLE
from queue_pair import Pair
from watched_memory import WatchedMemory

from kvmpy import MiB
from kvmpy._shim import lib
from kvmpy.conformance.layout import WRITE, Descriptor, place
from kvmpy.conformance.split_ring import SplitRing
from kvmpy.devices.virtqueue import SplitQueue, ring_fault

INDIRECT_DESC, EVENT_IDX = 1 << lib.VIRTIO_RING_F_INDIRECT_DESC, 1 << lib.VIRTIO_RING_F_EVENT_IDX
RINGS, DATA = 0x1000, 0x1_0000
SIZE = 8


class Split(Pair):
    """``driver`` and ``device``, and ``memory`` that remembers who looked where."""

    def __init__(self, *, size: int = SIZE, features: int = INDIRECT_DESC, memory_size: int = 1 * MiB) -> None:
        self.memory = WatchedMemory(memory_size)
        self.setup = place(0, size, RINGS, features)
        assert ring_fault(self.memory, self.setup) is None
        self.driver = SplitRing(self.memory, self.setup)
        self.device = SplitQueue(self.memory, self.setup)

    def offer(self, *descriptors: Descriptor, head: int = 0) -> None:
        """Write ``descriptors`` from index 0 on, and make ``head`` available."""
        for index, descriptor in enumerate(descriptors):
            self.driver.set_descriptor(index, descriptor)
        self.driver.offer(head)
        self.driver.publish()


def read(size: int = 16, flags: int = 0, next: int = 0, gpa: int = DATA) -> Descriptor:
    """A device-readable buffer."""
    return Descriptor(gpa, size, flags, next)


def write(size: int = 16, flags: int = 0, next: int = 0, gpa: int = DATA) -> Descriptor:
    """A device-writable buffer."""
    return Descriptor(gpa, size, flags | WRITE, next)

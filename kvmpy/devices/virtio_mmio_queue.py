"""One virtqueue as the transport sees it: the registers behind QueueSel, and who serves it.

Source: virtio 1.2 §4.2.2, §2.6.1 (virtqueue reset).
"""

import os
from typing import TYPE_CHECKING, Self

from kvmpy._shim import lib
from kvmpy.devices.virtqueue import QUEUE_SIZE_MAX, Fault, QueueSetup, ring_fault
from kvmpy.machine.memory import GuestMemory

if TYPE_CHECKING:
    from kvmpy.devices.queue_worker import Worker

ADDRESS_REGISTERS = (
    lib.VIRTIO_MMIO_QUEUE_DESC_LOW,
    lib.VIRTIO_MMIO_QUEUE_DESC_HIGH,
    lib.VIRTIO_MMIO_QUEUE_AVAIL_LOW,
    lib.VIRTIO_MMIO_QUEUE_AVAIL_HIGH,
    lib.VIRTIO_MMIO_QUEUE_USED_LOW,
    lib.VIRTIO_MMIO_QUEUE_USED_HIGH,
)


class MmioQueue:
    """The registers of queue ``index``. ``kick_fd`` is its eventfd for as long as the device lives."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.kick_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.worker: Worker | None = None
        self.clear()

    def clear(self) -> None:
        """Set the registers to what they are after a reset of the device; nobody serves the queue."""
        self.num = 0
        self.ready = False
        self.resetting = False
        self.was_reset = False
        self._addresses = dict.fromkeys(ADDRESS_REGISTERS, 0)

    def write(self, register: int, value: int) -> None:
        """Set QueueNum or half an address. A queue that is ready has them for good (§4.2.2.2)."""
        if self.ready:
            return
        if register == lib.VIRTIO_MMIO_QUEUE_NUM:
            self.num = value
        else:
            self._addresses[register] = value

    def setup(self, features: int) -> QueueSetup:
        """Return what the driver has written so far, unchecked."""
        return QueueSetup(
            self.index,
            self.num,
            self._address(lib.VIRTIO_MMIO_QUEUE_DESC_LOW, lib.VIRTIO_MMIO_QUEUE_DESC_HIGH),
            self._address(lib.VIRTIO_MMIO_QUEUE_AVAIL_LOW, lib.VIRTIO_MMIO_QUEUE_AVAIL_HIGH),
            self._address(lib.VIRTIO_MMIO_QUEUE_USED_LOW, lib.VIRTIO_MMIO_QUEUE_USED_HIGH),
            features,
        )

    def _address(self, low: int, high: int) -> int:
        return self._addresses[low] | self._addresses[high] << 32

    def stop(self) -> None:
        """Ask whoever serves the queue to end; from any thread, does not wait."""
        worker = self.worker
        if worker is not None:
            worker.stop()

    def drain(self) -> None:
        """Return when nobody serves the queue any more."""
        if self.worker is not None:
            self.worker.stop()
            self.worker.join()
            self.worker = None

    def close(self) -> None:
        """Close the kick eventfd of a drained queue. Closing twice is harmless."""
        self.clear()
        if self.kick_fd >= 0:
            os.close(self.kick_fd)
            self.kick_fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def setup_fault(memory: GuestMemory, setup: QueueSetup) -> Fault | None:
    """Return what is wrong with a queue that shall become ready: its size, or where its rings are."""
    split = not setup.has(lib.VIRTIO_F_RING_PACKED)
    if not 0 < setup.size <= QUEUE_SIZE_MAX or (split and setup.size & (setup.size - 1)):
        return Fault.RING_ADDRESS  # rings of that size are nowhere
    return ring_fault(memory, setup)

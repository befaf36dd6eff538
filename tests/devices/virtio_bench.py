"""A virtio device with its registers and its driver, for devices that are no disks."""

import os
import select

from mmio_driver import LIMIT, VERSION_1

from kvmpy._shim import lib
from kvmpy.conformance.driver import BlockDriver
from kvmpy.conformance.layout import Buffer
from kvmpy.devices.queue_worker import InlineWorker
from kvmpy.devices.virtio_device import feature_bits
from kvmpy.devices.virtio_mmio import VirtioMmio
from kvmpy.machine.memory import GuestMemory
from kvmpy.units import MiB

INDIRECT = feature_bits(lib.VIRTIO_RING_F_INDIRECT_DESC)
EVENT_IDX = feature_bits(lib.VIRTIO_RING_F_EVENT_IDX)
PACKED = feature_bits(lib.VIRTIO_F_RING_PACKED)
RING_RESET = feature_bits(lib.VIRTIO_F_RING_RESET)
KINDS = {"split": 0, "packed": PACKED}
"""What a driver accepts beside VERSION_1, by the kind of its rings."""
DATA = 0x10_0000
"""gpa of the first buffer."""


class VirtioBench:
    """``make_device(memory)`` behind registers. Queues are served by whoever notifies, unless said otherwise."""

    def __init__(self, make_device, make_worker=InlineWorker):
        self.memory = GuestMemory(2 * MiB)
        self.device = make_device(self.memory)
        self.errors = []
        self.mmio = VirtioMmio(
            self.device, self.memory, name="device0", on_error=self.errors.append, make_worker=make_worker
        )
        self.driver = BlockDriver(self.memory, self.mmio)

    def start(self, features=0, *, size=16):
        """Go from a reset to a live device with all of its queues."""
        self.driver.start(VERSION_1 | features, queues=self.device.identity.queues, size=size)

    def offer(self, queue, *buffers, notify=True, **options):
        """Make a chain of (gpa, size, writable) available; return its head."""
        ring = self.driver.rings[queue]
        head = ring.add([Buffer(*buffer) for buffer in buffers], **options)
        ring.publish()
        if notify:
            self.driver.notify(queue)
        return head

    def used(self, queue):
        """Return the lengths of the chains that the device has given back."""
        return [used.written for used in self.driver.rings[queue].used()]

    def wait_for_used(self, queue, count=1):
        """Return the lengths of ``count`` chains that the device gives back, when it has."""
        poll = select.poll()
        poll.register(self.mmio.interrupt.fd, select.POLLIN)
        used = self.used(queue)
        while len(used) < count:
            assert poll.poll(LIMIT * 1000), "no interrupt in time"
            os.eventfd_read(self.mmio.interrupt.fd)
            self.mmio.interrupt.acknowledge(self.mmio.interrupt.status)
            used += self.used(queue)
        return used

    def close(self):
        self.mmio.close()
        if hasattr(self.device, "close"):
            self.device.close()
        self.memory.close()
        assert self.errors == []

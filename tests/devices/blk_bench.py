"""A virtio block device on a disk that a test holds in its hand: `HeldImage`, and `BlkBench` around it."""

import os
import select
import threading

from mmio_driver import LIMIT, VERSION_1

from kvmpy._shim import lib
from kvmpy.conformance.driver import BlockDriver, write_request
from kvmpy.devices.block import BlockSettings
from kvmpy.devices.block_c import CBlock
from kvmpy.devices.block_python import PythonBlock
from kvmpy.devices.queue_worker import InlineWorker
from kvmpy.devices.virtio_blk import VirtioBlk
from kvmpy.devices.virtio_device import feature_bits
from kvmpy.devices.virtio_mmio import VirtioMmio
from kvmpy.machine.memory import GuestMemory
from kvmpy.storage.disk import SECTOR_SIZE, Extent
from kvmpy.units import KiB, MiB

SECTORS = 128
REQUESTS = 1 * MiB
"""gpa of the first slot of `BlkBench.submit`."""
FLUSH = feature_bits(lib.VIRTIO_BLK_F_FLUSH)
CONFIG_WCE = feature_bits(lib.VIRTIO_BLK_F_CONFIG_WCE)


ENGINES = {"python": PythonBlock, "c": CBlock}


class HeldImage:
    """A `DiskImage` in memory, filled with its sector numbers, that tells nothing unless it is asked.

    Asked, it sets ``asked`` and answers when ``gate`` is open.
    """

    def __init__(self, *, readonly=False, alignment=1):
        self.readonly, self.alignment = readonly, alignment
        self.size = SECTORS * SECTOR_SIZE
        self.asked, self.gate = threading.Event(), threading.Event()
        self.gate.set()
        self._fd = os.memfd_create("disk", os.MFD_CLOEXEC)
        os.pwrite(self._fd, b"".join(bytes([sector % 251]) * SECTOR_SIZE for sector in range(SECTORS)), 0)

    def table(self):
        return []

    def map(self, sector, sectors, *, write):
        self.asked.set()
        assert self.gate.wait(LIMIT)
        offset = sector * SECTOR_SIZE
        return [Extent(sector, sectors, self._fd, offset, writable=not self.readonly, unaligned_fd=self._fd)]

    def zero(self, sector, sectors):
        os.pwrite(self._fd, bytes(sectors * SECTOR_SIZE), sector * SECTOR_SIZE)
        return self.map(sector, sectors, write=True)

    def resize(self, sectors):
        self.size = sectors * SECTOR_SIZE
        os.ftruncate(self._fd, self.size)

    def read(self):
        """Return all that is on the disk."""
        return os.pread(self._fd, self.size, 0)

    def close(self):
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class BlkBench:
    """A disk, its registers and its driver; ``modes`` is what the engine was told about its cache."""

    def __init__(self, image=None, *, make_engine, make_worker=InlineWorker, **options):
        self.memory = GuestMemory(2 * MiB)
        self.image = image or HeldImage()
        self.modes = []
        self.errors = []
        self._make_engine = make_engine
        self.blk = VirtioBlk(self.memory, self.image, make_engine=self._make, **options)
        self.mmio = VirtioMmio(
            self.blk, self.memory, name="disk0", on_error=self.errors.append, make_worker=make_worker
        )
        self.driver = BlockDriver(self.memory, self.mmio)

    def _make(self, memory, image, settings: BlockSettings):
        engine = self._make_engine(memory, image, settings)
        tell = engine.set_writeback

        def remember(writeback):
            self.modes.append(writeback)
            tell(writeback)

        engine.set_writeback = remember
        return engine

    @property
    def writeback(self):
        """What the writeback field reads; the engine must have been told the same."""
        shown = self.driver.config(32, 1)
        assert shown == self.modes[-1]
        return shown

    @property
    def generation(self):
        return self.driver.get(lib.VIRTIO_MMIO_CONFIG_GENERATION)

    def acknowledge(self):
        """Return what the device interrupts for, and acknowledge it."""
        bits = self.driver.get(lib.VIRTIO_MMIO_INTERRUPT_STATUS)
        self.driver.set(lib.VIRTIO_MMIO_INTERRUPT_ACK, bits)
        return bits

    def start(self, features=FLUSH, **options):
        self.driver.start(VERSION_1 | features, **options)

    # --- with a worker's thread: nothing here waits for the device, unless it says so ---

    def submit(self, type, sector=0, *, queue=0, slot=0, **parts):
        """Make a request available and notify; return it. Each ``slot`` is 64 KiB of guest memory."""
        request = write_request(self.memory, REQUESTS + slot * 64 * KiB, type, sector, **parts)
        ring = self.driver.rings[queue]
        ring.add(request.buffers)
        ring.publish()
        self.driver.notify(queue)
        return request

    def wait_for_used(self, count=1, *, queue=0):
        """Return when the device has given back ``count`` requests more."""
        poll = select.poll()
        poll.register(self.mmio.interrupt.fd, select.POLLIN)
        used = self.driver.rings[queue].used()
        while len(used) < count:
            assert poll.poll(LIMIT * 1000), "no interrupt in time"
            os.eventfd_read(self.mmio.interrupt.fd)
            self.mmio.interrupt.acknowledge(self.mmio.interrupt.status)
            used += self.driver.rings[queue].used()
        return used

    def close(self):
        self.image.gate.set()
        self.mmio.close()
        self.blk.close()
        self.image.close()
        self.memory.close()
        assert self.errors == []

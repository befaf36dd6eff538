"""The block engine in C: ``engine=c``. Here is what is Python's in it; csrc/block.h has the rest.

::

    a worker's thread: CQueue.serve
        kvmpy_block_serve, without the GIL         ring --> requests --> extents --> ring --> interrupt
        <-- KVMPY_BLOCK_EXIT                       the extents do not cover a request: the image is asked,
                                                   the extents are changed, and C goes on with the request
        <-- KVMPY_BLOCK_IN_DEBT                    a rate limit: wait, and go on with the request

Two locks keep requests and changes apart. The image's lock: its methods are called by one thread at a time, and what
they say is put into the table before the next call. The disk's: C holds the read side while it executes a request, and
whoever changes the table holds the write side.

While `DiskImage.map` copies, other requests go on. It copies what is not writable, so nobody writes there, and who
reads it reads the old place, which keeps its bytes. `DiskImage.zero` gives room back that the image may use again
for other sectors at once, so it runs under the write side: no request that still uses the old place is left.

Floor: devices.
"""

import os
import select
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any, NamedTuple

from kvmpy._shim import ffi, lib
from kvmpy.devices.block import BlockCounters, BlockSettings
from kvmpy.devices.block_c_extents import DiskExtents
from kvmpy.devices.interrupt import Interrupt
from kvmpy.devices.virtqueue import Fault, QueueFault, QueueSetup, ring_fault
from kvmpy.errors import DiskError
from kvmpy.machine.memory import GuestMemory
from kvmpy.storage.disk import SECTOR_SIZE, DiskImage, SyncFailed

NANOSECONDS_IN_A_MILLISECOND = 10**6
LONGEST_POLL_MS = 60_000


COUNTERS = [name for name, _ in ffi.typeof("struct kvmpy_block_counters").fields]


class BlockCycles(NamedTuple):
    """Cycles of the time stamp counter since `CBlock.measure`, over all queues."""

    serving: int
    """From finding a chain to sleeping again; the other three are inside."""
    spinning: int
    """Looking for more before sleeping."""
    file: int
    """Finding extents and moving bytes: nearly all of it in system calls."""
    interrupt: int
    """Raising interrupts."""


class CBlock:
    """A `kvmpy.devices.block.BlockEngine`."""

    def __init__(self, memory: GuestMemory, image: DiskImage, settings: BlockSettings) -> None:
        self._memory = memory  # held: C has its addresses
        self._regions = memory.table
        self._image = image
        self._image_lock = Lock()
        self._lock = Lock()
        """Of the queues and their counters."""
        self._spin_ns = settings.spin_ns
        self._disk = ffi.new("struct kvmpy_disk *")
        lib.kvmpy_disk_init(self._disk)
        self._disk.readonly = image.readonly
        self._disk.writeback = True
        ffi.buffer(self._disk.serial)[:] = settings.serial.ljust(lib.VIRTIO_BLK_ID_BYTES, b"\0")
        self._disk.limits.requests.rate = settings.iops
        self._disk.limits.bytes.rate = settings.bps
        self._extents = DiskExtents(self._disk)
        self._queues: list[Any] = []
        self._closed = dict.fromkeys(COUNTERS, 0)
        self._load()

    def _load(self) -> None:
        """Take capacity and extents from the image anew; no request is being executed."""
        self._disk.capacity = self._image.size // SECTOR_SIZE
        self._disk.alignment = self._image.alignment
        self._extents.replace(self._image.table())

    def open_queue(self, setup: QueueSetup, interrupt: Interrupt, kick_fd: int) -> "CQueue":
        """Serve the rings of ``setup``, which `ring_fault` found sound; ``kick_fd`` is an eventfd.

        Raises:
            VirtqueueError: they are not sound: C would write where they are, whatever is there.
        """
        fault = ring_fault(self._memory, setup)
        if fault is not None:
            raise QueueFault(fault)
        queue = ffi.new("struct kvmpy_block_queue *")
        queue.disk, queue.spin_ns = self._disk, self._spin_ns
        queue.ring.memory = self._regions
        queue.ring.features, queue.ring.size = setup.features, setup.size
        queue.ring.descriptors = self._hva(setup.descriptor_area)
        queue.ring.driver = self._hva(setup.driver_area)
        queue.ring.device = self._hva(setup.device_area)
        queue.ring.avail_wrap = queue.ring.used_wrap = True
        with self._lock:
            self._queues.append(queue)
        return CQueue(self, queue, setup.size, interrupt, kick_fd)

    def forget(self, queue: Any) -> None:
        """Keep nothing of a queue that is served no more but what it has counted."""
        with self._lock:
            if queue in self._queues:
                self._queues.remove(queue)
                for name in COUNTERS:
                    self._closed[name] += getattr(queue.counters, name)

    def _hva(self, gpa: int) -> Any:
        return lib.kvmpy_translate(self._regions, gpa, 1)

    def set_writeback(self, writeback: bool) -> None:
        """Let a write complete before it is durable, or not; requests that begin after the return obey."""
        self._disk.writeback = writeback

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keep requests out while inside. At the end capacity and extents are read from the image anew."""
        with self._image_lock, self._no_requests():
            try:
                yield
            finally:
                self._load()

    @contextmanager
    def _no_requests(self) -> Iterator[None]:
        lib.kvmpy_disk_lock(self._disk)
        try:
            yield
        finally:
            lib.kvmpy_disk_unlock(self._disk)

    def counters(self) -> BlockCounters:
        """Return what was done so far."""
        return BlockCounters(*(self._sum(name) for name in BlockCounters._fields))

    def measure(self) -> None:
        """Add up cycles from now on."""
        self._disk.timed = True

    def cycles(self) -> BlockCycles:
        """Return the cycles that were added up so far."""
        return BlockCycles(*(self._sum(f"cycles_{name}") for name in BlockCycles._fields))

    def _sum(self, name: str) -> int:
        with self._lock:
            return int(self._closed[name] + sum(getattr(queue.counters, name) for queue in self._queues))

    def close(self) -> None:
        """Nothing of its own is left to free: the image's owner closes that. Twice is harmless."""

    # --- for its queues ---------------------------------------------------------------------------------------------

    def answer(self, exit: Any) -> None:
        """Do what a disk exit asks for, or tell C that it failed."""
        try:
            with self._image_lock:
                self._ask_image(exit)
            exit.answer = lib.KVMPY_DISK_DONE
        except (OSError, DiskError) as error:
            if isinstance(error, SyncFailed):
                self._disk.sync_failed = True
            exit.answer = lib.KVMPY_DISK_FAILED

    def _ask_image(self, exit: Any) -> None:
        sector, sectors = exit.sector, exit.sectors
        if sector + sectors > self._disk.capacity:
            raise DiskError(f"sectors {sector}+{sectors} are outside {self._disk.capacity}")
        if exit.operation == lib.KVMPY_DISK_ZERO:
            with self._no_requests():
                self._extents.splice(self._image.zero(sector, sectors))
            return
        write = exit.operation == lib.KVMPY_DISK_MAP_WRITE
        if not self._is_missing(sector, write):
            return  # another queue has asked for it meanwhile
        extents = self._image.map(sector, sectors, write=write)
        with self._no_requests():
            self._extents.splice(extents)
        if self._is_missing(sector, write):
            raise DiskError(f"the image does not map sector {sector}")

    def _is_missing(self, sector: int, write: bool) -> bool:
        return bool(lib.kvmpy_disk_missing(self._disk, sector, 1, write, ffi.new("uint64_t *")))


class CQueue:
    """One virtqueue being served: a `kvmpy.devices.block.BlockQueue`."""

    def __init__(self, engine: CBlock, queue: Any, size: int, interrupt: Interrupt, kick_fd: int) -> None:
        self._engine = engine
        self._queue = queue
        self._interrupt = interrupt  # held: C has its address
        self._segments = queue.chain.segments = ffi.new("struct iovec[]", size)
        queue.interrupt = interrupt.pointer
        self._stop_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        # Edge-triggered: each kick wakes, and nobody has to read the eventfd for the next one to do so.
        self._wait = select.epoll()
        self._wait.register(kick_fd, select.EPOLLIN | select.EPOLLET)
        self._wait.register(self._stop_fd, select.EPOLLIN)
        queue.wait_fd = self._wait.fileno()

    def process(self) -> Fault | None:
        """Serve all that is available now and return. A Fault broke the queue, for ever."""
        return self._serve(block=False)

    def serve(self) -> Fault | None:
        """As `process`, then wait for the kick eventfd, and again, until `stop`: then return None."""
        return self._serve(block=True)

    def _serve(self, *, block: bool) -> Fault | None:
        while True:
            match lib.kvmpy_block_serve(self._queue, block):
                case lib.KVMPY_BLOCK_EXIT:
                    self._engine.answer(self._queue.exit)
                case lib.KVMPY_BLOCK_IN_DEBT:
                    self._wait_for_tokens()
                case lib.KVMPY_BLOCK_BROKEN:
                    return Fault(self._queue.fault)
                case _:
                    return None

    def _wait_for_tokens(self) -> None:
        """Wait until they are there, or for `stop`; C looks which it was."""
        poll = select.poll()
        poll.register(self._stop_fd, select.POLLIN)
        poll.poll(min(self._queue.wait_ns / NANOSECONDS_IN_A_MILLISECOND, LONGEST_POLL_MS))

    def stop(self) -> None:
        """Make `serve` or `process` return soon, from any thread; the queue stays stopped until it is closed."""
        self._queue.stopped = True
        if self._stop_fd >= 0:
            os.eventfd_write(self._stop_fd, 1)

    def close(self) -> None:
        """Free what the queue holds; nobody serves it any more. Closing twice is harmless."""
        self._queue.stopped = True
        self._wait.close()
        if self._stop_fd >= 0:
            os.close(self._stop_fd)
            self._stop_fd = -1
        self._engine.forget(self._queue)

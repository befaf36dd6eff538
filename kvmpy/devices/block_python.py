"""The block engine in readable Python: ``engine=python``.

::

    PythonQueue, one thread each                                           PythonBlock, one for the disk
      kick eventfd --> ring: pop --> parse --> wait for the rate limit --> execute, one request at a time
      interrupt    <-- ring: push <-- status byte <------------------------ status

Parse, then act: a chain is copied and checked whole (`kvmpy.devices.virtqueue`), then understood
(`kvmpy.devices.block_request`), then executed (`kvmpy.devices.block_execute`), then given back. It is never half done,
and every chain taken off a ring comes back through it, unless the queue is stopped first.

Several queues may be served at once, but the extents and the image have one lock, and a request holds it from
beginning to end. The C engine does better; this one is the text to read and the oracle that C is compared with.

Source: virtio 1.2 §5.2.6. Floor: devices.
"""

import os
import select
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Lock

from kvmpy._shim import lib
from kvmpy.devices.block import BlockCounters, BlockSettings
from kvmpy.devices.block_execute import BlockExecutor, Result
from kvmpy.devices.block_request import BlockRequest, Command, Limits, Read, Write, Zero, parse, size_of
from kvmpy.devices.interrupt import Interrupt
from kvmpy.devices.token_bucket import RateLimit
from kvmpy.devices.virtqueue import Chain, Fault, QueueFault, QueueSetup, SplitQueue
from kvmpy.devices.virtqueue_packed import PackedQueue
from kvmpy.machine.memory import GuestMemory
from kvmpy.storage.disk import DiskImage

NANOSECONDS_IN_A_MILLISECOND = 10**6
LONGEST_POLL_MS = 60_000
"""A debt may take years to pay off; poll counts its milliseconds in 31 bits."""


class PythonBlock:
    """A `kvmpy.devices.block.BlockEngine`. Its descriptors are the image's: there is nothing of its own to free."""

    def __init__(self, memory: GuestMemory, image: DiskImage, settings: BlockSettings) -> None:
        self._memory = memory
        self._image = image
        self._lock = Lock()
        self._executor = BlockExecutor(memory, image, settings.serial)
        self._counters = BlockCounters(0, 0, 0, 0, 0, 0, 0)
        self._iops = RateLimit(settings.iops) if settings.iops else None
        self._bps = RateLimit(settings.bps) if settings.bps else None

    def open_queue(self, setup: QueueSetup, interrupt: Interrupt, kick_fd: int) -> "PythonQueue":
        """Serve the rings of ``setup``, which `ring_fault` found sound; ``kick_fd`` is an eventfd."""
        return PythonQueue(self, self._memory, setup, interrupt, kick_fd)

    def set_writeback(self, writeback: bool) -> None:
        """Let a write complete before it is durable, or not; requests that begin after the return obey."""
        self._executor.writeback = writeback

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keep requests out while inside. At the end capacity and extents are read from the image anew."""
        with self._lock:
            try:
                yield
            finally:
                self._executor.reload()

    def counters(self) -> BlockCounters:
        """Return what was done so far."""
        return self._counters

    def close(self) -> None:
        """Free what the engine holds; its queues are closed before. The image stays open. Twice is harmless."""

    # --- for its queues ---------------------------------------------------------------------------------------------

    def limits(self, features: int) -> Limits:
        """Return what a request may ask for now, of a driver that has negotiated ``features``."""
        return Limits(self._executor.capacity, self._image.readonly, features)

    def tolls(self, command: Command) -> list[tuple[RateLimit, int]]:
        """Return the rate limits that ``command`` has to pass, each with its price."""
        match command:
            case Read(_, data) | Write(_, data):
                tolls = [(self._iops, 1), (self._bps, size_of(data))]
            case Zero():
                tolls = [(self._iops, 1)]
            case _:
                return []
        return [(limit, price) for limit, price in tolls if limit is not None and price]

    def execute(self, request: BlockRequest) -> Result:
        """Execute ``request`` when no other one is being executed, and count it."""
        with self._lock:
            result = self._executor.execute(request.command)
            self._counters = _counted(self._counters, request, result)
            return result


def _counted(counters: BlockCounters, request: BlockRequest, result: Result) -> BlockCounters:
    """Return ``counters`` with one more completed request."""
    counters = counters._replace(errors=counters.errors + (result.status != lib.VIRTIO_BLK_S_OK))
    match request.type:
        case lib.VIRTIO_BLK_T_IN:
            return counters._replace(reads=counters.reads + 1, bytes_read=counters.bytes_read + result.data_written)
        case lib.VIRTIO_BLK_T_OUT:
            return counters._replace(
                writes=counters.writes + 1, bytes_written=counters.bytes_written + result.data_read
            )
        case lib.VIRTIO_BLK_T_FLUSH:
            return counters._replace(flushes=counters.flushes + 1)
        case _:
            return counters._replace(others=counters.others + 1)


class PythonQueue:
    """One virtqueue being served: a `kvmpy.devices.block.BlockQueue`."""

    def __init__(
        self, block: PythonBlock, memory: GuestMemory, setup: QueueSetup, interrupt: Interrupt, kick_fd: int
    ) -> None:
        self._block = block
        self._memory = memory
        self._features = setup.features
        self._ring = (PackedQueue if setup.has(lib.VIRTIO_F_RING_PACKED) else SplitQueue)(memory, setup)
        self._interrupt = interrupt
        self._kick_fd = kick_fd
        self._stop_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._stopped = False
        self._fault: Fault | None = None

    def serve(self) -> Fault | None:
        """As `process`, then wait for the kick eventfd, and again, until `stop`: then return None."""
        poll = select.poll()
        poll.register(self._kick_fd, select.POLLIN)
        poll.register(self._stop_fd, select.POLLIN)
        while (fault := self.process()) is None and not self._stopped:
            ready = dict(poll.poll())
            if self._kick_fd in ready:
                # Before the ring is looked at: a kick that comes later is seen by the next poll.
                with suppress(BlockingIOError):
                    os.eventfd_read(self._kick_fd)
        return fault

    def process(self) -> Fault | None:
        """Serve all that is available now and return. A Fault broke the queue, for ever."""
        try:
            while self._fault is None and not self._stopped:
                if self._ring.available():
                    self._ring.disable_notifications()
                    self._serve_available()
                    if self._stopped:
                        break
                self._ring.enable_notifications()
                # The driver may have looked at the ring just before and not notified: look again.
                if not self._ring.available():
                    break
        except QueueFault as error:
            self._fault = error.fault
        return self._fault

    def _serve_available(self) -> None:
        try:
            while not self._stopped and (chain := self._ring.pop()) is not None:
                self._serve_chain(chain)
        finally:
            self._interrupt_driver()

    def _serve_chain(self, chain: Chain) -> None:
        request = parse(self._memory, chain, self._block.limits(self._features))
        if request is None:
            self._ring.push(chain, 0)
        elif self._pay(request.command):
            result = self._block.execute(request)
            self._memory.write(request.status_gpa, bytes([result.status]))
            self._ring.push(chain, result.data_written + 1)

    def _interrupt_driver(self) -> None:
        if self._ring.wants_interrupt():
            self._interrupt.raise_(lib.VIRTIO_MMIO_INT_VRING)

    def _pay(self, command: Command) -> bool:
        """Wait until the rate limits let ``command`` pass; return False when the queue was stopped before."""
        for limit, price in self._block.tolls(command):
            while wait_ns := limit.take(price):
                self._interrupt_driver()  # for what is done: it shall not wait too
                if self._wait_for_stop(wait_ns):
                    return False
        return True

    def _wait_for_stop(self, timeout_ns: int) -> bool:
        poll = select.poll()
        poll.register(self._stop_fd, select.POLLIN)
        return bool(poll.poll(min(timeout_ns / NANOSECONDS_IN_A_MILLISECOND, LONGEST_POLL_MS)))

    def stop(self) -> None:
        """Make `serve` or `process` return soon, from any thread; the queue stays stopped until it is closed."""
        self._stopped = True
        os.eventfd_write(self._stop_fd, 1)

    def close(self) -> None:
        """Free what the queue holds; nobody serves it any more. Closing twice is harmless."""
        if self._stop_fd >= 0:
            os.close(self._stop_fd)
            self._stop_fd = -1

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

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

from kvmpy._shim import lib
from kvmpy.devices.block import BlockCounters, BlockSettings
from kvmpy.devices.block_execute import BlockExecutor, Result
from kvmpy.devices.block_request import BlockRequest, Command, Limits, Read, Write, Zero, parse, size_of
from kvmpy.devices.interrupt import Interrupt
from kvmpy.devices.python_queue import PythonQueue
from kvmpy.devices.token_bucket import RateLimit
from kvmpy.devices.virtqueue import Chain, QueueSetup
from kvmpy.machine.memory import GuestMemory
from kvmpy.storage.disk import DiskImage


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

    def open_queue(self, setup: QueueSetup, interrupt: Interrupt, kick_fd: int) -> PythonQueue:
        """Serve the rings of ``setup``, which `ring_fault` found sound; ``kick_fd`` is an eventfd."""
        requests = _Requests(self, self._memory, setup.features)
        return PythonQueue(self._memory, setup, interrupt, kick_fd, requests.execute)

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


class _Requests:
    """The chains of one queue, as requests of a driver that has negotiated ``features``."""

    def __init__(self, block: PythonBlock, memory: GuestMemory, features: int) -> None:
        self._block = block
        self._memory = memory
        self._features = features

    def execute(self, chain: Chain, queue: PythonQueue) -> int | None:
        """Execute one request; return how many bytes were written, with its status, or None: stopped before."""
        request = parse(self._memory, chain, self._block.limits(self._features))
        if request is None:
            return 0
        if not self._pay(request.command, queue):
            return None
        result = self._block.execute(request)
        self._memory.write(request.status_gpa, bytes([result.status]))
        return result.data_written + 1

    def _pay(self, command: Command, queue: PythonQueue) -> bool:
        """Wait until the rate limits let ``command`` pass; return False when the queue was stopped before."""
        for limit, price in self._block.tolls(command):
            while wait_ns := limit.take(price):
                if not queue.wait(timeout_ns=wait_ns):
                    return False
        return True

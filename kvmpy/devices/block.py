"""What a block engine is to the virtio-blk device: it opens queues on a disk image, and each queue serves a ring.

::

    VirtioBlk -- makes --> BlockEngine(memory, image, settings)
                               |  open_queue(setup, interrupt, kick_fd)
    a worker's thread ---> BlockQueue.serve()        ring --> requests --> extents --> ring --> interrupt

There are two engines that do the same, byte for byte: C, and its readable twin. Only types here.

Source: virtio 1.2 §5.2.6 (device operation).
"""

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from kvmpy.devices.interrupt import Interrupt
    from kvmpy.devices.virtqueue import Fault, QueueSetup
    from kvmpy.machine.memory import GuestMemory
    from kvmpy.storage.disk import DiskImage


class BlockSettings(NamedTuple):
    """What the owner of a disk wants of its engine."""

    serial: bytes = b""
    """What GET_ID answers: at most 20 bytes."""
    iops: int = 0
    """Requests in a second; 0: unlimited."""
    bps: int = 0
    """Bytes of data in a second; 0: unlimited."""
    spin_ns: int = 0
    """How long a worker of the C engine looks for more before it sleeps."""


class BlockCounters(NamedTuple):
    """Completed requests since the engine was made, over all its queues; those that were not S_OK are errors too."""

    reads: int
    writes: int
    flushes: int
    others: int
    errors: int
    bytes_read: int
    bytes_written: int


class BlockQueue(Protocol):
    """One virtqueue being served, by one thread at a time."""

    def process(self) -> "Fault | None":
        """Serve all that is available now and return. A Fault broke the queue, for ever."""

    def serve(self) -> "Fault | None":
        """As `process`, then wait for the kick eventfd, and again, until `stop`: then return None."""

    def stop(self) -> None:
        """Make `serve` or `process` return soon, from any thread; the queue stays stopped until it is closed."""

    def close(self) -> None:
        """Free what the queue holds; nobody serves it any more. Closing twice is harmless."""


class BlockEngine(Protocol):
    """Executes block requests on the extents of one disk image. Made by a `MakeEngine`; its methods: any thread."""

    def open_queue(self, setup: "QueueSetup", interrupt: "Interrupt", kick_fd: int) -> BlockQueue:
        """Serve the rings of ``setup``, which `ring_fault` found sound; ``kick_fd`` is an eventfd."""

    def set_writeback(self, writeback: bool) -> None:
        """Let a write complete before it is durable, or not; requests that begin after the return obey."""

    def exclusive(self) -> AbstractContextManager[None]:
        """Keep requests out while inside. At the end capacity and extents are read from the image anew."""

    def counters(self) -> BlockCounters:
        """Return what was done so far."""

    def close(self) -> None:
        """Free what the engine holds; its queues are closed before. The image stays open. Twice is harmless."""


class MakeEngine(Protocol):
    """An engine's class, or any function that makes one."""

    def __call__(self, memory: "GuestMemory", image: "DiskImage", settings: BlockSettings) -> BlockEngine: ...

"""The virtio block device: which features it offers, how it caches, and an engine that does the work.

::

    VirtioMmio -- negotiate, open_queue --> VirtioBlk -- open_queue, set_writeback --> BlockEngine --> DiskImage
               <-- on_config_change ------      |
                                             BlkConfig: capacity, writeback, ...

The cache has two modes (§5.2.6.2). Writeback: a write may complete before it is durable, and FLUSH makes it so;
writethrough: each completed write is durable. A driver that did not negotiate FLUSH could never ask, so it gets
writethrough. With CONFIG_WCE it may choose; a device whose owner has promised writethrough does not offer that.

Not here: the transport, the rings, and how a request is executed.

Source: virtio 1.2 §5.2.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import TYPE_CHECKING

from kvmpy._shim import lib
from kvmpy.devices.block import BlockCounters, BlockQueue, BlockSettings, MakeEngine
from kvmpy.devices.virtio_blk_config import BlkConfig
from kvmpy.devices.virtio_device import RING_FEATURES, Identity, feature_bits
from kvmpy.storage.disk import DiskImage

if TYPE_CHECKING:
    from kvmpy.devices.interrupt import Interrupt
    from kvmpy.devices.virtqueue import QueueSetup
    from kvmpy.machine.memory import GuestMemory

QUEUES_MAX = 64

ALWAYS_OFFERED = RING_FEATURES | feature_bits(
    lib.VIRTIO_BLK_F_SEG_MAX,
    lib.VIRTIO_BLK_F_BLK_SIZE,
    lib.VIRTIO_BLK_F_TOPOLOGY,
    lib.VIRTIO_BLK_F_FLUSH,
    lib.VIRTIO_BLK_F_MQ,
)


class Cache(StrEnum):
    """What the owner of a disk promises its guest."""

    WRITEBACK = "writeback"
    """A write is durable when it was flushed; until then it is in the host's page cache."""
    WRITETHROUGH = "writethrough"
    """Each completed write is durable."""
    DIRECT = "direct"
    """As writeback, past the host's page cache: the image was opened so."""


def offered_features(*, readonly: bool, cache: Cache) -> int:
    """Return the features of such a disk, as 64 bits."""
    offered = ALWAYS_OFFERED
    if cache is not Cache.WRITETHROUGH:
        offered |= feature_bits(lib.VIRTIO_BLK_F_CONFIG_WCE)
    if readonly:
        return offered | feature_bits(lib.VIRTIO_BLK_F_RO)
    return offered | feature_bits(lib.VIRTIO_BLK_F_DISCARD, lib.VIRTIO_BLK_F_WRITE_ZEROES)


class VirtioBlk:
    """A disk. Close it after its transport; it closes its engine, and leaves ``image`` to who opened it.

    Raises:
        ValueError: the serial number is longer than 20 bytes, or there are no queues, or too many.
    """

    def __init__(
        self,
        memory: "GuestMemory",
        image: DiskImage,
        *,
        make_engine: MakeEngine,
        cache: Cache = Cache.WRITEBACK,
        queues: int = 1,
        settings: BlockSettings = BlockSettings(),  # noqa: B008 -- a tuple: nobody can change it
    ) -> None:
        if len(settings.serial) > lib.VIRTIO_BLK_ID_BYTES:
            raise ValueError(f"serial number {settings.serial!r}: at most {lib.VIRTIO_BLK_ID_BYTES} bytes are allowed")
        if not 1 <= queues <= QUEUES_MAX:
            raise ValueError(f"{queues} queues: 1 to {QUEUES_MAX} are allowed")
        self.identity = Identity(lib.VIRTIO_ID_BLOCK, offered_features(readonly=image.readonly, cache=cache), queues)
        self.config = BlkConfig(image, queues=queues, on_writeback=self._switch_cache)
        self.on_config_change: Callable[[], None] = _nobody
        self._cache = cache
        self._engine = make_engine(memory, image, settings)
        self._features = 0
        self.negotiate(0)

    # --- what the transport calls ---

    def negotiate(self, features: int) -> None:
        """Take the driver's features, or 0 after a reset; the cache is then in the mode that they begin with."""
        self._features = features
        self._set_writeback(self._cache is not Cache.WRITETHROUGH and (not features or self._can_flush))

    def open_queue(self, setup: "QueueSetup", interrupt: "Interrupt", kick_fd: int) -> BlockQueue:
        """Return a queue of the engine."""
        return self._engine.open_queue(setup, interrupt, kick_fd)

    # --- the cache ---

    @property
    def _can_flush(self) -> bool:
        return bool(self._features >> lib.VIRTIO_BLK_F_FLUSH & 1)

    def _switch_cache(self, writeback: bool) -> None:
        """Take the driver's wish, where it has negotiated to have one, and could flush what it then must."""
        if self._features >> lib.VIRTIO_BLK_F_CONFIG_WCE & 1 and (self._can_flush or not writeback):
            self._set_writeback(writeback)

    def _set_writeback(self, writeback: bool) -> None:
        self._engine.set_writeback(writeback)
        self.config.writeback = writeback

    # --- what the owner calls ---

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keep requests out while inside, for what changes the image: a snapshot, another size.

        At the end the extents are read anew, and a new capacity is shown to the driver, with an interrupt.
        """
        try:
            with self._engine.exclusive():
                yield
        finally:
            if self.config.refresh():
                self.on_config_change()

    def counters(self) -> BlockCounters:
        """Return what was done since the device was made."""
        return self._engine.counters()

    def close(self) -> None:
        """Close the engine. Closing twice is harmless."""
        self._engine.close()


def _nobody() -> None:
    """Nobody hears of changes until there is a transport."""

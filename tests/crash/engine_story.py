"""What a guest does to a disk through the rings of its device, with either engine: shared by the program and its judge.

Run as ``engine_story.py FOLDER`` it drives a device on an image in ``FOLDER/NAME`` for each of SETUPS, one after the
other. Marks: ``begin NAME``, ``ready`` (what the image held before is durable), ``open``; for each request ``submit I``
when the driver shows it to the device and ``done I`` when the driver has it back; and ``map SECTOR SECTORS`` and
``zero SECTOR SECTORS`` when the image has returned from that.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from kvmpy._shim import lib
from kvmpy.conformance.driver import SEGMENT, BlockDriver, write_request
from kvmpy.devices.block_c import CBlock
from kvmpy.devices.block_python import PythonBlock
from kvmpy.devices.queue_worker import InlineWorker
from kvmpy.devices.virtio_blk import Cache, VirtioBlk
from kvmpy.devices.virtio_device import feature_bits
from kvmpy.devices.virtio_mmio import VirtioMmio
from kvmpy.machine.memory import GuestMemory
from kvmpy.storage.blob import PageBlob
from kvmpy.storage.convert import create
from kvmpy.storage.disk import SECTOR_SIZE, DiskImage, Extent
from kvmpy.storage.open import open_disk
from kvmpy.storage.vhd import FOOTER_SIZE, bitmap_size
from kvmpy.units import KiB, MiB

ENGINES = {"c": CBlock, "python": PythonBlock}
IMAGE = "disk"
CHUNKS = 6
REQUESTS_AT, ROOM = 0x8_0000, 0x8000
"""Where requests are built in guest memory, and how far from each other."""
FEATURES = feature_bits(
    lib.VIRTIO_F_VERSION_1, lib.VIRTIO_BLK_F_FLUSH, lib.VIRTIO_BLK_F_DISCARD, lib.VIRTIO_BLK_F_WRITE_ZEROES
)


class Setup(NamedTuple):
    """Which engine on which kind of image, in which mode of the cache."""

    image: str
    engine: str
    cache: Cache

    @property
    def name(self) -> str:
        return f"{self.image}-{self.engine}-{self.cache}"

    @property
    def chunk(self) -> int:
        """Sectors of what the image allocates, or copies, at once."""
        return 2 * MiB // SECTOR_SIZE if self.image == "vhd" else 64 * KiB // SECTOR_SIZE

    @property
    def format(self) -> str:
        return {"vhd": "vhd-dynamic"}.get(self.image, self.image)

    @property
    def size(self) -> int:
        return CHUNKS * self.chunk * SECTOR_SIZE

    def initial(self) -> dict[int, int]:
        """Return the tag of each sector that holds something before the guest comes."""
        chunks = {"blob": (0, 1, 4), "raw": (0, 1, 4, 5), "vhd": (1, 4)}[self.image]  # others take no room
        tags = {chunk * self.chunk + sector: INITIAL for chunk in chunks for sector in range(16)}
        if self.image == "vhd":
            tags |= {self.chunk + sector: ZEROS for sector in HIDDEN}
        return tags


SETUPS = tuple(
    Setup(image, engine, cache)
    for image in ("blob", "raw", "vhd")
    for engine in ENGINES
    for cache in (Cache.WRITEBACK, Cache.WRITETHROUGH)
)
INITIAL, ZEROS = 99, 0
"""Tags: what each sector holds that a guest has not written; what reads as zeros."""
HIDDEN = range(8, 12)
"""Sectors of the VHD's chunk 1 whose bits are 0: they read as zeros, and other bytes lie there."""


class Request(NamedTuple):
    """One request; its sectors begin ``at`` sectors behind (or before) the beginning of ``chunk``."""

    what: str
    chunk: int = 0
    at: int = 0
    sectors: int = 0
    tag: int = ZEROS

    def range(self, setup: Setup) -> range:
        """Return its sectors."""
        start = self.chunk * setup.chunk + self.at
        return range(start, start + self.sectors)


BATCHES = (
    (Request("write", 0, 3, 2, 1),),
    (Request("flush"),),
    (Request("write", 0, 4, 1, 2), Request("write", 1, -1, 10, 3)),
    (Request("flush"),),
    (Request("discard", 1, 4, 3),),
    (Request("zero", 0, 3, 1),),
    (Request("write", 0, 6, 1, 4), Request("flush")),
    (Request("write", 3, -1, 2, 5),),
    (Request("flush"),),
    (Request("shared discard", 4, 0, 8),),
    (Request("discard", 5, 0, 8),),
    (Request("flush"),),
    (Request("write", 1, 10, 1, 6),),
    (Request("snapshot"),),
    (Request("write", 1, 11, 1, 7),),
    (Request("write", 0, 0, 1, 8), Request("write", 4, -2, 4, 9)),
    (Request("flush"),),
    (Request("unmap", 4, 0, 2),),
    (Request("image zero", 4, 12, 2),),
    (Request("write", 4, 6, 1, 10),),
    (Request("close"),),
)
"""Requests that the driver shows together, and has back before it shows the next."""
REQUESTS = tuple(request for batch in BATCHES for request in batch)
PROMISES = ("flush", "snapshot", "close")
"""What was completed before one of these was submitted is durable when it is done."""
BY_HOST = ("snapshot", "image zero", "close")
"""What the host does, beside the engine."""


def pattern(tag: int, sector: int) -> bytes:
    """Return what a sector holds that was written with ``tag``."""
    return (tag << 32 | sector).to_bytes(8, "little") * (SECTOR_SIZE // 8) if tag else bytes(SECTOR_SIZE)


# --- what was there before ----------------------------------------------------------------------------------------


def prepare(setup: Setup, folder: str) -> str:
    """Make the image, all of it durable, and return its path."""
    os.mkdir(folder)
    path = os.path.join(folder, IMAGE)
    create(path, setup.size, format=setup.format)
    with open_disk(path, format=setup.format) as image:
        for sector, tag in setup.initial().items():
            (extent,) = (e for e in image.map(sector, 1, write=True) if e.sector <= sector < e.end)
            os.pwrite(extent.fd, pattern(tag, sector), extent.offset + (sector - extent.sector) * SECTOR_SIZE)
        if isinstance(image, PageBlob):
            image.snapshot()
    if setup.image == "vhd":
        _leave_as_other_programs_do(path)
    _make_durable(os.path.dirname(folder))
    return path


def _leave_as_other_programs_do(path: str) -> None:
    """Clear a few bits of chunk 1, and lose the footer at the end."""
    with open(path, "rb+", buffering=0) as file:
        table = os.pread(file.fileno(), 8, 1536)
        bitmap = int.from_bytes(table[4:], "big") * SECTOR_SIZE
        data = bitmap + bitmap_size(2 * MiB)
        os.pwrite(file.fileno(), b"\xff\x0f", bitmap)
        for sector in HIDDEN:
            os.pwrite(file.fileno(), b"what was deleted long ago".ljust(512, b"!"), data + sector * SECTOR_SIZE)
        os.pwrite(file.fileno(), b"\xa5" * FOOTER_SIZE, os.fstat(file.fileno()).st_size - FOOTER_SIZE)


def _make_durable(folder: str) -> None:
    for parent, _, names in os.walk(folder):
        for path in (parent, *(os.path.join(parent, name) for name in names)):
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)


# --- the guest ----------------------------------------------------------------------------------------------------


class Watched:
    """An image that marks when it has kept a promise of `DiskImage`; the engine sees no difference."""

    def __init__(self, image: DiskImage) -> None:
        self.image = image
        self.size, self.readonly, self.alignment = image.size, image.readonly, image.alignment
        self.table, self.close = image.table, image.close

    def map(self, sector: int, sectors: int, *, write: bool) -> Sequence[Extent]:
        extents = self.image.map(sector, sectors, write=write)
        if write:
            mark(f"map {sector} {sectors}")
        return extents

    def zero(self, sector: int, sectors: int) -> Sequence[Extent]:
        extents = self.image.zero(sector, sectors)
        mark(f"zero {sector} {sectors}")
        return extents


class Guest:
    """A driver and its device, with two queues, on ``image``."""

    def __init__(self, setup: Setup, image: DiskImage) -> None:
        self._setup = setup
        self._image = Watched(image)
        self._memory = GuestMemory(2 * MiB)
        self._errors: list[BaseException] = []
        self._blk = VirtioBlk(self._memory, self._image, make_engine=ENGINES[setup.engine], cache=setup.cache, queues=2)
        self._mmio = VirtioMmio(
            self._blk, self._memory, name="disk0", on_error=self._errors.append, make_worker=InlineWorker
        )
        self._driver = BlockDriver(self._memory, self._mmio)
        self._driver.start(FEATURES, queues=2)

    def take(self, requests: Sequence[tuple[int, Request]], queue: int) -> None:
        """Have all the numbered requests done by way of ``queue``."""
        if requests[0][1].what in BY_HOST:
            self._take_as_host(*requests[0])
            return
        ring = self._driver.rings[queue]
        heads = {}
        for i, request in requests:
            built = write_request(self._memory, REQUESTS_AT + i * ROOM, *self._type(request), **self._parts(request))
            heads[ring.add(built.buffers)] = i, built.status
        for i, _ in requests:
            mark(f"submit {i}")
        ring.publish()
        self._driver.notify(queue)
        for used in ring.used():
            i, status = heads.pop(used.head)
            assert self._memory.read(status, 1) == bytes([lib.VIRTIO_BLK_S_OK]), REQUESTS[i]
            mark(f"done {i}")
        assert not heads, self._errors

    def _take_as_host(self, i: int, request: Request) -> None:
        mark(f"submit {i}")
        match request.what:
            case "close":
                self._close()
            case "image zero":
                with self._blk.exclusive():
                    self._image.zero(request.range(self._setup).start, request.sectors)
            case "snapshot" if isinstance(self._image.image, PageBlob):
                with self._blk.exclusive():
                    self._image.image.snapshot()
            case "snapshot":
                return
        mark(f"done {i}")

    def _close(self) -> None:
        self._mmio.close()
        self._blk.close()
        self._image.close()
        self._memory.close()
        assert not self._errors

    def _type(self, request: Request) -> tuple[int, int]:
        type = {
            "write": lib.VIRTIO_BLK_T_OUT,
            "flush": lib.VIRTIO_BLK_T_FLUSH,
            "discard": lib.VIRTIO_BLK_T_DISCARD,
            "shared discard": lib.VIRTIO_BLK_T_DISCARD,
        }.get(request.what, lib.VIRTIO_BLK_T_WRITE_ZEROES)
        return type, request.range(self._setup).start if request.what == "write" else 0

    def _parts(self, request: Request) -> dict[str, Any]:
        sectors = request.range(self._setup)
        match request.what:
            case "flush":
                return {}
            case "write":
                return {"data_out": b"".join(pattern(request.tag, sector) for sector in sectors)}
        unmap = lib.VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP if request.what == "unmap" else 0
        return {"data_out": SEGMENT.pack(sectors.start, len(sectors), unmap)}


def numbered_batches(cache: Cache) -> Iterator[list[tuple[int, Request]]]:
    """Yield BATCHES with the numbers that their requests have in REQUESTS.

    With writethrough each is alone, since each makes a promise, and the driver is to see when.
    """
    numbers = iter(range(len(REQUESTS)))
    for batch in BATCHES:
        numbered = [(next(numbers), request) for request in batch]
        if cache is Cache.WRITETHROUGH:
            yield from ([one] for one in numbered)
        else:
            yield numbered


def main(folder: str) -> None:
    tell_sites()
    for setup in SETUPS:
        mark(f"begin {setup.name}")
        path = prepare(setup, os.path.join(folder, setup.name))
        mark("ready")
        guest = Guest(setup, open_disk(path, format=setup.format))
        mark("open")
        for turn, batch in enumerate(numbered_batches(setup.cache)):
            guest.take(batch, turn % 2)


if __name__ == "__main__":
    from sites import mark, tell_sites

    main(*sys.argv[1:])

"""Cases 58 to 60: limits, and a host that fails."""

import errno
from functools import partial

from kvmpy._shim import lib
from kvmpy.conformance.bench import DATA, Bench
from kvmpy.conformance.case import IOERR, OK, Variant
from kvmpy.conformance.driver import NO_STATUS
from kvmpy.conformance.image import CHUNK, State
from kvmpy.conformance.layout import AVAIL, PACKED, USED, WRITE, Descriptor
from kvmpy.conformance.packed_ring import PackedRing
from kvmpy.conformance.world import CHUNKS, HIDDEN_SECTOR, SECTORS, World
from kvmpy.devices.block import BlockSettings
from kvmpy.errors import DiskError
from kvmpy.storage.disk import SECTOR_SIZE
from kvmpy.units import KiB

FULL_SECTOR = 2 * CHUNK
STORM = 100_000


def limited(bench: Bench, sectors: int, pieces: int) -> None:
    """Read more than the bucket holds, in so many pieces, twice: the second time it has to wait."""
    size = sectors * SECTOR_SIZE // pieces
    for _ in range(2):
        bench.send(bench.read(0, sectors, writable=(size,) * pieces + (1,)))


def fails_and_recovers(bench: Bench, error: Exception, *, write: bool) -> None:
    """Let the image fail once: the next request is served."""
    bench.image.failing = error
    bench.send(bench.write(HIDDEN_SECTOR) if write else bench.read(HIDDEN_SECTOR))
    bench.image.failing = None
    bench.driver.read(HIDDEN_SECTOR)


def truncated(bench: Bench) -> None:
    """Cut the files under the device: what is gone is an I/O error, what is left is served."""
    cut = bench.image.truncate(4)
    buffers = bench.read(2, 4)
    bench.allow(buffers[1].gpa, buffers[1].size)  # a transfer that ends early has moved some
    bench.send(buffers)
    bench.send(bench.read(8))
    bench.expect(bench.driver.read(3) == bench.model.sector(3), "what is left of the file cannot be read")
    bench.image.restore(cut)


def host_is_full(bench: Bench) -> None:
    """Write where the host has no room; elsewhere it has."""
    bench.send(bench.write(FULL_SECTOR))
    bench.expect(bench.driver.write(0, bench.model.sector(0)), "another sector can no longer be written")


def sync_fails(bench: Bench) -> None:
    """Let a flush fail: those that follow must fail as well, for what the kernel dropped is lost (fsync(2))."""
    bench.send(bench.request(lib.VIRTIO_BLK_T_FLUSH).buffers)
    bench.send(bench.request(lib.VIRTIO_BLK_T_FLUSH).buffers)


def storm_of_bad_requests(bench: Bench) -> None:
    """Send 100,000 requests without a header, a ring full at a time; nothing of it may fill the log."""
    size = bench.ring.size
    bench.allow(DATA, size)
    refused = bytes([lib.VIRTIO_BLK_S_IOERR]) * size
    for start in range(0, STORM, size):
        bench.memory.fill(DATA, size, NO_STATUS)
        fill_ring(bench, start // size)
        bench.driver.notify()
        if bench.memory.read(DATA, size) != refused:
            bench.expect(False, f"of the requests from {start} on one was not refused")
            return
    bench.answers.append(lib.VIRTIO_BLK_S_IOERR)


def fill_ring(bench: Bench, times: int) -> None:
    """Publish as many requests as the ring has descriptors, each of a status and nothing else; again and again."""
    ring, size = bench.ring, bench.ring.size
    if isinstance(ring, PackedRing):
        flags = WRITE | (USED if times % 2 else AVAIL)
        descriptors = (PACKED.pack(DATA + slot, 1, slot, flags) for slot in range(size))
        bench.memory.write(ring.setup.descriptor_area, b"".join(descriptors))
        return
    if not times:
        for slot in range(size):
            ring.set_descriptor(slot, Descriptor(DATA + slot, 1, WRITE))
            ring.set_avail(slot, slot)
    ring.avail_idx = (ring.avail_idx + size) % 2**16


def full_at(*chunks: int) -> World:
    """Return a world where the host has no room for some chunks."""
    return World(chunks=tuple(State.FULL if at in chunks else state for at, state in enumerate(CHUNKS)))


V = Variant
SLOW = World(size=256, settings=BlockSettings(bps=1024 * KiB))
LIMITS = (
    V("128 segments", OK, partial(limited, sectors=SECTORS, pieces=128), SLOW),
    V("larger than the bucket", OK, partial(limited, sectors=SECTORS, pieces=1), SLOW),
    V("iops", OK, partial(limited, sectors=1, pieces=1), World(settings=BlockSettings(iops=100))),
)
FAILURES = (
    *(
        V(f"{name} of a {kind}", IOERR, partial(fails_and_recovers, error=error, write=kind == "write"))
        for name, error in (
            ("ENOSPC", OSError(errno.ENOSPC, "no room")),
            ("EIO", OSError(errno.EIO, "failed")),
            ("damage", DiskError("damaged")),
        )
        for kind in ("read", "write")
    ),
    V("truncated", IOERR, truncated),
    V("full", IOERR, host_is_full, full_at(2)),
    V("sync fails", IOERR, sync_fails, full_at(2)),
)
STORMS = (V("no header", IOERR, storm_of_bad_requests, World(size=256)),)

"""Case 57: DISCARD and WRITE_ZEROES, which name sectors in their data. All segments are checked before any is done."""

from functools import partial

from kvmpy._shim import lib
from kvmpy.conformance.bench import Bench
from kvmpy.conformance.case import IOERR, OK, UNSUPP, Variant
from kvmpy.conformance.driver import SEGMENT
from kvmpy.conformance.world import DISCARD, EVENT_IDX, HIDDEN_SECTOR, SECTORS, SHARED_SECTOR, WRITE_ZEROES, World

TYPES = (("discard", lib.VIRTIO_BLK_T_DISCARD), ("zeroes", lib.VIRTIO_BLK_T_WRITE_ZEROES))
UNMAP = lib.VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP
MAX_SECTORS = 1 << 22
"""max_discard_sectors, and max_write_zeroes_sectors."""
MAX_SEGMENTS = 16

Segment = tuple[int, int, int]


def zero(bench: Bench, type: int, segments: tuple[Segment, ...]) -> None:
    """Send segments of (sector, num_sectors, flags)."""
    zero_bytes(bench, type, b"".join(SEGMENT.pack(*segment) for segment in segments))


def zero_bytes(bench: Bench, type: int, data: bytes, *, data_in: int = 0) -> None:
    """Send whatever bytes."""
    bench.send(bench.request(type, data_out=data, data_in=data_in).buffers)


def zero_between(bench: Bench, type: int) -> None:
    """Zero sectors between a write and a read of them, all at once: the read gets zeros."""
    bench.add(bench.write(8, 2))
    bench.add(bench.request(type, data_out=SEGMENT.pack(8, 2, 0)).buffers)
    bench.add(bench.read(8, 2))
    bench.kick()


V = Variant


def variants(name: str, type: int) -> tuple[Variant, ...]:
    """Return what goes for both types."""

    def of(what: str, answer: str, *segments: Segment) -> Variant:
        return V(f"{name} {what}", answer, partial(zero, type=type, segments=segments))

    return (
        V(f"{name} 17 bytes", IOERR, partial(zero_bytes, type=type, data=bytes(17))),
        V(f"{name} 8 bytes", IOERR, partial(zero_bytes, type=type, data=bytes(8))),
        V(f"{name} writable data", IOERR, partial(zero_bytes, type=type, data=bytes(16), data_in=16)),
        V(f"{name} not negotiated", UNSUPP, partial(zero_bytes, type=type, data=bytes(16)), WITHOUT),
        V(f"{name} behind a write", OK, partial(zero_between, type=type)),
        of("nothing", IOERR),
        of("16 segments", OK, *((2 * i, 1, 0) for i in range(MAX_SEGMENTS))),
        of("17 segments", IOERR, *((2 * i, 1, 0) for i in range(MAX_SEGMENTS + 1))),
        of("no sectors", OK, (5, 0, 0)),
        of("no sectors at the end", OK, (SECTORS, 0, 0)),
        of("at the end", IOERR, (SECTORS, 1, 0)),
        of("past the end", IOERR, (0, 4, 0), (SECTORS - 1, 2, 0)),
        of("2^64-1", IOERR, (2**64 - 1, 2, 0)),
        of("too many sectors", IOERR, (0, MAX_SECTORS + 1, 0)),
        of("2^32-1 sectors", IOERR, (1, 2**32 - 1, 0)),
        of("unknown flag", UNSUPP, (0, 4, 0), (8, 1, 2)),
        of("flag 31", UNSUPP, (0, 1, 1 << 31)),
        of("odd sectors", OK, (1, 3, 0), (9, 6, 0)),
        of("every kind", OK, (SHARED_SECTOR - 3, 20, 0), (HIDDEN_SECTOR + 5, 6, 0)),
        of("all", OK, (0, SECTORS, 0)),
    )


WITHOUT = World(without=DISCARD | WRITE_ZEROES | EVENT_IDX)
RANGES = (
    *(variant for name, type in TYPES for variant in variants(name, type)),
    V("discard unmap", UNSUPP, partial(zero, type=TYPES[0][1], segments=((0, 1, UNMAP),))),
    V("zeroes unmap", OK, partial(zero, type=TYPES[1][1], segments=((0, 9, UNMAP),))),
)

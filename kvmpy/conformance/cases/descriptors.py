"""Cases 11 to 23: single descriptors, and how they overlap.

In a chain of a read, the header is at position 0, the data at 1, the status at 2.
"""

from functools import partial

from kvmpy._shim import lib
from kvmpy.conformance.bench import DATA, VAST, Bench
from kvmpy.conformance.case import IGNORED, OK, Variant, needs_reset
from kvmpy.conformance.driver import HEADER
from kvmpy.conformance.layout import Buffer, ring_areas
from kvmpy.conformance.ram import HOLED
from kvmpy.conformance.world import ZERO_SECTOR, World
from kvmpy.devices.virtqueue import Fault
from kvmpy.machine import layout
from kvmpy.storage.disk import SECTOR_SIZE
from kvmpy.units import GiB

SPLIT, PACKED = ("split",), ("packed",)
LOW_END = HOLED[1][0] + HOLED[1][1]
"""The end of RAM below the hole."""
HIGH_END = HOLED[2][0] + HOLED[2][1]
BETWEEN_SLOTS = HOLED[1][0]
BAD_ADDRESS = needs_reset(Fault.BUFFER_ADDRESS)


# --- 11 to 20: single descriptors -------------------------------------------------------------------------------


def unknown_flag(bench: Bench, flag: int) -> None:
    """Set a flag that no specification defines."""
    bench.ring.edit(bench.add(bench.read()), 0, set_flags=flag)
    bench.kick()


def unknown_flag_in_table(bench: Bench, at: int) -> None:
    """Set such a flag in an indirect table, whose flags are at byte ``at`` of each descriptor."""
    bench.add(bench.read(), table=DATA)
    flags = DATA + 16 + at
    bench.memory.write(flags + 1, bytes([bench.memory.read(flags + 1, 1)[0] | 0x10]))
    bench.kick()


def buffer_at_0(bench: Bench, position: int) -> None:
    """Use the first bytes of RAM."""
    buffers = bench.read()
    moved = buffers[position]
    bench.memory.write(0, bench.memory.read(moved.gpa, moved.size))
    buffers[position] = moved._replace(gpa=0)
    bench.send(buffers)


def rings_at_0(bench: Bench) -> None:
    """Put the rings at the first bytes of RAM."""
    bench.driver.rings_gpa = 0
    bench.start()
    bench.send(bench.read())


def data_at(bench: Bench, gpa: int, size: int, *, writable: bool) -> None:
    """Let the data of a read or a write be somewhere else."""
    header, _, status = bench.read()
    bench.send([header, Buffer(gpa, size, writable), status])


def with_empty_buffer(bench: Bench, position: int, gpa: int) -> None:
    """Put a buffer of no bytes into a read."""
    buffers = bench.read()
    bench.send([*buffers[:position], Buffer(gpa, 0, position > 1), *buffers[position:]])


def only_empty_buffers(bench: Bench) -> None:
    """Send a chain without a single byte."""
    bench.send([Buffer(DATA, 0), Buffer(DATA, 0, True)])


def vast_chain(bench: Bench, last: int) -> None:
    """Send a chain of 2^32 bytes and some more; ``last`` is the size of its last vast buffer."""
    id_ = bench.request(lib.VIRTIO_BLK_T_GET_ID, data_in=20)
    header, data, status = id_.buffers
    gpa, size = VAST
    bench.send([header, data, *[Buffer(gpa, size, True)] * 127, Buffer(gpa, last, True), status])


VAST_FIT = VAST[1] - HEADER.size - 20 - 1
"""The size of the last vast buffer that makes the chain 2^32 bytes long."""


# --- 21 to 23: overlaps and order -------------------------------------------------------------------------------


def data_over(bench: Bench, gpa: int, size: int) -> None:
    """Read zeros over part of the rings; the rest of the sector goes elsewhere."""
    header, data, status = bench.read(ZERO_SECTOR)
    bench.allow(gpa, size)
    bench.allow(data.gpa, SECTOR_SIZE)
    bench.allow(status.gpa, 1)
    bench.ring.add([header, Buffer(gpa, size, True), data._replace(size=SECTOR_SIZE - size), status])
    bench.kick()
    if not bench.driver.needs_reset:
        bench.answers.append(bench.memory.read(status.gpa, 1)[0])


def data_over_area(bench: Bench, area: int, offset: int, size: int) -> None:
    """Read zeros over an area of the rings, from ``offset`` on."""
    data_over(bench, ring_areas(bench.ring.setup)[area][0] + offset, size)


def status_over(bench: Bench, position: int) -> None:
    """Let the status byte lie in the header or in the data; it is written last."""
    buffers = bench.read()
    status = buffers[position].gpa + 5
    bench.allow(buffers[1].gpa, SECTOR_SIZE)
    bench.allow(status, 1)
    bench.ring.add([*buffers[:2], Buffer(status, 1, True)])
    bench.kick()
    bench.answers.append(bench.memory.read(status, 1)[0])


def overlapping_data(bench: Bench) -> None:
    """Read two sectors into buffers that overlap: the later one wins."""
    header, _, status = bench.read(1, 2)
    bench.allow(DATA, 256 + SECTOR_SIZE)
    bench.allow(status.gpa, 1)
    bench.ring.add([header, Buffer(DATA, SECTOR_SIZE, True), Buffer(DATA + 256, SECTOR_SIZE, True), status])
    bench.kick()
    bench.answers.append(bench.memory.read(status.gpa, 1)[0])
    expected = bench.model.sector(1)[:256] + bench.model.sector(2)
    bench.expect(bench.memory.read(DATA, len(expected)) == expected, "overlapping buffers hold other data")


def data_twice(bench: Bench) -> None:
    """Write two sectors out of one and the same buffer."""
    header, data, status = bench.write()
    bench.send([header, data, data, status])


def readable_behind_writable(bench: Bench, size: int) -> None:
    """Put a readable buffer between data and status."""
    header, data, status = bench.read()
    bench.send([header, data, Buffer(DATA, size), status])


# ----------------------------------------------------------------------------------------------------------------

V = Variant
HEADROOM = World(size=64)
"""Rings that a sector fits into."""


def bad_buffers(*places: tuple[str, int, int]) -> tuple[Variant, ...]:
    """Return a variant for each (name, gpa, size) of a buffer that is not RAM: to be written, and to be read."""
    return tuple(
        V(f"{kind} {name}", BAD_ADDRESS, partial(data_at, gpa=gpa, size=size, writable=writable))
        for name, gpa, size in places
        for kind, writable in (("writable", True), ("readable", False))
        if writable or name == places[0][0]
    )


FLAGS = (
    *(V(f"0x{f:x}", needs_reset(Fault.UNKNOWN_FLAGS), partial(unknown_flag, flag=f)) for f in (8, 0x40, 0x4000)),
    V("0x8000", needs_reset(Fault.UNKNOWN_FLAGS), partial(unknown_flag, flag=0x8000), rings=SPLIT),
    V("in a table", needs_reset(Fault.UNKNOWN_FLAGS), partial(unknown_flag_in_table, at=12), rings=SPLIT),
    V("in a table: ignored", OK, partial(unknown_flag_in_table, at=14), rings=PACKED),
)
ADDRESS_0 = (
    *(V(name, OK, partial(buffer_at_0, position=at)) for at, name in enumerate(("header", "data", "status"))),
    V("rings", OK, rings_at_0),
)
BEYOND_RAM = bad_buffers(
    ("behind it", HIGH_END, 512), ("in the hole", LOW_END, 512), ("2 GiB", 2 * GiB, 1), ("2^63", 2**63, 512)
)
ACROSS_THE_END = bad_buffers(("below the hole", LOW_END - 256, 512), ("above it", HIGH_END - 511, 512))
WRAPPING = bad_buffers(("to 256", 2**64 - 256, 512), ("to 0", 2**64 - 512, 512))
EMPTY = (
    V("data", OK, partial(with_empty_buffer, position=1, gpa=DATA)),
    V("writable, nowhere", OK, partial(with_empty_buffer, position=2, gpa=2**64 - 1)),
    V("header first", OK, partial(with_empty_buffer, position=0, gpa=2**63)),
    V("nothing else", IGNORED, only_empty_buffers),
)
HUGE = bad_buffers(("at 0", 0, 2**32 - 1), ("in RAM", DATA, 2**32 - 1))
VAST_CHAINS = (
    V("2^32 bytes", OK, partial(vast_chain, last=VAST_FIT), World(size=256, vast=True)),
    V("one more", needs_reset(Fault.CHAIN_LENGTH), partial(vast_chain, last=VAST_FIT + 1), World(size=256, vast=True)),
)
ACROSS_SLOTS = bad_buffers(
    ("two slots", BETWEEN_SLOTS - 256, 512), ("hole and RAM", 4 * GiB - 256, 512), ("all of the hole", LOW_END - 1, GiB)
)
DEVICE_MEMORY = bad_buffers(
    ("virtio-mmio", lib.KVMPY_VIRTIO_MMIO, 512), ("IOAPIC", layout.IOAPIC, 512), ("APIC", layout.LOCAL_APIC, 512)
)
OVERLAPS_RING = (
    V("free descriptors", OK, partial(data_over_area, area=0, offset=512, size=512), HEADROOM, SPLIT),
    V("its descriptors", OK, partial(data_over_area, area=0, offset=0, size=48), HEADROOM),
    V("used ring", OK, partial(data_over_area, area=2, offset=0, size=4)),
    V(
        "available ring",
        needs_reset(Fault.AVAIL_INDEX),
        partial(data_over_area, area=1, offset=0, size=4),
        rings=SPLIT,
    ),
    V("event suppression", OK, partial(data_over_area, area=1, offset=0, size=4), rings=PACKED),
    V("status in header", OK, partial(status_over, position=0)),
    V("status in data", OK, partial(status_over, position=1)),
)
OVERLAPS = (V("of a read", OK, overlapping_data), V("of a write", OK, data_twice))
OUT_OF_ORDER = tuple(
    V(f"{size} bytes", needs_reset(Fault.BUFFER_ORDER), partial(readable_behind_writable, size=size))
    for size in (16, 0)
)

"""Cases 24 to 31: indirect tables. They lie at DATA, unless that is what a case is about."""

from functools import partial

from kvmpy._shim import lib
from kvmpy.conformance.bench import DATA, Bench
from kvmpy.conformance.case import OK, Variant, needs_reset
from kvmpy.conformance.cases.descriptors import BETWEEN_SLOTS, HIGH_END, LOW_END
from kvmpy.conformance.cases.ring import PACKED, SIXTEEN_PIECES, SPLIT, TOO_LONG
from kvmpy.conformance.layout import DESCRIPTOR_SIZE, INDIRECT, NEXT, U16, WRITE
from kvmpy.conformance.layout import PACKED as PACKED_DESCRIPTOR
from kvmpy.conformance.world import EVENT_IDX, INDIRECT_DESC, World
from kvmpy.devices.virtqueue import Fault

SPLIT_FLAGS, SPLIT_NEXT, PACKED_FLAGS = 12, 14, 14
"""Offsets in a descriptor."""
BAD_TABLE = needs_reset(Fault.INDIRECT_ADDRESS)


def read_by_table(bench: Bench, table: int) -> None:
    """Read a sector by way of a table somewhere in RAM."""
    bench.send(bench.read(), table=table)


def nested(bench: Bench) -> None:
    """Let an entry of the table refer to another table."""
    bench.add(bench.read(), table=DATA)
    entry = DATA + DESCRIPTOR_SIZE
    bench.memory.write(entry + (PACKED_FLAGS if bench.packed else SPLIT_FLAGS), U16.pack(INDIRECT))
    bench.kick()


def with_flag(bench: Bench, flag: int) -> None:
    """Set a flag of the descriptor that refers to the table."""
    bench.ring.edit(bench.add(bench.read(), table=DATA), 0, set_flags=flag)
    bench.kick()


def with_length(bench: Bench, length: int) -> None:
    """Say that the table has another length."""
    bench.ring.edit(bench.add(bench.read(), table=DATA), 0, len=length)
    bench.kick()


def largest_table(bench: Bench) -> None:
    """Have a table of 65536 entries, all of the first slot. A split chain ends with its first; a packed one has all."""
    empty = PACKED_DESCRIPTOR.pack(0, 0, 0, WRITE)
    bench.memory.write(DESCRIPTOR_SIZE, empty * bench.ring.size)
    flush = bench.request(lib.VIRTIO_BLK_T_FLUSH).buffers
    bench.ring.edit(bench.add(flush, table=0, direct=1), 1, len=65536 * DESCRIPTOR_SIZE)
    bench.kick()


def table_at(bench: Bench, gpa: int) -> None:
    """Say that the table is somewhere else."""
    bench.ring.edit(bench.add(bench.read(), table=DATA), 0, addr=gpa)
    bench.kick()


def next_in_table(bench: Bench, next: int) -> None:
    """Let the first entry of the table lead somewhere else than to the second."""
    bench.add(bench.read(), table=DATA)
    bench.memory.write(DATA + SPLIT_NEXT, U16.pack(next))
    bench.kick()


def table_of(bench: Bench, buffers: int, direct: int) -> None:
    """Have a chain of so many buffers, of which the first ``direct`` ones stand in the ring."""
    pieces = SIXTEEN_PIECES if buffers == 16 else (16, *SIXTEEN_PIECES[:-2], 80, 1)
    bench.send(bench.read(writable=pieces), table=DATA, direct=direct)


V = Variant
NOT_NEGOTIATED = (
    V(
        "",
        needs_reset(Fault.INDIRECT_NOT_NEGOTIATED),
        partial(read_by_table, table=DATA),
        World(without=INDIRECT_DESC | EVENT_IDX),
    ),
)
NESTED = (V("", needs_reset(Fault.INDIRECT_NESTED), nested),)
AND_NEXT = (V("", needs_reset(Fault.INDIRECT_AND_NEXT), partial(with_flag, flag=NEXT)),)
LENGTHS = (
    *(
        V(f"{n} bytes", needs_reset(Fault.INDIRECT_LENGTH), partial(with_length, length=n))
        for n in (0, 8, 47, 65537 * DESCRIPTOR_SIZE, 2**32 - DESCRIPTOR_SIZE)
    ),
    V("65536 entries", OK, largest_table, rings=SPLIT),
    V("65536 entries", TOO_LONG, largest_table, rings=PACKED),
)
ADDRESSES = (
    V("odd", OK, partial(read_by_table, table=DATA + 1)),
    V("behind RAM", BAD_TABLE, partial(table_at, gpa=HIGH_END)),
    V("in the hole", BAD_TABLE, partial(table_at, gpa=LOW_END)),
    V("across two slots", BAD_TABLE, partial(table_at, gpa=BETWEEN_SLOTS - DESCRIPTOR_SIZE)),
    V("across the end", BAD_TABLE, partial(table_at, gpa=HIGH_END - DESCRIPTOR_SIZE)),
    V("wraps", BAD_TABLE, partial(table_at, gpa=2**64 - DESCRIPTOR_SIZE)),
)
LOOPS = (
    V("to itself", TOO_LONG, partial(next_in_table, next=0), rings=SPLIT),
    V("beyond it", needs_reset(Fault.NEXT), partial(next_in_table, next=3), rings=SPLIT),
    V("far beyond it", needs_reset(Fault.NEXT), partial(next_in_table, next=65535), rings=SPLIT),
)
WRITABLE = (V("", OK, partial(with_flag, flag=WRITE)),)
SUMS = (
    V("16 in all", OK, partial(table_of, buffers=16, direct=8)),
    V("17 in all", TOO_LONG, partial(table_of, buffers=17, direct=8)),
)

"""The lookup in C against its readable twin: the same range for every access, without KVM."""

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from kvmpy._shim import ffi, lib
from kvmpy.kvm import Action, FastRange, RangeTable, Space
from kvmpy.machine.bus import Bus

TOP = (1 << 64) - 1


class Nothing:
    """A device that is only found."""

    def read(self, offset: int, size: int) -> bytes:
        return bytes(size)

    def write(self, offset: int, data: bytes) -> None:
        pass


def found_in_c(table: RangeTable, space: Space, address: int, size: int) -> int | None:
    """Return the row that the run loop charges with a read of ``size`` bytes at ``address``, or None."""
    page = ffi.new("uint8_t[]", 4096)
    run = ffi.cast("struct kvm_run *", page)
    if space == Space.PIO:
        run.exit_reason = lib.KVM_EXIT_IO
        run.io.port, run.io.size, run.io.count, run.io.data_offset = address, size, 1, 2048
    else:
        run.exit_reason = lib.KVM_EXIT_MMIO
        run.mmio.phys_addr, run.mmio.len = address, size
    counts = ffi.new("struct kvmpy_range_count[]", max(table.length, 1))
    loop = ffi.new("struct kvmpy_loop *", {"run": run, "ranges": table.pointer, "counts": counts})
    loop.nr_ranges = table.length
    stop = lib.kvmpy_handle_exit(loop)
    charged = [row for row in range(table.length) if counts[row].reads]
    assert (stop == -1) == bool(charged)
    assert len(charged) <= 1
    return charged[0] if charged else None


@st.composite
def boards(draw):
    """Ranges of both spaces that do not overlap, in any order: (space, base, size)."""
    placed = []
    for space, width in ((Space.PIO, 16), (Space.MMIO, draw(st.sampled_from([16, 52])))):
        edges = sorted(draw(st.sets(st.integers(0, (1 << width) - 1), max_size=14)))
        for first, last in zip(edges[::2], edges[1::2], strict=False):
            placed.append((space, first, last - first + draw(st.integers(0, 1))))
    # Neighbours that touch are the interesting ones.
    if placed:
        space, base, size = placed[draw(st.integers(0, len(placed) - 1))]
        if not any(s == space and b < base + size + 3 and base + size < b + z for s, b, z in placed):
            placed.append((space, base + size, 3))
    room = {Space.PIO: 1 << 16, Space.MMIO: 1 << 52}
    return draw(st.permutations([row for row in placed if row[1] + row[2] <= room[row[0]]]))


@settings(max_examples=300, deadline=None)
@given(board=boards(), data=st.data())
def test_c_finds_the_range_that_the_bus_finds(board, data):
    """run_loop.c `find`, twin `Bus.find`: the range that holds the whole access, or none."""
    buses = {Space.PIO: Bus("port", 1 << 16), Space.MMIO: Bus("memory", 1 << 52)}
    rows = []
    for number, (space, base, size) in enumerate(board):
        fast = FastRange(0, size, on_read=Action.CONSTANT)
        rows.append((space, base, fast))
        buses[space].attach(base, size, Nothing(), name=str(number))
    table = RangeTable(rows)
    for _ in range(8):
        space = data.draw(st.sampled_from(Space))
        size = data.draw(st.sampled_from([1, 2, 4] if space == Space.PIO else [1, 2, 4, 8]))
        edges = [edge for s, base, length in board if s == space for edge in (base, base + length)]
        near = st.sampled_from(edges or [0]).flatmap(lambda edge: st.integers(edge - 9, edge + 9))
        address = data.draw(near | st.integers(0, buses[space].size - 1)) % buses[space].size
        expected = buses[space].find(address, size)
        row = found_in_c(table, space, address, size)
        event("found" if row is not None else "not found")
        got = None if row is None else table.ranges[row]
        assert got is (rows[int(expected.name)][2] if expected else None)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_no_address_wraps_around(size):
    """An access at the top of the space ends there: 2^64 is no 0."""
    low = FastRange(0, 16, on_read=Action.CONSTANT)
    high = FastRange(TOP - 7, 8, on_read=Action.CONSTANT)
    table = RangeTable([(Space.MMIO, 0, low), (Space.MMIO, 0, high)])
    assert found_in_c(table, Space.MMIO, TOP, size) == (1 if size == 1 else None)
    assert found_in_c(table, Space.MMIO, TOP - 7, size) == 1
    assert found_in_c(table, Space.MMIO, 0, size) == 0


def test_an_empty_table_finds_nothing():
    assert found_in_c(RangeTable(), Space.PIO, 0, 1) is None

"""The address map: what lies where never overlaps, and agrees with what guests are told."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from kvmpy import GiB, KiB, MiB
from kvmpy.machine import layout
from kvmpy.machine.layout import RAM, RESERVED, memory_map, ram_ranges

OURS = [
    (layout.EBDA, 0xA_0000 - layout.EBDA),
    (layout.BOOT_GDT, 4 * KiB),
    (layout.BOOT_INFO, layout.BOOT_INFO_SIZE),
    (layout.BOOT_PAGE_TABLES, layout.BOOT_PAGE_TABLES_SIZE),
    (layout.COMMAND_LINES, layout.COMMAND_LINES_SIZE),
    (layout.PARAMETER_PAGE, 4 * KiB),
    (layout.ACPI_TABLES, layout.ACPI_TABLES_SIZE),
    (layout.MP_TABLE, layout.MP_TABLE_SIZE),
]
"""What kvmpy writes on its own, as (gpa, size)."""

sizes = st.integers(1 * MiB // 4096, 64 * GiB // 4096).map(lambda pages: pages * 4096)


def test_what_kvmpy_writes_does_not_overlap() -> None:
    for (gpa, size), (behind, _) in pairwise(OURS):
        assert gpa + size <= behind


def test_what_kvmpy_writes_lies_in_the_bios_area() -> None:
    """Page 0 and everything below 0x9f000 stay free for guests that relocate code there."""
    for gpa, size in OURS:
        assert gpa >= 0x9_F000
        assert gpa + size <= layout.HIGH_MEMORY


def test_what_is_in_the_hole_lies_in_the_hole() -> None:
    for gpa in (layout.HOLE, layout.IOAPIC, layout.LOCAL_APIC, layout.IDENTITY_MAP, layout.TSS + 3 * 4096 - 1):
        assert layout.HOLE <= gpa < layout.HOLE_END
    assert layout.TSS == layout.IDENTITY_MAP + 4096


@given(sizes)
def test_ram_is_all_there_and_none_of_it_in_the_hole(size: int) -> None:
    ranges = ram_ranges(size)
    assert sum(length for _, length in ranges) == size
    assert ranges[0][0] == 0
    for gpa, length in ranges:
        assert length > 0
        assert gpa + length <= layout.HOLE or gpa >= layout.HOLE_END


@given(sizes)
def test_memory_map_ascends_and_tells_of_no_ram_that_is_not_there(size: int) -> None:
    """Entries neither overlap nor go back; RAM in it is RAM, what kvmpy uses is reserved."""
    entries = memory_map(size)
    for (gpa, length, _), (behind, _, _) in pairwise(entries):
        assert gpa + length <= behind
    ram = ram_ranges(size)
    for gpa, length, kind in entries:
        assert length > 0
        assert kind in (RAM, RESERVED)
        if kind == RAM:
            assert any(base <= gpa and gpa + length <= base + extent for base, extent in ram)
            assert not any(gpa < ours + extent and ours < gpa + length for ours, extent in OURS)
    usable = sum(length for _, length, kind in entries if kind == RAM)
    assert usable == size - (layout.HIGH_MEMORY - layout.LOW_RAM_END)

"""The address map: what lies where never overlaps, and agrees with what guests are told."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpy import GiB, KiB, MiB
from kvmpy._shim import lib
from kvmpy.machine import layout, mptable
from kvmpy.machine.layout import RAM, RESERVED, memory_map, ram_ranges, virtio_cmdline, virtio_windows

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
    last_window = virtio_windows(16)[-1].gpa + layout.VIRTIO_MMIO_SIZE - 1
    chips = (layout.IOAPIC, layout.LOCAL_APIC, layout.IDENTITY_MAP, layout.TSS + 3 * 4096 - 1)
    for gpa in (layout.HOLE, layout.VIRTIO_MMIO, last_window, *chips):
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


# --- virtio-mmio ------------------------------------------------------------------------------------------------

TAKEN = {0, 1, 2, lib.KVMPY_IRQ_SERIAL, 8, lib.KVMPY_IRQ_ACPI, lib.KVMPY_STOP_GSI, 13}
"""The PIT, the keyboard, the cascade, COM1, the RTC, the SCI, the stop request, the FPU."""


def test_each_virtio_window_lies_where_guests_look_for_it() -> None:
    """guests/abi.h: device i at KVMPY_VIRTIO_MMIO + i * KVMPY_VIRTIO_MMIO_STRIDE, KVMPY_VIRTIO_MMIO_MAX of them."""
    windows = virtio_windows(lib.KVMPY_VIRTIO_MMIO_MAX)
    base, stride = lib.KVMPY_VIRTIO_MMIO, lib.KVMPY_VIRTIO_MMIO_STRIDE
    assert [window.gpa for window in windows] == [base + i * stride for i in range(lib.KVMPY_VIRTIO_MMIO_MAX)]
    assert stride == layout.VIRTIO_MMIO_SIZE
    assert virtio_windows(3) == windows[:3]
    assert virtio_windows(0) == ()


def test_each_virtio_device_has_an_interrupt_of_its_own() -> None:
    """Edges cannot be shared; the first eight reach the PICs, and no pin is one that another device has."""
    gsis = [window.gsi for window in virtio_windows(16)]
    assert len(set(gsis)) == len(gsis)
    assert not set(gsis) & TAKEN
    assert all(gsi < 16 for gsi in gsis[:8])
    assert all(16 <= gsi < mptable.IRQS for gsi in gsis[8:])


def test_more_devices_than_interrupt_pins_are_refused() -> None:
    with pytest.raises(ValueError, match=r"17 virtio devices \(disks, rng, console\): allowed is up to 16"):
        virtio_windows(17)


def test_linux_is_told_size_address_and_interrupt() -> None:
    """kernel-parameters.txt: virtio_mmio.device=<size>@<baseaddr>:<irq>."""
    assert virtio_cmdline(virtio_windows(2)) == (
        "virtio_mmio.device=4K@0xd0000000:5",
        "virtio_mmio.device=4K@0xd0001000:6",
    )

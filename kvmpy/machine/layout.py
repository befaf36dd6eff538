"""The address map of every kvmpy machine: one drawing, and the constants that it stands for.

::

    0x0000_0000  +-------------------------------+
                 | free for the guest            |  page 0 included; a guest may relocate code here
    0x0000_0400  |   BIOS data area: two words  |  where the EBDA is; a guest may overwrite them
    0x0000_7c00  |   boot sector (one page)      |  only when a boot sector is what boots
    0x0009_fc00  +-------------------------------+  EBDA
                 | MP floating pointer           |
    0x000a_0000  +-------------------------------+  legacy video window: RAM to us, reserved in the map
    0x000c_0000  +-------------------------------+  what kvmpy writes, page by page:
                 | 0xc0000 boot GDT              |
                 | 0xc1000 boot information      |  multiboot 1/2, hvm_start_info, or boot_params
                 | 0xc8000 boot page tables      |  PML4, PDPT, 4 page directories: 4 GiB, 1:1
                 | 0xd0000 command lines         |  64 KiB
                 | 0xe0000 parameter page        |  guests/abi.h
                 | 0xe1000 ACPI: RSDP, tables    |
                 | 0xf0000 MP configuration      |
    0x0010_0000  +-------------------------------+  1 MiB
                 | RAM                           |  kernels load here; modules and initrd at its top
    0xc000_0000  +-------------------------------+  3 GiB: the hole, present on every machine
                 | 0xd0000000 virtio-mmio        |  16 windows of 4 KiB
                 | 0xfec00000 IOAPIC             |
                 | 0xfee00000 local APICs        |
                 | 0xfffbc000 KVM's own pages    |  identity map (1) and TSS (3)
  0x1_0000_0000  +-------------------------------+  4 GiB
                 | the rest of RAM               |
                 +-------------------------------+

Addresses that guests know by name (the parameter page, the windows, the ports) are in ``guests/abi.h``; a test holds
the two together. Not here: who writes what is drawn.
"""

from collections.abc import Iterable
from typing import NamedTuple

from kvmpy.units import PAGE_SIZE, GiB, KiB, MiB

BOOT_SECTOR = 0x7C00
EBDA = 0x9_FC00
BDA_EBDA_SEGMENT = 0x40E
BDA_BASE_MEMORY = 0x413
LOW_RAM_END = EBDA

BIOS_AREA = 0xC_0000
BOOT_GDT = 0xC_0000
BOOT_INFO = 0xC_1000
BOOT_INFO_SIZE = 0x7000
BOOT_PAGE_TABLES = 0xC_8000
BOOT_PAGE_TABLES_SIZE = 6 * PAGE_SIZE
COMMAND_LINES = 0xD_0000
COMMAND_LINES_SIZE = 64 * KiB
PARAMETER_PAGE = 0xE_0000
ACPI_TABLES = 0xE_1000
ACPI_TABLES_SIZE = 0xF000
MP_TABLE = 0xF_0000
MP_TABLE_SIZE = 0x1_0000

HIGH_MEMORY = 1 * MiB
HOLE = 3 * GiB
HOLE_END = 4 * GiB

VIRTIO_MMIO = 0xD000_0000
VIRTIO_MMIO_SIZE = 0x1000
VIRTIO_GSIS = (5, 6, 7, 11, 12, 14, 15, 3, *range(16, 24))
"""The GSI of each virtio-mmio window. First the ISA interrupts that the board leaves free, which a guest hears through
the PICs too; then the pins that only the I/O APIC has. Edge triggered: no two devices share one."""

IOAPIC = 0xFEC0_0000
LOCAL_APIC = 0xFEE0_0000
IDENTITY_MAP = 0xFFFB_C000
TSS = 0xFFFB_D000

CMOS_PORT = 0x70
CMOS_CENTURY = 0x32
"""The register with the century: the chip has none, and PCs disagree; the FADT tells a kernel."""
RTC_IRQ = 8

REAL_MODE_ENTRY = 0x1000
"""Where a flat real-mode image loads and starts when nothing else is said."""


def ram_ranges(size: int) -> list[tuple[int, int]]:
    """Return where ``size`` bytes of RAM lie, as (gpa, size): up to the hole, and the rest from 4 GiB."""
    low = min(size, HOLE)
    return [(0, low)] + ([(HOLE_END, size - low)] if size > low else [])


# e820 types (ACPI 6.5 §15, table 15.374)
RAM, RESERVED = 1, 2


def memory_map(size: int) -> list[tuple[int, int, int]]:
    """Return the memory map that boot protocols hand to a guest: (gpa, size, e820 type), ascending."""
    (_, low), *high = ram_ranges(size)
    return [
        (0, LOW_RAM_END, RAM),
        (LOW_RAM_END, HIGH_MEMORY - LOW_RAM_END, RESERVED),
        *([(HIGH_MEMORY, low - HIGH_MEMORY, RAM)] if low > HIGH_MEMORY else []),
        (IDENTITY_MAP, HOLE_END - IDENTITY_MAP, RESERVED),
        *((gpa, length, RAM) for gpa, length in high),
    ]


class VirtioWindow(NamedTuple):
    """Where a guest finds a virtio-mmio device: VIRTIO_MMIO_SIZE bytes of registers at ``gpa``, and its interrupt."""

    gpa: int
    gsi: int


def virtio_windows(count: int) -> tuple[VirtioWindow, ...]:
    """Return the places of ``count`` virtio-mmio devices.

    Raises:
        ValueError: there are fewer interrupt pins.
    """
    if count > len(VIRTIO_GSIS):
        allowed = f"up to {len(VIRTIO_GSIS)}, one for each free interrupt pin"
        raise ValueError(f"{count} virtio devices (disks, rng, console): allowed is {allowed}")
    return tuple(VirtioWindow(VIRTIO_MMIO + i * VIRTIO_MMIO_SIZE, gsi) for i, gsi in enumerate(VIRTIO_GSIS[:count]))


def virtio_cmdline(windows: Iterable[VirtioWindow]) -> tuple[str, ...]:
    """Return the words that tell Linux of virtio-mmio devices on its command line.

    Source: Linux Documentation/admin-guide/kernel-parameters.txt, virtio_mmio.device.
    """
    size = f"{VIRTIO_MMIO_SIZE // KiB}K"
    return tuple(f"virtio_mmio.device={size}@0x{window.gpa:x}:{window.gsi}" for window in windows)

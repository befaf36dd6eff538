"""A boot sector: 55 AA at offset 510, loaded at 0x7c00, started in real mode with dl = 0x80 (the first hard disk).

There is no BIOS behind it, so nothing that the sector could call to read more of its disk. A file longer than one
sector is therefore loaded whole, one piece from 0x7c00 on, as if the sector had already done so; it must end below
0x9fc00.

Source: BIOS Boot Specification 1.01 §6.5.1.
"""

from kvmpy.machine import layout
from kvmpy.machine.boot.image import ImageFile
from kvmpy.machine.boot.place import check_segments
from kvmpy.machine.boot.plan import BootOptions, CpuMode, Entry, Found, Plan, Segment
from kvmpy.machine.memory import GuestMemory

TITLE = "boot sector"
SERVES: frozenset[str] = frozenset()

SECTOR_SIZE = 512
SIGNATURE_AT = 510
SIGNATURE = b"\x55\xaa"
FIRST_HARD_DISK = 0x80


def probe(image: ImageFile) -> Found | None:
    """Tell whether the first sector is signed. Raises ImageError when the file is too long to load."""
    segment = _parse(image)
    if segment is None:
        return None
    longer = image.size - SECTOR_SIZE
    notes = (f"{longer} bytes behind the first sector are loaded with it",) if longer else ()
    return Found((segment,), CpuMode.REAL, layout.BOOT_SECTOR, notes)


def plan(image: ImageFile, memory: GuestMemory, options: BootOptions) -> Plan:
    """Return the plan to start at 0:0x7c00. Raises ImageError when the file is no boot sector, or too long."""
    segment = _parse(image)
    if segment is None:
        raise image.error("no boot sector: bytes 510 and 511 are not 55 aa", SIGNATURE_AT)
    check_segments(image, (segment,), memory)
    return Plan((segment,), Entry(CpuMode.REAL, layout.BOOT_SECTOR, {"rdx": FIRST_HARD_DISK}))


def load(image: ImageFile, memory: GuestMemory, options: BootOptions) -> Entry:
    """Write the file into the guest and return how to start. Raises as `plan` does."""
    return plan(image, memory, options).carry_out(image, memory)


def _parse(image: ImageFile) -> Segment | None:
    if image.head(SECTOR_SIZE)[SIGNATURE_AT:] != SIGNATURE:
        return None
    room = layout.LOW_RAM_END - layout.BOOT_SECTOR
    if image.size > room:
        message = f"boot sector in a file of {image.size} bytes: {room} fit from 0x7c00, and no BIOS reads the rest"
        raise image.error(message, SIGNATURE_AT)
    return Segment(layout.BOOT_SECTOR, 0, image.size, image.size, SIGNATURE_AT)

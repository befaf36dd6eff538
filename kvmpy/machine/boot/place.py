"""Where things may lie: the checks that every protocol's segments pass, and the places of modules and tables.

What kvmpy itself writes (`kvmpy.machine.layout`) is never under a kernel; modules lie at the top of low RAM, below the
hole, the first one lowest, each on a page of its own.
"""

import os
from collections.abc import Iterable, Sequence

from kvmpy.machine import layout
from kvmpy.machine.boot.image import ImageFile
from kvmpy.machine.boot.plan import BootOptions, CpuMode, Module, PlacedFile, Segment
from kvmpy.machine.memory import GuestMemory
from kvmpy.units import PAGE_SIZE, GiB, MiB, format_size

REAL_MODE_REACH = 64 * 1024
"""Real mode starts at cs = 0, so its first instruction lies below this."""
BOOT_REACH = 4 * GiB
"""Protected mode has 32-bit addresses, and the boot page tables of long mode map as much."""


def align_up(value: int, alignment: int) -> int:
    """Return the least multiple of ``alignment`` that is not below ``value``."""
    return -(-value // alignment) * alignment


def align_down(value: int, alignment: int) -> int:
    """Return the greatest multiple of ``alignment`` that is not above ``value``."""
    return value // alignment * alignment


def low_ram_end(memory: GuestMemory) -> int:
    """Return the gpa at which RAM below the hole ends."""
    region = memory.regions[0]
    return region.gpa + region.size


def end_of(segments: Iterable[Segment]) -> int:
    """Return the first gpa behind all of ``segments``; 0 when there are none."""
    return max((segment.end for segment in segments), default=0)


def enough_memory(kernel_end: int, file_sizes: Iterable[int] = (), *, ceiling: int = layout.HOLE) -> str:
    """Return how much memory would do for a kernel up to ``kernel_end`` and files above it, as the end of a message.

    Nothing when no size would: files lie below ``ceiling``, and a kernel below the hole.
    """
    end = kernel_end + sum(align_up(size, PAGE_SIZE) for size in file_sizes)
    return f"; {align_up(end, MiB) // MiB} MiB of memory would do" if end <= min(ceiling, layout.HOLE) else ""


def check_segments(
    image: ImageFile, segments: Iterable[Segment], memory: GuestMemory, files: Iterable[PlacedFile] = ()
) -> None:
    """Refuse segments that leave RAM, meet kvmpy's own tables, each other, or one of ``files``.

    Raises:
        ImageError: at the offset that describes the segment.
    """
    before: Segment | None = None
    files, segments = tuple(files), sorted(segments)
    enough = enough_memory(end_of(segments), [file.size for file in files])
    for segment in segments:
        where = f"0x{segment.gpa:x}..0x{segment.end - 1:x}"
        if not memory.contains(segment.gpa, segment.memory_size):
            message = f"segment {where} is outside {format_size(memory.size)} of RAM{enough}"
            raise image.error(message, segment.described_at)
        if segment.gpa < layout.HIGH_MEMORY and segment.end > layout.LOW_RAM_END:
            reserved = f"0x{layout.LOW_RAM_END:x}..0x{layout.HIGH_MEMORY - 1:x}"
            raise image.error(f"segment {where} touches {reserved}, kept for boot tables", segment.described_at)
        if before is not None and segment.gpa < before.end:
            message = f"segment {where} overlaps the one at 0x{before.gpa:x}..0x{before.end - 1:x}"
            raise image.error(message, segment.described_at)
        for file in files:
            if segment.gpa < file.end and file.gpa < segment.end:
                message = f"segment {where} overlaps {file.path} at 0x{file.gpa:x}..0x{file.end - 1:x}{enough}"
                raise image.error(message, segment.described_at)
        before = segment


def check_entry(image: ImageFile, rip: int, mode: CpuMode, segments: Iterable[Segment], *, at: int) -> None:
    """Refuse an entry point that no segment holds, or that ``mode`` cannot reach.

    Raises:
        ImageError: at the offset ``at``, where the file says the entry.
    """
    if not any(segment.gpa <= rip < segment.end for segment in segments):
        raise image.error(f"entry 0x{rip:x} is in no segment", at)
    if rip >= reach(mode):
        raise image.error(f"entry 0x{rip:x} is out of reach: {mode} mode starts below 0x{reach(mode):x}", at)


def reach(mode: CpuMode) -> int:
    """Return the gpa below which ``mode`` can start."""
    return REAL_MODE_REACH if mode is CpuMode.REAL else BOOT_REACH


def place_files(
    image: ImageFile,
    modules: Sequence[Module],
    memory: GuestMemory,
    *,
    kernel_end: int,
    ceiling: int = layout.HOLE,
    at: int = 0,
) -> tuple[PlacedFile, ...]:
    """Return a place for each module at the top of the RAM below ``ceiling``, in ascending order.

    Raises:
        ImageError: a module cannot be opened, or together they do not fit above 1 MiB; then the error blames
            ``image`` at the offset ``at``, which says the ceiling, and names the memory that would do with a kernel
            up to ``kernel_end``. Whether they overlap the kernel is not looked at.
    """
    sizes = []
    for module in modules:
        with ImageFile(module.path) as file:
            sizes.append(file.size)
    top = min(low_ram_end(memory), ceiling)
    gpa = align_down(top, PAGE_SIZE) - sum(align_up(size, PAGE_SIZE) for size in sizes)
    if sizes and gpa < layout.HIGH_MEMORY:
        names = ", ".join(module.path for module in modules[:3])
        wanted = f"{format_size(sum(sizes))} of initrd and modules ({names}) do not fit between 1 MiB and 0x{top:x}"
        raise image.error(wanted + enough_memory(kernel_end, sizes, ceiling=ceiling), at)
    placed = []
    for module, size in zip(modules, sizes, strict=True):
        placed.append(PlacedFile(module.path, gpa, size, module.cmdline))
        gpa += align_up(size, PAGE_SIZE)
    return tuple(placed)


def c_string(text: str) -> bytes:
    """Return ``text`` as the bytes that the user typed, NUL-terminated. Raises ValueError for a NUL inside."""
    raw = os.fsencode(text)
    if b"\0" in raw:
        raise ValueError(f"a command line cannot hold a NUL byte: {text!r}")
    return raw + b"\0"


def linux_cmdline(options: BootOptions) -> bytes:
    """Return Linux's command line, NUL-terminated.

    Raises:
        ValueError: there is a NUL inside, or it is longer than the room for it.
    """
    line = c_string(options.linux_cmdline)
    if len(line) > layout.COMMAND_LINES_SIZE:
        allowed = layout.COMMAND_LINES_SIZE - 1
        raise ValueError(f"command line of {len(line) - 1} bytes{options.shares}: {allowed} are allowed")
    return line


class Arena:
    """[gpa, gpa+size) being filled with tables: each gets its address at once, and all are written later."""

    def __init__(self, gpa: int, size: int, name: str) -> None:
        self._next = gpa
        self._end = gpa + size
        self._name = name
        self.tables: list[tuple[int, bytes]] = []

    def put(self, data: bytes, *, alignment: int = 8) -> int:
        """Add ``data`` and return its gpa.

        Raises:
            ValueError: there is no room: command lines or modules are too many.
        """
        gpa = align_up(self._next, alignment)
        if gpa + len(data) > self._end:
            left = max(self._end - gpa, 0)
            raise ValueError(f"no room for {self._name}: {len(data)} bytes wanted, {left} left below 0x{self._end:x}")
        self._next = gpa + len(data)
        self.tables.append((gpa, data))
        return gpa


def read_rsdp(memory: GuestMemory) -> bytes | None:
    """Return the ACPI root pointer (36 bytes) that the board has put at its place, or None when there is none.

    Source: ACPI 6.5 §5.2.5.3.
    """
    rsdp = memory.read(layout.ACPI_TABLES, 36)
    return rsdp if rsdp.startswith(b"RSD PTR ") else None

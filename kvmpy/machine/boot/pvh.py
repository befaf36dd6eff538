"""PVH: an ELF kernel that names a 32-bit entry point in a note, as Xen and Linux agreed.

The note (name "Xen", type 18) holds the physical entry. The kernel starts in protected mode, paging off, with rbx =
`hvm_start_info`, which leads to the command line, the modules (the initrd is module 0) and the memory map::

    BOOT_INFO +0x00  hvm_start_info      56 bytes
              +0x38  memory map          24 bytes an entry
              ...    module list         32 bytes an entry

Source: Xen public/arch-x86/hvm/start_info.h, public/elfnote.h; gABI 4.1 chapter 5 "Note Section".
"""

from struct import Struct
from typing import NamedTuple

from kvmpy.machine import layout
from kvmpy.machine.boot import elf as elf_format
from kvmpy.machine.boot.image import ImageFile
from kvmpy.machine.boot.linux import COMMAND_LINE_SIZE, linux_version
from kvmpy.machine.boot.place import (
    Arena,
    align_up,
    c_string,
    check_entry,
    check_segments,
    end_of,
    linux_cmdline,
    place_files,
    read_rsdp,
)
from kvmpy.machine.boot.plan import BootOptions, CpuMode, Entry, Found, PlacedFile, Plan, Segment
from kvmpy.machine.memory import GuestMemory

TITLE = "PVH"
SERVES = frozenset({"append", "modules", "initrd"})

XEN_ELFNOTE_PHYS32_ENTRY = 18
XEN_HVM_START_MAGIC_VALUE = 0x336EC578
START_INFO_VERSION = 1

_START_INFO = Struct("<IIIIQQQQII")
"""magic version flags nr_modules modlist_paddr cmdline_paddr rsdp_paddr memmap_paddr memmap_entries reserved"""
_MODLIST_ENTRY = Struct("<QQQQ")
"""paddr size cmdline_paddr reserved"""
_MEMMAP_ENTRY = Struct("<QQII")
"""addr size type reserved"""

_NOTE = Struct("<III")
"""namesz descsz type; name and desc follow, each padded to 4 bytes"""
_NOTES_READ = 1024
"""As many notes of one file are looked at: real kernels have some twenty."""


class _Kernel(NamedTuple):
    segments: tuple[Segment, ...]
    rip: int


def probe(image: ImageFile) -> Found | None:
    """Tell whether this ELF file has a PVH entry. Raises ImageError when it has and is broken."""
    kernel = _parse(image)
    return None if kernel is None else Found(kernel.segments, CpuMode.PROTECTED, kernel.rip)


def plan(image: ImageFile, memory: GuestMemory, options: BootOptions) -> Plan:
    """Return the plan to start at the note's entry with start_info and all that it leads to.

    Raises:
        ImageError: the file is no PVH kernel, or does not fit, or its command line is too long for Linux.
        ValueError: the command line or the module list is too long.
    """
    kernel = _parse(image)
    if kernel is None:
        raise image.error(f"no PVH kernel: no ELF note Xen of type {XEN_ELFNOTE_PHYS32_ENTRY}", 0)
    cmdline = _cmdline(image, options)
    files = place_files(image, options.files, memory, kernel_end=end_of(kernel.segments))
    check_segments(image, kernel.segments, memory, files)
    entry = Entry(CpuMode.PROTECTED, kernel.rip, {"rbx": layout.BOOT_INFO})
    return Plan(kernel.segments, entry, files, _start_info(cmdline, files, memory))


def load(image: ImageFile, memory: GuestMemory, options: BootOptions) -> Entry:
    """Write kernel, modules and start_info into the guest and return how to start. Raises as `plan` does."""
    return plan(image, memory, options).carry_out(image, memory)


def _parse(image: ImageFile) -> _Kernel | None:
    elf = elf_format.read_elf(image)
    if elf is None:
        return None
    found = _find_entry_note(image, elf)
    if found is None:
        return None
    rip, at = found
    segments = elf_format.load_segments(image, elf)
    check_entry(image, rip, CpuMode.PROTECTED, segments, at=at)
    return _Kernel(segments, rip)


def _find_entry_note(image: ImageFile, elf: elf_format.ElfFile) -> tuple[int, int] | None:
    """Return the entry of the PVH note and its offset in the file, or None. The work is bounded by `_NOTES_READ`."""
    budget = _NOTES_READ
    for header in elf.headers:
        if header.type != elf_format.PT_NOTE:
            continue
        image.check_range(header.offset, header.filesz, at=header.described_at)
        at, end = header.offset, header.offset + header.filesz
        while at + _NOTE.size <= end:
            if not budget:
                raise image.error(f"more than {_NOTES_READ} notes", at)
            budget -= 1
            namesz, descsz, type_ = image.unpack(_NOTE, at)
            name = at + _NOTE.size
            desc = name + align_up(namesz, 4)
            if desc + descsz > end:
                raise image.error(f"note of {namesz}+{descsz} bytes leaves its PT_NOTE (0x{end:x})", at)
            if type_ == XEN_ELFNOTE_PHYS32_ENTRY and namesz == 4 and image.read(name, 4) == b"Xen\0":
                if descsz not in (4, 8):
                    raise image.error(f"PVH note of {descsz} bytes: 4 or 8 are wanted", at)
                return int.from_bytes(image.read(desc, descsz), "little"), desc
            at = desc + align_up(descsz, 4)
    return None


def _cmdline(image: ImageFile, options: BootOptions) -> bytes:
    """Return the command line, NUL-terminated. Raises ImageError when Linux would cut it off, ValueError."""
    line = linux_cmdline(options)
    if len(line) > COMMAND_LINE_SIZE:
        version = linux_version(image)
        if version is not None:
            message = f"command line of {len(line) - 1} bytes{options.shares}: Linux {version} takes"
            raise image.error(f"{message} {COMMAND_LINE_SIZE - 1}", 0)
    return line


def _start_info(line: bytes, files: tuple[PlacedFile, ...], memory: GuestMemory) -> tuple[tuple[int, bytes], ...]:
    strings = Arena(layout.COMMAND_LINES, layout.COMMAND_LINES_SIZE, "command lines")
    cmdline = strings.put(line)
    tables = Arena(layout.BOOT_INFO + _START_INFO.size, layout.BOOT_INFO_SIZE - _START_INFO.size, "boot information")
    memory_map = layout.memory_map(memory.size)
    memmap = tables.put(b"".join(_MEMMAP_ENTRY.pack(gpa, size, kind, 0) for gpa, size, kind in memory_map))
    modlist = tables.put(
        b"".join(
            _MODLIST_ENTRY.pack(file.gpa, file.size, strings.put(c_string(file.cmdline)) if file.cmdline else 0, 0)
            for file in files
        )
    )
    start_info = _START_INFO.pack(
        XEN_HVM_START_MAGIC_VALUE,
        START_INFO_VERSION,
        0,
        len(files),
        modlist if files else 0,
        cmdline,
        layout.ACPI_TABLES if read_rsdp(memory) else 0,
        memmap,
        len(memory_map),
        0,
    )
    return ((layout.BOOT_INFO, start_info), *tables.tables, *strings.tables)

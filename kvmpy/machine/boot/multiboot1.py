"""Multiboot 1: a header in the first 8 KiB, an ELF file or load addresses, 32-bit protected mode.

The kernel starts with eax = 0x2BADB002 and ebx = the information structure::

    BOOT_INFO +0x00  multiboot_info     116 bytes, unused fields 0
              +0x78  memory map          24 bytes an entry, its own size first
              ...    module list         16 bytes an entry
    COMMAND_LINES    strings

Served: memory sizes, command line, modules (always page-aligned), memory map, loader name. An ELF64 file is entered
in protected mode all the same. The video request (flag bit 2) is not served: there is no display.

Source: Multiboot 0.6.96 §3.1 to §3.3.
"""

from struct import Struct
from typing import NamedTuple

from kvmpy.machine import layout
from kvmpy.machine.boot.image import ImageFile
from kvmpy.machine.boot.multiboot import (
    LOADER_NAME,
    LoadAddresses,
    addressed_segment,
    elf_segments,
    find_header,
    memory_sizes,
)
from kvmpy.machine.boot.place import Arena, c_string, check_entry, check_segments, end_of, place_files
from kvmpy.machine.boot.plan import BootOptions, CpuMode, Entry, Found, PlacedFile, Plan, Segment
from kvmpy.machine.memory import GuestMemory

TITLE = "multiboot 1"
SERVES = frozenset({"append", "modules", "initrd"})

HEADER_MAGIC = 0x1BADB002
BOOTLOADER_MAGIC = 0x2BADB002
SEARCH = 8192

# Header flags. Bits 0 to 15 are demands: a loader that does not know one must refuse.
FLAG_PAGE_ALIGN = 1 << 0
FLAG_MEMORY_INFO = 1 << 1
FLAG_VIDEO = 1 << 2
FLAG_ADDRESSES = 1 << 16
_DEMANDS = 0xFFFF
_SERVED = FLAG_PAGE_ALIGN | FLAG_MEMORY_INFO | FLAG_VIDEO

# Which fields of the information structure are valid.
INFO_MEMORY = 1 << 0
INFO_CMDLINE = 1 << 2
INFO_MODULES = 1 << 3
INFO_MEMORY_MAP = 1 << 6
INFO_LOADER_NAME = 1 << 9

_HEADER = Struct("<III")
"""magic flags checksum"""
_ADDRESSES = Struct("<5I")
"""header_addr load_addr load_end_addr bss_end_addr entry_addr, behind _HEADER"""
_INFO = Struct("<7I16x6I48x")
"""flags mem_lower mem_upper boot_device cmdline mods_count mods_addr; symbols; mmap_length mmap_addr drives_length
drives_addr config_table boot_loader_name; APM, VBE and framebuffer"""
_MODULE = Struct("<IIII")
"""mod_start mod_end string reserved"""
_MEMORY_MAP_ENTRY = Struct("<IQQI")
"""size of the rest, base_addr length type"""


class _Kernel(NamedTuple):
    segments: tuple[Segment, ...]
    rip: int
    flags: int


def probe(image: ImageFile) -> Found | None:
    """Tell whether the file has a multiboot 1 header. Raises ImageError when it has and is broken."""
    kernel = _parse(image)
    if kernel is None:
        return None
    video = ("asks for a video mode: there is no display, none is reported",) if kernel.flags & FLAG_VIDEO else ()
    return Found(kernel.segments, CpuMode.PROTECTED, kernel.rip, video)


def plan(image: ImageFile, memory: GuestMemory, options: BootOptions) -> Plan:
    """Return the plan to start at the entry address with the information structure.

    Raises:
        ImageError: the file is no multiboot 1 kernel, or does not fit.
        ValueError: the command line or the module list is too long.
    """
    kernel = _parse(image)
    if kernel is None:
        raise image.error(f"no multiboot 1 header (0x{HEADER_MAGIC:x}) in the first {SEARCH} bytes", 0)
    files = place_files(image, options.files, memory, kernel_end=end_of(kernel.segments))
    check_segments(image, kernel.segments, memory, files)
    entry = Entry(CpuMode.PROTECTED, kernel.rip, {"rax": BOOTLOADER_MAGIC, "rbx": layout.BOOT_INFO})
    return Plan(kernel.segments, entry, files, _information(options.append, files, memory))


def load(image: ImageFile, memory: GuestMemory, options: BootOptions) -> Entry:
    """Write kernel, modules and information into the guest and return how to start. Raises as `plan` does."""
    return plan(image, memory, options).carry_out(image, memory)


def _parse(image: ImageFile) -> _Kernel | None:
    at = find_header(image, HEADER_MAGIC, words=3, alignment=4, limit=SEARCH)
    if at is None:
        return None
    _, flags, _ = image.unpack(_HEADER, at)
    unknown = flags & _DEMANDS & ~_SERVED
    if unknown:
        raise image.error(f"multiboot flags 0x{flags:x} demand what is unknown: 0x{unknown:x}", at + 4)
    entry_at = at
    if flags & FLAG_ADDRESSES:
        fields = at + _HEADER.size
        if fields + _ADDRESSES.size > SEARCH:
            raise image.error(f"the multiboot header is not within the first {SEARCH} bytes", at)
        *addresses, rip = image.unpack(_ADDRESSES, fields)
        segment = addressed_segment(image, LoadAddresses(*addresses), header_at=at, described_at=fields)
        segments: tuple[Segment, ...] = (segment,)
        entry_at = fields + 16
    else:
        segments, rip = elf_segments(image, header_at=at)
    check_entry(image, rip, CpuMode.PROTECTED, segments, at=entry_at)
    return _Kernel(segments, rip, flags)


def _information(append: str, files: tuple[PlacedFile, ...], memory: GuestMemory) -> tuple[tuple[int, bytes], ...]:
    strings = Arena(layout.COMMAND_LINES, layout.COMMAND_LINES_SIZE, "command lines")
    cmdline = strings.put(c_string(append))
    loader_name = strings.put(LOADER_NAME)
    tables = Arena(layout.BOOT_INFO + _INFO.size, layout.BOOT_INFO_SIZE - _INFO.size, "boot information")
    rest = _MEMORY_MAP_ENTRY.size - 4
    memory_map = b"".join(_MEMORY_MAP_ENTRY.pack(rest, *entry) for entry in layout.memory_map(memory.size))
    mmap_addr = tables.put(memory_map)
    modules = b"".join(_MODULE.pack(file.gpa, file.end, strings.put(c_string(file.cmdline)), 0) for file in files)
    mem_lower, mem_upper = memory_sizes(memory)
    info = _INFO.pack(
        INFO_MEMORY | INFO_CMDLINE | INFO_MODULES | INFO_MEMORY_MAP | INFO_LOADER_NAME,
        mem_lower,
        mem_upper,
        0,
        cmdline,
        len(files),
        tables.put(modules),
        len(memory_map),
        mmap_addr,
        0,
        0,
        0,
        loader_name,
    )
    return ((layout.BOOT_INFO, info), *tables.tables, *strings.tables)

"""Multiboot 2: a header of tags in the first 32 KiB, an ELF file or load addresses, 32-bit protected mode.

The kernel starts with eax = 0x36D76289 and ebx = BOOT_INFO, where a list of tags lies (`multiboot2_info`). A tag of
the header that is not marked optional and asks for what this machine has not (a framebuffer, an EGA console, an
information that nobody here knows) refuses the boot. The EFI tags are passed over: this machine is not EFI.

A kernel with the relocatable tag is loaded where its addresses say when that lies in its range and in RAM, unless it
prefers the lowest or the highest place; all its addresses move with it, and the load-base tag tells it.

Source: Multiboot2 2.0 §3.1 (header), §3.2 (machine state).
"""

from struct import Struct
from typing import NamedTuple

from kvmpy.machine import layout
from kvmpy.machine.boot import multiboot2_info
from kvmpy.machine.boot.image import ImageFile
from kvmpy.machine.boot.multiboot import LoadAddresses, addressed_segment, elf_segments, find_header
from kvmpy.machine.boot.place import (
    align_down,
    align_up,
    check_entry,
    check_segments,
    end_of,
    low_ram_end,
    place_files,
)
from kvmpy.machine.boot.plan import BootOptions, CpuMode, Entry, Found, PlacedFile, Plan, Segment
from kvmpy.machine.memory import GuestMemory

TITLE = "multiboot 2"
SERVES = frozenset({"append", "modules", "initrd"})

HEADER_MAGIC = 0xE85250D6
BOOTLOADER_MAGIC = 0x36D76289
SEARCH = 32768
ARCHITECTURE_I386 = 0

TAG_END, TAG_INFORMATION_REQUEST, TAG_ADDRESS, TAG_ENTRY_ADDRESS, TAG_CONSOLE_FLAGS = 0, 1, 2, 3, 4
TAG_FRAMEBUFFER, TAG_MODULE_ALIGN, TAG_EFI_BOOT_SERVICES, TAG_EFI_ENTRY_I386, TAG_EFI_ENTRY_AMD64 = 5, 6, 7, 8, 9
TAG_RELOCATABLE = 10
TAG_OPTIONAL = 1 << 0
CONSOLE_REQUIRED = 1 << 0
PREFER_LOWEST, PREFER_HIGHEST = 1, 2

_HEADER = Struct("<IIII")
"""magic architecture header_length checksum"""
_TAG = Struct("<HHI")
"""type flags size"""
_LEAST_PAYLOAD = {
    TAG_ADDRESS: 16,
    TAG_ENTRY_ADDRESS: 4,
    TAG_CONSOLE_FLAGS: 4,
    TAG_FRAMEBUFFER: 12,
    TAG_RELOCATABLE: 16,
}
"""Bytes behind the tag's header, without which the tag says nothing."""
_LAST_KNOWN_TAG = TAG_RELOCATABLE


class _Tag(NamedTuple):
    """A header tag; ``at`` is its offset in the file."""

    type: int
    optional: bool
    payload: bytes
    at: int

    def words(self, count: int) -> tuple[int, ...]:
        """Return the first ``count`` 32-bit words behind the tag's header."""
        return Struct(f"<{count}I").unpack_from(self.payload)


class _Kernel(NamedTuple):
    segments: tuple[Segment, ...]
    rip: int
    relocatable: _Tag | None
    notes: tuple[str, ...]


def probe(image: ImageFile) -> Found | None:
    """Tell whether the file has a multiboot 2 header. Raises ImageError when it has and is broken."""
    kernel = _parse(image)
    if kernel is None:
        return None
    notes = kernel.notes
    if kernel.relocatable is not None:
        low, high, alignment, _ = kernel.relocatable.words(4)
        notes += (f"relocatable within 0x{low:x}..0x{high:x}, aligned to 0x{alignment:x}",)
    return Found(kernel.segments, CpuMode.PROTECTED, kernel.rip, notes)


def plan(image: ImageFile, memory: GuestMemory, options: BootOptions) -> Plan:
    """Return the plan to start at the entry address with the tag list.

    Raises:
        ImageError: the file is no multiboot 2 kernel, demands what is not served, or does not fit.
        ValueError: the boot information (command line and modules) is too long.
    """
    kernel = _parse(image)
    if kernel is None:
        raise image.error(f"no multiboot 2 header (0x{HEADER_MAGIC:x}) in the first {SEARCH} bytes", 0)
    files = place_files(image, options.files, memory, kernel_end=end_of(kernel.segments))
    segments, rip, load_base = kernel.segments, kernel.rip, None
    if kernel.relocatable is not None:
        load_base = _load_base(image, kernel, memory, files)
        moved = load_base - _base(segments)
        segments = tuple(segment._replace(gpa=segment.gpa + moved) for segment in segments)
        rip += moved
    check_segments(image, segments, memory, files)
    entry = Entry(CpuMode.PROTECTED, rip, {"rax": BOOTLOADER_MAGIC, "rbx": layout.BOOT_INFO})
    information = multiboot2_info.information(options.append, files, memory, load_base)
    return Plan(segments, entry, files, ((layout.BOOT_INFO, information),))


def load(image: ImageFile, memory: GuestMemory, options: BootOptions) -> Entry:
    """Write kernel, modules and information into the guest and return how to start. Raises as `plan` does."""
    return plan(image, memory, options).carry_out(image, memory)


def _parse(image: ImageFile) -> _Kernel | None:
    at = find_header(image, HEADER_MAGIC, words=4, alignment=8, limit=SEARCH)
    if at is None:
        return None
    every_tag = _read_tags(image, at)
    notes = _check_demands(image, every_tag)
    tags = {tag.type: tag for tag in every_tag}
    segments, rip, entry_at = _where(image, tags, at)
    check_entry(image, rip, CpuMode.PROTECTED, segments, at=entry_at)
    relocatable = tags.get(TAG_RELOCATABLE)
    if relocatable is not None:
        low, high, alignment, _ = relocatable.words(4)
        if not alignment or alignment & (alignment - 1):
            raise image.error(f"relocatable tag: alignment {alignment} is no power of two", relocatable.at)
        if low > high:
            raise image.error(f"relocatable tag: min_addr 0x{low:x} is above max_addr 0x{high:x}", relocatable.at)
    return _Kernel(segments, rip, relocatable, notes)


def _read_tags(image: ImageFile, at: int) -> list[_Tag]:
    """Return the header's tags in their order, without the end tag; tags begin at multiples of 8."""
    _, architecture, length, _ = image.unpack(_HEADER, at)
    if architecture != ARCHITECTURE_I386:
        raise image.error(f"multiboot 2 architecture {architecture}: 0 (i386) is wanted", at + 4)
    end = at + length
    if length < _HEADER.size + _TAG.size or end > SEARCH or end > image.size:
        allowed = min(SEARCH, image.size) - at
        message = f"multiboot 2 header of {length} bytes: {_HEADER.size + _TAG.size} to {allowed} are possible"
        raise image.error(message, at + 8)
    tags: list[_Tag] = []
    tag_at = at + _HEADER.size
    while tag_at + _TAG.size <= end:
        type_, flags, size = image.unpack(_TAG, tag_at)
        if type_ == TAG_END:
            return tags
        if size < _TAG.size + _LEAST_PAYLOAD.get(type_, 0) or tag_at + size > end:
            raise image.error(f"header tag {type_} of {size} bytes does not fit its header or its type", tag_at)
        payload = image.read(tag_at + _TAG.size, size - _TAG.size)
        tags.append(_Tag(type_, bool(flags & TAG_OPTIONAL), payload, tag_at))
        tag_at = at + align_up(tag_at + size - at, 8)
    raise image.error("multiboot 2 header without an end tag", min(tag_at, end))


def _check_demands(image: ImageFile, tags: list[_Tag]) -> tuple[str, ...]:
    """Return notes on what is passed over; refuse a tag that is not optional and not served."""
    notes = []
    for tag in tags:
        unserved = _unserved(tag)
        if unserved and not tag.optional:
            raise image.error(f"multiboot 2 header demands {unserved}", tag.at)
        if unserved:
            notes.append(f"passed over: {unserved}")
    return tuple(notes)


def _unserved(tag: _Tag) -> str:
    """Return what of this tag the machine does not have, or ''."""
    if tag.type == TAG_INFORMATION_REQUEST:
        wanted = Struct("<I").iter_unpack(tag.payload[: align_down(len(tag.payload), 4)])
        unknown = [str(type_) for (type_,) in wanted if type_ not in multiboot2_info.UNDERSTOOD]
        return f"information of unknown type {', '.join(unknown[:4])}" if unknown else ""
    if tag.type == TAG_CONSOLE_FLAGS and tag.words(1)[0] & CONSOLE_REQUIRED:
        return "an EGA text console"
    if tag.type == TAG_FRAMEBUFFER:
        return "a framebuffer"
    return f"what tag {tag.type} means" if tag.type > _LAST_KNOWN_TAG else ""


def _where(image: ImageFile, tags: dict[int, _Tag], at: int) -> tuple[tuple[Segment, ...], int, int]:
    """Return the segments, the physical entry, and the offset of what says the entry."""
    address, entry = tags.get(TAG_ADDRESS), tags.get(TAG_ENTRY_ADDRESS)
    if address is None:
        segments, rip = elf_segments(image, header_at=at)
        return (segments, rip, at) if entry is None else (segments, entry.words(1)[0], entry.at)
    if entry is None:
        raise image.error("address tag without an entry address tag", address.at)
    addresses = LoadAddresses(*address.words(4))
    if addresses.load_addr == 0xFFFF_FFFF:
        # -1: the file is loaded from its beginning, wherever that puts it.
        addresses = addresses._replace(load_addr=addresses.header_addr - at)
        if addresses.load_addr < 0:
            raise image.error(f"header_addr 0x{addresses.header_addr:x} puts the file below 0", address.at)
    segment = addressed_segment(image, addresses, header_at=at, described_at=address.at)
    return (segment,), entry.words(1)[0], entry.at


def _base(segments: tuple[Segment, ...]) -> int:
    return min(segment.gpa for segment in segments)


def _load_base(image: ImageFile, kernel: _Kernel, memory: GuestMemory, files: tuple[PlacedFile, ...]) -> int:
    """Return the gpa for the lowest segment of a relocatable kernel, below the modules.

    Raises:
        ImageError: no place in the kernel's range has room.
    """
    assert kernel.relocatable is not None
    low, high, alignment, preference = kernel.relocatable.words(4)
    linked = _base(kernel.segments)
    size = max(segment.end for segment in kernel.segments) - linked
    end = min(high + 1, files[0].gpa if files else low_ram_end(memory))
    if preference not in (PREFER_LOWEST, PREFER_HIGHEST) and linked % alignment == 0 and low <= linked:
        below_tables = linked + size <= min(end, layout.LOW_RAM_END)
        if below_tables or layout.HIGH_MEMORY <= linked <= end - size:
            return linked
    lowest = align_up(max(low, layout.HIGH_MEMORY), alignment)
    highest = align_down(max(end - size, 0), alignment)
    if lowest > highest:
        message = f"no room for 0x{size:x} bytes aligned to 0x{alignment:x} in 0x{low:x}..0x{end - 1:x}"
        raise image.error(message, kernel.relocatable.at)
    return highest if preference == PREFER_HIGHEST else lowest

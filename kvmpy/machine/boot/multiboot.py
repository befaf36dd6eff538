"""What multiboot 1 and 2 share: finding the header, the load addresses of images that are not ELF, memory sizes.

Source: Multiboot 0.6.96 §3.1; Multiboot2 2.0 §3.1.
"""

from struct import Struct
from typing import NamedTuple

from kvmpy.machine import layout
from kvmpy.machine.boot import elf as elf_format
from kvmpy.machine.boot.image import ImageFile
from kvmpy.machine.boot.plan import Segment
from kvmpy.machine.memory import GuestMemory
from kvmpy.units import KiB

LOADER_NAME = b"kvmpy\0"


def find_header(image: ImageFile, magic: int, *, words: int, alignment: int, limit: int) -> int | None:
    """Return the offset of the first header in the first ``limit`` bytes, or None when there is no ``magic``.

    A header is ``words`` 32-bit words that begin with ``magic`` and sum to 0 modulo 2^32, at a multiple of
    ``alignment``.

    Raises:
        ImageError: there is the magic, and no checksum holds.
    """
    head = image.head(limit)
    layout_of_words = Struct(f"<{words}I")
    needle = magic.to_bytes(4, "little")
    wrong: int | None = None
    at = head.find(needle)
    while at >= 0 and at + layout_of_words.size <= len(head):
        if at % alignment == 0:
            if sum(layout_of_words.unpack_from(head, at)) % (1 << 32) == 0:
                return at
            wrong = at if wrong is None else wrong
        at = head.find(needle, at + 1)
    if wrong is not None:
        raise image.error(f"multiboot magic 0x{magic:x} with a wrong checksum", wrong)
    return None


class LoadAddresses(NamedTuple):
    """The address fields of a header (the a.out kludge), physical addresses of 32 bits."""

    header_addr: int
    load_addr: int
    load_end_addr: int
    """0: through the end of the file."""
    bss_end_addr: int
    """0: no bss."""


def addressed_segment(image: ImageFile, addresses: LoadAddresses, *, header_at: int, described_at: int) -> Segment:
    """Return what the address fields say is to be loaded; ``header_at`` is the offset of the header in the file.

    Raises:
        ImageError: the fields contradict each other or the file.
    """
    header_addr, load_addr, load_end, bss_end = addresses
    if load_addr > header_addr:
        raise image.error(f"load_addr 0x{load_addr:x} is above header_addr 0x{header_addr:x}", described_at)
    offset = header_at - (header_addr - load_addr)
    if offset < 0:
        raise image.error(f"load_addr 0x{load_addr:x} lies 0x{-offset:x} bytes before the file", described_at)
    if load_end and load_end < load_addr:
        raise image.error(f"load_end_addr 0x{load_end:x} is below load_addr 0x{load_addr:x}", described_at)
    size = load_end - load_addr if load_end else image.size - offset
    image.check_range(offset, size, at=described_at)
    if bss_end and bss_end < load_addr + size:
        raise image.error(f"bss_end_addr 0x{bss_end:x} is below the data's end 0x{load_addr + size:x}", described_at)
    memory_size = bss_end - load_addr if bss_end else size
    if not memory_size:
        raise image.error("the address fields load nothing", described_at)
    return Segment(load_addr, offset, size, memory_size, described_at)


def elf_segments(image: ImageFile, *, header_at: int) -> tuple[tuple[Segment, ...], int]:
    """Return the segments and the physical entry of an image that gives no load addresses, and so must be ELF.

    Raises:
        ImageError: it is no ELF executable.
    """
    elf = elf_format.read_elf(image)
    if elf is None:
        raise image.error("multiboot header without load addresses in a file that is not ELF", header_at)
    return elf_format.load_segments(image, elf), elf_format.physical_entry(elf)


def memory_sizes(memory: GuestMemory) -> tuple[int, int]:
    """Return mem_lower and mem_upper: KiB from 0, and KiB from 1 MiB up to the first hole."""
    low = memory.regions[0].size
    return layout.LOW_RAM_END // KiB, (low - layout.HIGH_MEMORY) // KiB

"""The block allocation table of a dynamic or differencing VHD: where each block of the disk lies in the file.

::

    disk   | block 0 | block 1 | block 2 | ...               block_size bytes each
                 \\________
    table  | sector  | UNALLOCATED | sector | ...            absolute, of the bitmap
                 \\
    file   ... | bitmap | data of the block | ...            a bit for each sector, the most significant first

All that the table says is checked when it is read: no block lies outside the file, on a header, or on another block.
The bitmaps are read when they are needed.

Not here: what an unallocated block, or a sector whose bit is 0, reads as. Source: Virtual Hard Disk Image Format
Specification 1.0, "Block Allocation Table and Data Blocks".
"""

import re
import sys
from array import array
from bisect import bisect_left
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

from kvmpy.errors import VhdFormatError
from kvmpy.storage.disk import SECTOR_SIZE
from kvmpy.storage.disk_file import DiskFile
from kvmpy.storage.vhd import FOOTER_SIZE, HEADER_SIZE, UNALLOCATED, bitmap_size, parse_header
from kvmpy.storage.vhd_footer import FoundFooter

MAX_BLOCKS = 1 << 22
"""Entries that we read, 16 MiB of them: the largest disk in blocks of 512 KiB."""
ENTRY_SIZE = 4
_RUNS = re.compile("0+|1+")
_STRIDE = 1024
_EMPTY = array("I", [UNALLOCATED]) * _STRIDE
WINDOW = 4096
"""Sectors around what is asked for that are told with it: a bound to what a damaged bitmap makes of one question."""


class Piece(NamedTuple):
    """``sectors`` sectors of the disk from ``sector`` on, which are in the file at ``offset``, or not in this file."""

    sector: int
    sectors: int
    offset: int | None

    @property
    def end(self) -> int:
        """The first sector behind it."""
        return self.sector + self.sectors


class BlockTable:
    """The header and the table of ``file``, whose footer is ``found``; checked.

    Raises:
        VhdFormatError: they are damaged.
    """

    def __init__(self, file: DiskFile, found: FoundFooter) -> None:
        footer = found.footer
        self._file = file
        self._end = found.end
        self._disk_sectors = footer.current_size // SECTOR_SIZE
        self._check_inside(footer.data_offset, HEADER_SIZE, "the dynamic header", at=found.offset + 16)
        self.header = parse_header(file.read(footer.data_offset, HEADER_SIZE), footer, path=file.path)
        self.block_size = self.header.block_size
        self.bitmap_size = bitmap_size(self.block_size)
        self.block_sectors = self.block_size // SECTOR_SIZE
        self.count = -(-footer.current_size // self.block_size)
        if self.count > MAX_BLOCKS:
            message = f"{self.count} blocks: at most {MAX_BLOCKS} are read"
            raise VhdFormatError(message, path=file.path, offset=footer.data_offset + 32)
        header = (footer.data_offset, HEADER_SIZE)
        table = (self.header.table_offset, self.count * ENTRY_SIZE)
        self._check_inside(*table, "the table", at=footer.data_offset + 16)
        if _overlap(*header, *table):
            raise VhdFormatError("the table lies on its header", path=file.path, offset=footer.data_offset + 16)
        self._entries = _unpack(file.read(*table))
        self._check_entries(((0, FOOTER_SIZE), header, table))

    # --- the table ---

    def data_offset(self, block: int) -> int | None:
        """Return where the data of ``block`` begin in the file, or None when it is unallocated."""
        return None if self._entries[block] == UNALLOCATED else self.bitmap_offset(block) + self.bitmap_size

    def bitmap_offset(self, block: int) -> int:
        """Return where the bitmap of ``block``, which is allocated, is in the file."""
        return self._entries[block] * SECTOR_SIZE

    def allocated(self) -> list[int]:
        """Return the numbers of the blocks that have a place in the file, ascending."""
        entries, found = self._entries, list[int]()
        for start in range(0, len(entries), _STRIDE):
            # Most of a table is empty mostly, and compared at once.
            stride = entries[start : start + _STRIDE]
            if stride != _EMPTY[: len(stride)]:
                found += [block for block, entry in enumerate(stride, start) if entry != UNALLOCATED]
        return found

    def entry_offset(self, block: int) -> int:
        """Return where the entry of ``block`` is in the file."""
        return self.header.table_offset + block * ENTRY_SIZE

    def set_entry(self, block: int, entry: int) -> None:
        """Remember where ``block`` is: what the file says already."""
        self._entries[block] = entry

    # --- the disk ---

    def covering(self, sector: int, sectors: int) -> range:
        """Return the numbers of the blocks that a range of the disk touches."""
        return range(sector // self.block_sectors, -(-(sector + sectors) // self.block_sectors) if sectors else 0)

    def span(self, block: int) -> tuple[int, int]:
        """Return the first sector of ``block`` on the disk, and how many it has there: the last may have fewer."""
        first = block * self.block_sectors
        return first, min(self.block_sectors, self._disk_sectors - first)

    def bitmap(self, block: int) -> str:
        """Read the bitmap of an allocated block: a ``0`` or ``1`` for each sector. Raises DiskError."""
        data = self._file.read(self.bitmap_offset(block), -(-self.block_sectors // 8))
        return f"{int.from_bytes(data, 'big'):0{8 * len(data)}b}"[: self.block_sectors]

    def pieces(self, sector: int, sectors: int) -> Iterator[Piece]:
        """Yield where each part of the range is, without a gap and mostly more than was asked. Raises DiskError."""
        for block in self.covering(sector, sectors):
            first, count = self.span(block)
            start = max(sector - first, 0) // WINDOW * WINDOW
            end = min(-(-(sector + sectors - first) // WINDOW) * WINDOW, count)
            offset = self.data_offset(block)
            if offset is None:
                yield Piece(first + start, end - start, None)
                continue
            bitmap = self.bitmap(block)
            if "0" not in bitmap:
                yield Piece(first, count, offset)
                continue
            for run in _RUNS.finditer(bitmap, start, end):
                present = run[0].startswith("1")
                place = offset + run.start() * SECTOR_SIZE if present else None
                yield Piece(first + run.start(), len(run[0]), place)

    # --- checks ---

    def _check_inside(self, offset: int, size: int, what: str, *, at: int) -> None:
        """Refuse a structure on the footer's copy or beyond the end; ``at`` is the offset of what says where it is."""
        if offset < FOOTER_SIZE or offset + size > self._end:
            allowed = f"it must lie between 0x{FOOTER_SIZE:x} and 0x{self._end:x}"
            message = f"{what} is at 0x{offset:x}, {size} bytes: {allowed}"
            raise VhdFormatError(message, path=self._file.path, offset=at)

    def _check_entries(self, taken: tuple[tuple[int, int], ...]) -> None:
        """Refuse a block outside the file, on another block, or on one of the ``taken`` places (offset and size)."""
        size = self.bitmap_size + self.block_size
        sectors = sorted(map(self._entries.__getitem__, self.allocated()))
        for sector, following in pairwise(sectors):
            if following - sector < size // SECTOR_SIZE:
                raise self._misplaced(following, "lies on another block")
        if sectors and sectors[-1] * SECTOR_SIZE + size > self._end:
            raise self._misplaced(sectors[-1], f"ends beyond 0x{self._end:x}")
        for offset, length in taken:
            # They lie on no other: only the last that begins before the end of the place can reach into it.
            before = bisect_left(sectors, -(-(offset + length) // SECTOR_SIZE))
            if before and sectors[before - 1] * SECTOR_SIZE + size > offset:
                raise self._misplaced(sectors[before - 1], "lies on the headers")

    def _misplaced(self, sector: int, what: str) -> VhdFormatError:
        block = self._entries.index(sector)
        message = f"block {block}, at sector 0x{sector:x} of the file, {what}"
        return VhdFormatError(message, path=self._file.path, offset=self.entry_offset(block))


def _unpack(data: bytes) -> "array[int]":
    entries = array("I", data)
    if sys.byteorder == "little":
        entries.byteswap()
    return entries


def _overlap(first: int, first_size: int, second: int, second_size: int) -> bool:
    return first < second + second_size and second < first + first_size

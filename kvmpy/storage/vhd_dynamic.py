"""A dynamic VHD: a file that has only the blocks that were written. Read and written in place.

A block without a place in the file, and a sector whose bit is 0, read as zeros. The engine is told of a block when it
comes there first; before it writes the block has a place, and all its bits are 1.

Not here: how a block gets its place (`vhd_growth`). Blocks are never given back to the file; their room is, to the
host. Source: Virtual Hard Disk Image Format Specification 1.0, "Dynamic Disk Image".
"""

from typing import Self

from kvmpy.storage import files
from kvmpy.storage.disk import SECTOR_SIZE, ZEROS, Extent
from kvmpy.storage.disk_file import DiskFile
from kvmpy.storage.vhd_blocks import BlockTable
from kvmpy.storage.vhd_footer import FoundFooter
from kvmpy.storage.vhd_growth import Growth
from kvmpy.units import PAGE_SIZE

MAX_RUNS = 1 << 16
"""Runs of unallocated blocks that `DynamicVhd.table` tells; an engine asks for the rest."""


class DynamicVhd:
    """A DiskImage of ``file``, which it owns.

    Raises:
        VhdFormatError: it is damaged.
    """

    def __init__(self, file: DiskFile, found: FoundFooter) -> None:
        self._file = file
        self._blocks = BlockTable(file, found)
        self._growth = None if file.readonly else Growth(file, self._blocks, found)
        self.size = found.footer.current_size
        self.readonly = file.readonly
        self.alignment = file.alignment

    def table(self) -> list[Extent]:
        """Return the unallocated blocks; what is in the others their bitmaps say, which nobody has read yet."""
        extents: list[Extent] = []
        per_block, sectors = self._blocks.block_sectors, self.size // SECTOR_SIZE
        first = 0
        for block in [*self._blocks.allocated(), self._blocks.count]:
            if block > first:
                end = min(block * per_block, sectors)
                extents.append(Extent(first * per_block, end - first * per_block, ZEROS))
            if len(extents) == MAX_RUNS:
                break
            first = block + 1
        return extents

    def map(self, sector: int, sectors: int, *, write: bool) -> list[Extent]:
        """Return extents for the range; with ``write`` its blocks have a place in the file, and no bit is 0.

        Raises:
            OSError: the host refused.
            DiskError: it is read-only, or full, or its file was cut off.
        """
        self._file.check_access(sector, sectors, self.size, write=write)
        if write and self._growth is not None:
            blocks = self._blocks.covering(sector, sectors)
            self._growth.allocate([block for block in blocks if self._blocks.data_offset(block) is None])
            self._growth.complete(blocks)
        return [self._extent(*piece) for piece in self._blocks.pieces(sector, sectors)]

    def zero(self, sector: int, sectors: int) -> list[Extent]:
        """Punch holes into those blocks of the range that have a place, which they keep. Raises OSError, DiskError."""
        self._file.check_access(sector, sectors, self.size, write=True)
        for piece in self._blocks.pieces(sector, sectors):
            first, end = max(sector, piece.sector), min(sector + sectors, piece.end)
            if piece.offset is not None and first < end:
                offset = piece.offset + (first - piece.sector) * SECTOR_SIZE
                files.zero(self._file.unaligned_fd, offset, (end - first) * SECTOR_SIZE)
        files.fdatasync(self._file.unaligned_fd)
        return self.map(sector, sectors, write=False)

    def _extent(self, sector: int, sectors: int, offset: int | None) -> Extent:
        if offset is None:
            return Extent(sector, sectors, ZEROS)
        return Extent(sector, sectors, self._fd_for(offset), offset, not self.readonly, self._file.unaligned_fd)

    def _fd_for(self, offset: int) -> int:
        """Return the descriptor for data at ``offset``: past the page cache only where they have pages of their own.

        Bitmaps, table and footer are written by way of the cache, a page at a time. In the files of other programs
        data share pages with them, and what goes past the cache at the same moment could be lost.
        """
        own_pages = offset % PAGE_SIZE == 0 and self._blocks.block_size % PAGE_SIZE == 0
        return self._file.fd if own_pages else self._file.unaligned_fd

    def close(self) -> None:
        """Make all durable and close; closing twice is harmless."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

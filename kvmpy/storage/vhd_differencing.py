"""A differencing VHD: the blocks that changed since its parent, and the parent. Only read.

::

    child   | block 0      |  unallocated  | block 2: bits 1100... |
    parent  |              |  read         |         read where 0  |  (zeros behind its end)

The parent may be a differencing VHD too. Not here: finding it (`vhd_parent`). Source: Virtual Hard Disk Image Format
Specification 1.0, "Differencing Hard Disk Image".
"""

from collections.abc import Iterator
from typing import Self

from kvmpy.errors import DiskError
from kvmpy.storage.disk import SECTOR_SIZE, ZEROS, Extent
from kvmpy.storage.disk_file import DiskFile
from kvmpy.storage.extents import clip
from kvmpy.storage.vhd_blocks import BlockTable
from kvmpy.storage.vhd_footer import Chain, FoundFooter
from kvmpy.storage.vhd_parent import open_parent


class DifferencingVhd:
    """A DiskImage of ``file``, which it owns, and of its parent; ``chain`` are the files whose ancestor it is.

    Raises:
        DiskError: it was opened for writing, or its parent cannot be opened.
        VhdFormatError: it or its parent is damaged, or the parent is not the one that it was made of.
    """

    def __init__(self, file: DiskFile, found: FoundFooter, chain: Chain = ()) -> None:
        if not file.readonly:
            message = "a differencing VHD is only read: export it to have a disk that can be written"
            raise DiskError(message, path=file.path, offset=found.offset + 60)
        self._file = file
        self._blocks = BlockTable(file, found)
        self._parent = open_parent(file, found.footer.data_offset, self._blocks.header, chain)
        self.size = found.footer.current_size
        self.readonly = True
        self.alignment = max(file.alignment, self._parent.alignment)

    def table(self) -> list[Extent]:
        """Return nothing: where a sector is only the bitmaps of the whole chain say."""
        return []

    def map(self, sector: int, sectors: int, *, write: bool) -> list[Extent]:
        """Return extents for the range, in whichever file of the chain it is. Raises OSError, DiskError."""
        self._file.check_access(sector, sectors, self.size, write=write)
        extents: list[Extent] = []
        for piece in self._blocks.pieces(sector, sectors):
            if piece.offset is None:
                extents += self._from_parent(piece.sector, piece.end)
            else:
                fd, unaligned_fd = self._file.fd, self._file.unaligned_fd
                extents.append(Extent(piece.sector, piece.sectors, fd, piece.offset, unaligned_fd=unaligned_fd))
        return extents

    def _from_parent(self, first: int, end: int) -> Iterator[Extent]:
        """Yield what the parent has for exactly the sectors from ``first`` to ``end``."""
        inside = max(first, min(end, self._parent.size // SECTOR_SIZE))
        if first < inside:
            yield from clip(self._parent.map(first, inside - first, write=False), first, inside)
        if inside < end:
            yield Extent(inside, end - inside, ZEROS)

    def zero(self, sector: int, sectors: int) -> list[Extent]:
        """Refuse: it is only read. Raises DiskError."""
        return self.map(sector, sectors, write=True)

    def close(self) -> None:
        """Close it and its parent; closing twice is harmless."""
        self._file.close()
        self._parent.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

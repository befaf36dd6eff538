"""New disks in files: what each format writes around the bytes of the disk.

A writer is made for an empty file and the size of the disk, takes the bytes that are not zeros, in any order, and is
finished. Until then the file is nobody's disk, so nothing here is ordered or synced: it gets its name when it is whole
(`new_name`).

Not here: growing a disk that somebody uses (`vhd_growth`), and page blobs (`blob_import`).
"""

import sys
from array import array
from typing import Protocol

from kvmpy.storage import files
from kvmpy.storage.disk import SECTOR_SIZE
from kvmpy.storage.vhd import (
    UNALLOCATED,
    DiskType,
    bitmap_size,
    block_place,
    new_footer,
    new_header,
    whole_bitmap,
)


class Writer(Protocol):
    """What fills a new disk."""

    def write(self, offset: int, data: memoryview) -> None:
        """Put ``data`` at ``offset`` of the disk. Raises OSError."""

    def finish(self) -> None:
        """Write the rest: now the file is the disk. Raises OSError."""


class RawWriter:
    """The file is the disk."""

    def __init__(self, fd: int, size: int) -> None:
        self._fd = fd
        files.truncate(fd, size)

    def write(self, offset: int, data: memoryview) -> None:
        files.pwrite_all(self._fd, data, offset)

    def finish(self) -> None:
        """Nothing is left to do."""


class FixedVhdWriter:
    """The file is the disk and a footer."""

    def __init__(self, fd: int, size: int) -> None:
        self._fd = fd
        self._size = size

    def write(self, offset: int, data: memoryview) -> None:
        files.pwrite_all(self._fd, data, offset)

    def finish(self) -> None:
        files.pwrite_all(self._fd, new_footer(self._size, DiskType.FIXED).to_bytes(), self._size)


class DynamicVhdWriter:
    """The file has the blocks of the disk that are not all zeros, in the order in which they came."""

    def __init__(self, fd: int, size: int) -> None:
        self._fd = fd
        self._footer = new_footer(size, DiskType.DYNAMIC).to_bytes()
        self._header = new_header(size)
        self._entries = array("I", [UNALLOCATED]) * self._header.max_table_entries
        table_size = len(self._entries) * self._entries.itemsize
        self._end = -(-(self._header.table_offset + table_size) // SECTOR_SIZE) * SECTOR_SIZE

    def write(self, offset: int, data: memoryview) -> None:
        block_size = self._header.block_size
        done = 0
        while done < len(data):
            block, within = divmod(offset + done, block_size)
            piece = data[done : done + block_size - within]
            files.pwrite_all(self._fd, piece, self._data_offset(block) + within)
            done += len(piece)

    def _data_offset(self, block: int) -> int:
        """Return where the data of ``block`` go, which gets a place when it has none."""
        block_size = self._header.block_size
        if self._entries[block] == UNALLOCATED:
            place = block_place(self._end, block_size)
            files.pwrite_all(self._fd, whole_bitmap(block_size), place)
            self._entries[block] = place // SECTOR_SIZE
            self._end = place + bitmap_size(block_size) + block_size
        return self._entries[block] * SECTOR_SIZE + bitmap_size(block_size)

    def finish(self) -> None:
        table = array("I", self._entries)
        if sys.byteorder == "little":
            table.byteswap()
        # Behind the table's last entry, up to the sector's end, no block is allocated either.
        padding = b"\xff" * (-len(table) * table.itemsize % SECTOR_SIZE)
        files.pwrite_all(self._fd, self._footer + self._header.to_bytes() + table.tobytes() + padding, 0)
        files.pwrite_all(self._fd, self._footer, self._end)


WRITERS: dict[str, type[RawWriter | FixedVhdWriter | DynamicVhdWriter]] = {
    "raw": RawWriter,
    "vhd-fixed": FixedVhdWriter,
    "vhd-dynamic": DynamicVhdWriter,
}

"""How a dynamic VHD grows by a block, so that a crash at any point leaves the old disk or the new one.

::

    | copy | header | table | ... blocks | F |                                the file as it was, F its footer

    1. | copy | header | table | ... blocks | F |      (hole)           | F | the same footer behind the new end
       fdatasync                                                              now the place is the file's
    2. | copy | header | table | ... blocks |   | 1111 |   (hole)       | F | the new block's bitmap, all ones
       |      |        | entry |                                              and where it is
       fdatasync                                                              now the guest may write there

Before the first fdatasync is done the file ends with the one footer or the other, and nothing names the place. After
it the two writes of 2 may reach the disk in any order: an entry without its bitmap shows a block whose data are a
hole, which reads as the zeros that were there. So the file is a whole VHD at any moment, for every reader of the
format. Data are never written here: what lies behind an old end reads as zeros already. A place that a crash left
without an entry is lost, and stays a hole.

Source: Virtual Hard Disk Image Format Specification 1.0, "Dynamic Disk Image".
"""

import errno
import os
import re

from kvmpy.errors import DiskError
from kvmpy.storage import files
from kvmpy.storage.disk import SECTOR_SIZE, SyncFailed
from kvmpy.storage.disk_file import DiskFile
from kvmpy.storage.vhd import UNALLOCATED, block_place, whole_bitmap
from kvmpy.storage.vhd_blocks import ENTRY_SIZE, BlockTable
from kvmpy.storage.vhd_footer import FoundFooter


class Growth:
    """What gives blocks of ``table`` their places in ``file``; a footer that is missing at the end is put back first.

    Its methods raise OSError when the host refuses. Once a sync has failed all of them do: the kernel forgets what it
    could not write.
    """

    def __init__(self, file: DiskFile, table: BlockTable, found: FoundFooter) -> None:
        self._file = file
        self._fd = file.unaligned_fd
        self._table = table
        self._footer = found.data
        self._bitmap = whole_bitmap(table.block_size)
        self._end = found.end
        """Where the footer is, and the next block goes."""
        self._room: list[int] = []
        """Places inside the file that no entry names."""
        self._sync_failed = False
        if found.damage is not None:
            self._move_footer(found.end)

    def allocate(self, blocks: list[int]) -> None:
        """Give each of these unallocated blocks a place, durably: it reads as zeros and may be written.

        Raises:
            DiskError: the file is as long as the table can tell.
        """
        if not blocks:
            return
        self._make_room(len(blocks))
        places = self._room[: len(blocks)]
        for place in places:
            files.pwrite_all(self._fd, self._bitmap, place)
        # Taken before they are named: should that fail, the file may name them all the same.
        del self._room[: len(blocks)]
        for block, place in zip(blocks, places, strict=True):
            entry = (place // SECTOR_SIZE).to_bytes(ENTRY_SIZE, "big")
            files.pwrite_all(self._fd, entry, self._table.entry_offset(block))
        self.sync()
        for block, place in zip(blocks, places, strict=True):
            self._table.set_entry(block, place // SECTOR_SIZE)

    def _make_room(self, blocks: int) -> None:
        """Have places for so many blocks; those that an earlier failure left over are among them."""
        places: list[int] = []
        end = self._end
        while len(self._room) + len(places) < blocks:
            places.append(block_place(end, self._table.block_size))
            end = places[-1] + self._table.bitmap_size + self._table.block_size
        if end > UNALLOCATED * SECTOR_SIZE:
            raise DiskError("is full: its table cannot name a place so far behind", path=self._file.path, offset=end)
        if places:
            self._move_footer(end)
            self._room += places

    def _move_footer(self, end: int) -> None:
        """Put the footer to ``end``, durably: what lies before it is the file's, and zeros where it is new."""
        files.pwrite_all(self._fd, self._footer, end)
        # Also should the sync fail: no later block may lie on this footer's bytes.
        self._end = end
        self.sync()

    def complete(self, blocks: range) -> None:
        """Set the bits that other programs left 0 in the bitmaps of these allocated blocks, durably.

        Zeros come first: a bit alone would show what lay in the file.
        """
        bitmaps = {block: bitmap for block in blocks if "0" in (bitmap := self._table.bitmap(block))}
        if not bitmaps:
            return
        for block, bitmap in bitmaps.items():
            for run in re.finditer("0+", bitmap):
                offset = self._table.bitmap_offset(block) + self._table.bitmap_size + run.start() * SECTOR_SIZE
                files.zero(self._fd, offset, len(run[0]) * SECTOR_SIZE)
        self.sync()
        for block in bitmaps:
            files.pwrite_all(self._fd, self._bitmap, self._table.bitmap_offset(block))
        self.sync()

    def sync(self) -> None:
        """Make durable what was written."""
        if self._sync_failed:
            raise SyncFailed(errno.EIO, os.strerror(errno.EIO))
        try:
            files.fdatasync(self._fd)
        except OSError:
            self._sync_failed = True
            raise

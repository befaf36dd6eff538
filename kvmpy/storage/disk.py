"""What a disk image is to whoever executes requests on it: a flat table of extents, and a way to have it changed.

::

    sector 0                                                                      size / 512
    |  extent: fd 7, offset 0      |  extent: reads as zeros  |      gap       |  extent  |
       read and written in place      written: `map` first      used: `map` first

An engine (C or Python) reads and writes what the table covers by itself. Where it does not, because nothing is
allocated there, or what is there is shared with a snapshot or another blob, the engine asks the image, which does
what is needed, durably, and returns the extents that now describe the range. The engine knows no format.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

SECTOR_SIZE = 512
"""Bytes of a sector, which is what virtio-blk and VHD count in; a page of a page blob has as many."""

ZEROS = -1
"""The descriptor of an extent that has no bytes anywhere: it reads as zeros."""


class SyncFailed(OSError):
    """An fdatasync or fsync failed: the kernel has forgotten what it could not write, and tells of that only once.

    Whoever gets it must not believe any later sync of that disk.
    """


class Extent(NamedTuple):
    """``sectors`` sectors from ``sector`` on lie from byte ``offset`` of ``fd`` on."""

    sector: int
    sectors: int
    fd: int
    offset: int = 0
    writable: bool = False
    """May be written in place, and hole-punched. Never with ZEROS."""
    unaligned_fd: int = ZEROS
    """With O_DIRECT: the same file opened without, for transfers that are not aligned. Else equal to ``fd``."""

    @property
    def end(self) -> int:
        """The first sector behind it."""
        return self.sector + self.sectors


class DiskImage(Protocol):
    """An open disk. Closing it gives up the right to write; the descriptors in its extents die with it.

    Its methods are called by one thread at a time, and never while an engine executes a request on the extents that
    they change: the engine sees to both.
    """

    @property
    def size(self) -> int:
        """Bytes that the guest sees, a multiple of 512."""

    @property
    def readonly(self) -> bool: ...

    @property
    def alignment(self) -> int:
        """What O_DIRECT wants of offsets, lengths and addresses, in bytes; 1 where the page cache is used."""

    def table(self) -> Sequence[Extent]:
        """Return what is known without any work: ascending, not overlapping, gaps allowed."""

    def map(self, sector: int, sectors: int, *, write: bool) -> Sequence[Extent]:
        """Return extents without a gap that cover at least the range; with ``write`` the range in them is writable.

        What had to be allocated or copied for that is durable on return, with the bytes that the range had before.

        Raises:
            SyncFailed: what was written before, by whomever, may be lost.
            OSError: the host refused (ENOSPC, EIO), and nothing is lost.
            DiskError: the file is not what it claims.
        """

    def zero(self, sector: int, sectors: int) -> Sequence[Extent]:
        """Make the range read as zeros, durably, and give its room back; return what now describes it, as `map`."""

    def close(self) -> None:
        """Make all durable and close; closing twice is harmless."""

"""Walking over a disk's extents, from its first sector to its last, and carrying their bytes elsewhere.

Not here: what an extent is (`disk`), where the bytes go (`new_disks`), and what changes an extent.
"""

import os
from collections.abc import Callable, Iterable, Iterator

from kvmpy.errors import DiskError
from kvmpy.storage import files
from kvmpy.storage.disk import SECTOR_SIZE, ZEROS, DiskImage, Extent
from kvmpy.storage.progress import Progress
from kvmpy.storage.sparse import data_runs, nonzero_runs
from kvmpy.units import KiB, MiB

STEP = 64 * MiB // SECTOR_SIZE
"""Sectors that `walk` asks an image for at once."""
UNIT = 4 * KiB
"""Zeros are looked for in pieces of this size."""


def clip(extents: Iterable[Extent], first: int, end: int) -> Iterator[Extent]:
    """Yield what of ``extents`` lies in the sectors from ``first`` up to ``end``."""
    for extent in extents:
        start, stop = max(first, extent.sector), min(end, extent.end)
        if start < stop:
            offset = 0 if extent.fd == ZEROS else extent.offset + (start - extent.sector) * SECTOR_SIZE
            yield extent._replace(sector=start, sectors=stop - start, offset=offset)


def walk(image: DiskImage) -> Iterator[Extent]:
    """Yield extents that cover the whole disk, ascending, without a gap; nothing is allocated. Raises as `map`."""
    end = image.size // SECTOR_SIZE
    sector = 0
    for known in [*image.table(), Extent(end, 0, ZEROS)]:
        while sector < known.sector:
            stop = min(sector + STEP, known.sector)
            yield from clip(image.map(sector, stop - sector, write=False), sector, stop)
            sector = stop
        if known.sectors:
            yield known
        sector = known.end


def copy_nonzero(image: DiskImage, write: Callable[[int, memoryview], None], progress: Progress | None = None) -> None:
    """Call ``write(offset, data)`` for each run of bytes of the disk that are not all zeros, ascending.

    Raises:
        DiskError: a file of the disk is damaged, or shorter than it was.
        OSError: the host refused.
    """
    report = progress or (lambda done, total: None)
    for extent in walk(image):
        start = extent.sector * SECTOR_SIZE
        for offset, data in _pieces(extent):
            for first, end in nonzero_runs(data, UNIT):
                write(start + offset + first, memoryview(data)[first:end])
            report(start + offset + len(data), image.size)
        report(extent.end * SECTOR_SIZE, image.size)


def _pieces(extent: Extent) -> Iterator[tuple[int, bytes]]:
    """Yield the bytes of an extent that are no hole, with their offset in it."""
    if extent.fd == ZEROS:
        return
    fd, end = extent.unaligned_fd, extent.offset + extent.sectors * SECTOR_SIZE
    for run, run_end in data_runs(fd, extent.offset, end):
        for offset in range(run, run_end, files.PIECE):
            yield offset - extent.offset, _read(fd, offset, min(files.PIECE, run_end - offset))
    # Where a file has become shorter there were no data to find, which is not what the disk was.
    _check_end(fd, os.lseek(fd, 0, os.SEEK_END), end)


def _read(fd: int, offset: int, size: int) -> bytes:
    try:
        data = files.pread_all(fd, size, offset)
    except OSError as error:
        raise DiskError(f"cannot be read: {error.strerror}", path=_path_of(fd), offset=offset) from error
    _check_end(fd, offset + len(data), offset + size)
    return data


def _check_end(fd: int, found: int, wanted: int) -> None:
    if found < wanted:
        raise DiskError("truncated: the file has become shorter", path=_path_of(fd), offset=found)


def _path_of(fd: int) -> str:
    return os.readlink(f"/proc/self/fd/{fd}")

"""The extents of a disk in the array that the C engine reads, and how they are changed.

::

    struct kvmpy_extent[]    ...|  A  |  B  |        |   C   |...          ascending, never overlapping, with gaps
    splice                         |   N   |
    struct kvmpy_extent[]    ...| A|   N   ||        |   C   |...          what is new cuts what it overlaps;
                                                                           what continues its neighbour becomes one

A change costs a bisection and one move of what lies behind it, however many extents there are. Whoever changes
something holds the disk's write side, so that no request is being executed; to read, it is enough that nobody changes.

Not here: where extents come from (`kvmpy.storage.disk.DiskImage`). Its readable twin is `extent_table`.
Floor: devices.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

from kvmpy._shim import ffi, lib
from kvmpy.errors import DiskError
from kvmpy.storage.disk import SECTOR_SIZE, ZEROS, Extent


class Row(NamedTuple):
    """A ``struct kvmpy_extent``, field by field."""

    sector: int
    sectors: int
    offset: int
    file: int
    writable: bool

    @property
    def end(self) -> int:
        """The first sector behind it."""
        return self.sector + self.sectors

    def between(self, start: int, end: int) -> "Row":
        """Return what of it lies in [start, end); `sectors` is 0 or less where nothing does."""
        start = max(start, self.sector)
        skipped = 0 if self.file == lib.KVMPY_ZEROS else (start - self.sector) * SECTOR_SIZE
        return self._replace(sector=start, sectors=min(end, self.end) - start, offset=self.offset + skipped)

    def is_continued_by(self, other: "Row") -> bool:
        """Tell whether both are one run of the same file, or of zeros."""
        if self.end != other.sector or (self.file, self.writable) != (other.file, other.writable):
            return False
        return self.file == lib.KVMPY_ZEROS or self.offset + self.sectors * SECTOR_SIZE == other.offset


class DiskExtents:
    """The extents and the files of ``disk``, a ``struct kvmpy_disk *``; this object keeps their memory alive."""

    def __init__(self, disk: Any) -> None:
        self._disk = disk
        self._rows = disk.extents = ffi.new("struct kvmpy_extent[]", 64)
        self._files = disk.files = ffi.new("struct kvmpy_file[]", 8)
        self._numbers: dict[tuple[int, int], int] = {}

    def replace(self, extents: Iterable[Extent]) -> None:
        """Forget all extents and put in others, which ascend. Files are remembered: what was written there, is."""
        self._disk.nr_extents = 0
        self.splice(extents)

    def splice(self, extents: Iterable[Extent]) -> None:
        """Put in ``extents``, which ascend; between the first and the last of them nothing else remains.

        Raises:
            DiskError: they do not ascend. Nothing was changed.
        """
        new = [self._row(extent) for extent in extents if extent.sectors]
        if not new:
            return
        start, end = new[0].sector, new[-1].end
        first = lib.kvmpy_disk_find(self._disk, start)
        last = lib.kvmpy_disk_find(self._disk, end)
        # With a neighbour on either side: it may be continued by what is new.
        before = [row.between(0, start) for row in self._existing(first - 1, first + 1)]
        behind = [row.between(end, row.end) for row in self._existing(last, last + 1)]
        rows = _joined(row for row in [*before, *new, *behind] if row.sectors > 0)
        self._replace(max(first - 1, 0), min(last + 1, self._disk.nr_extents), rows)

    def _existing(self, first: int, last: int) -> list[Row]:
        indices = range(max(first, 0), min(last, self._disk.nr_extents))
        rows = (self._rows[i] for i in indices)
        return [Row(row.sector, row.sectors, row.offset, row.file, bool(row.writable)) for row in rows]

    def _replace(self, first: int, last: int, rows: list[Row]) -> None:
        """Put ``rows`` in the place of those with indices in [first, last)."""
        length = self._disk.nr_extents
        size = ffi.sizeof("struct kvmpy_extent")
        array = self._rows
        if length + len(rows) > len(array):
            array = ffi.new("struct kvmpy_extent[]", 2 * (length + len(rows)))
            ffi.memmove(array, self._rows, first * size)
        ffi.memmove(array + first + len(rows), self._rows + last, (length - last) * size)
        ffi.memmove(array + first, ffi.new("struct kvmpy_extent[]", rows), len(rows) * size)
        self._rows = self._disk.extents = array
        self._disk.nr_extents = length - (last - first) + len(rows)

    def _row(self, extent: Extent) -> Row:
        file = lib.KVMPY_ZEROS if extent.fd == ZEROS else self._file(extent)
        return Row(extent.sector, extent.sectors, extent.offset, file, extent.writable)

    def _file(self, extent: Extent) -> int:
        """Return the number of the extent's file, which is given one if it has none."""
        unaligned_fd = extent.fd if extent.unaligned_fd == ZEROS else extent.unaligned_fd
        number = self._numbers.setdefault((extent.fd, unaligned_fd), len(self._numbers))
        if number == len(self._files):
            files = ffi.new("struct kvmpy_file[]", 2 * number)
            ffi.memmove(files, self._files, ffi.sizeof(self._files))
            self._files = self._disk.files = files
        self._disk.nr_files = len(self._numbers)
        file = self._files[number]
        file.fd, file.unaligned_fd = extent.fd, unaligned_fd
        file.was_writable |= extent.writable
        return number


def _joined(rows: Iterable[Row]) -> list[Row]:
    """Return ``rows`` with each run of them that continue each other as one."""
    joined: list[Row] = []
    for row in rows:
        if joined and row.sector < joined[-1].end:
            raise DiskError(f"extents overlap at sector {row.sector}")
        if joined and joined[-1].is_continued_by(row):
            joined[-1] = joined[-1]._replace(sectors=joined[-1].sectors + row.sectors)
        else:
            joined.append(row)
    return joined

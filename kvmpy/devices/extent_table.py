"""The extents of one disk as an engine keeps them: sorted, never overlapping, found by bisection.

::

    extents   |   A   |  B  |        |      C      |
    splice        |   N   |
    extents   | A |   N   | |        |      C      |        what is new cuts what it overlaps, and grows
                                                             together with what it continues

Not here: reading and writing, and where extents come from (`kvmpy.storage.disk.DiskImage`). Floor: devices.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from kvmpy.storage.disk import SECTOR_SIZE, ZEROS, Extent


class Run(NamedTuple):
    """``sectors`` sectors from ``sector`` on."""

    sector: int
    sectors: int


class ExtentTable:
    """The extents of a disk, in the order of its sectors; not every sector need have one."""

    def __init__(self, extents: Iterable[Extent] = ()) -> None:
        self._extents: list[Extent] = []
        self.splice(extents)

    def __iter__(self) -> Iterator[Extent]:
        return iter(self._extents)

    def splice(self, extents: Iterable[Extent]) -> None:
        """Put ``extents`` in; they replace what they overlap, which is cut at their ends."""
        for extent in extents:
            if extent.sectors:
                self._splice(extent)

    def _splice(self, new: Extent) -> None:
        # Neighbours that only touch are taken out too, that they may grow together with it.
        first = bisect_left(self._extents, new.sector, key=lambda extent: extent.end)
        last = bisect_right(self._extents, new.end, key=lambda extent: extent.sector, lo=first)
        pieces = [new]
        if first < last:
            before, behind = self._extents[first], self._extents[last - 1]
            pieces = [cut(before, before.sector, new.sector), new, cut(behind, new.end, behind.end)]
        self._extents[first:last] = _joined(piece for piece in pieces if piece.sectors > 0)

    def covering(self, sector: int, sectors: int) -> list[Extent]:
        """Return what is known of the range, cut to it; where nothing is known, nothing."""
        if not sectors:
            return []
        end = sector + sectors
        first = bisect_right(self._extents, sector, key=lambda extent: extent.end)
        last = bisect_left(self._extents, end, key=lambda extent: extent.sector, lo=first)
        return [cut(extent, max(extent.sector, sector), min(extent.end, end)) for extent in self._extents[first:last]]

    def first_gap(self, sector: int, sectors: int) -> Run | None:
        """Return the first run of the range of which nothing is known, or None."""
        return _first_run_without(self.covering(sector, sectors), sector, sectors)

    def first_unwritable(self, sector: int, sectors: int) -> Run | None:
        """Return the first run of the range that may not be written in place: a gap counts too. Or None."""
        writable = [extent for extent in self.covering(sector, sectors) if extent.writable]
        return _first_run_without(writable, sector, sectors)


def cut(extent: Extent, start: int, end: int) -> Extent:
    """Return the sectors [start, end) of ``extent``; ``sectors`` is 0 or less where there are none."""
    skipped = 0 if extent.fd == ZEROS else (start - extent.sector) * SECTOR_SIZE
    return extent._replace(sector=start, sectors=end - start, offset=extent.offset + skipped)


def _joined(extents: Iterable[Extent]) -> list[Extent]:
    """Return the adjacent ``extents`` with those made one of which the second only goes on where the first ends."""
    joined: list[Extent] = []
    for extent in extents:
        if joined and extent == cut(joined[-1], extent.sector, extent.end):
            joined[-1] = joined[-1]._replace(sectors=joined[-1].sectors + extent.sectors)
        else:
            joined.append(extent)
    return joined


def _first_run_without(extents: Iterable[Extent], sector: int, sectors: int) -> Run | None:
    """Return the first run of the range that none of the ascending ``extents`` covers, or None."""
    end = sector + sectors
    for extent in extents:
        if extent.sector > sector:
            return Run(sector, extent.sector - sector)
        sector = extent.end
    return Run(sector, end - sector) if sector < end else None

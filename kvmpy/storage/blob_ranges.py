"""Page ranges: where a page blob holds anything but zeros, and where its bytes differ from a snapshot's.

The bytes decide, not the map: a page that was written with zeros counts as empty, one that was written with what it
had as unchanged. Whole runs are passed over without reading them where the file has a hole, or where both sides are
in one frozen layer. Floor: storage.
"""

from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

from kvmpy.storage import sparse
from kvmpy.storage.blob_map import PageMap
from kvmpy.storage.blob_meta import PAGE_SIZE
from kvmpy.storage.files import PIECE


class PageRange(NamedTuple):
    """``size`` bytes from ``offset``; ``cleared`` where they are zeros now and were not."""

    offset: int
    size: int
    cleared: bool = False


Spans = Iterator[tuple[int, int]]
"""(start, end) in bytes, ascending, not overlapping."""


def page_ranges(map_: PageMap, start: int, end: int) -> list[PageRange]:
    """Return the runs of pages in [start, end), in bytes, that hold anything but zeros."""
    return merged(PageRange(a, b - a) for a, b in nonzero_spans(map_, start, end))


def changed_ranges(now: PageMap, then: PageMap) -> list[PageRange]:
    """Return the runs of pages of ``now`` that differ from ``then``'s, which are zeros behind its end."""
    return merged(
        span
        for start, end in _different_layers(now, then)
        for piece in _with_data(now, then, start, end)
        for span in _compare(read_pages(now, *piece), read_pages(then, *piece), piece[0])
    )


def read_pages(map_: PageMap, start: int, end: int) -> bytes:
    """Return the bytes of [start, end), which are whole pages; zeros behind the end of the map."""
    parts = []
    for run in map_.runs(start // PAGE_SIZE, min(end // PAGE_SIZE, map_.pages)):
        parts.append(run.layer.read(run.start * PAGE_SIZE, (run.end - run.start) * PAGE_SIZE))
    data = b"".join(parts)
    return data + bytes(end - start - len(data))


def data_spans(map_: PageMap, start: int, end: int) -> Spans:
    """Yield what may hold anything but zeros of [start, end): what is no hole of its layer, in whole pages."""
    last = start
    for run in map_.runs(start // PAGE_SIZE, min(end // PAGE_SIZE, map_.pages)):
        for data, hole in run.layer.data_runs(run.start * PAGE_SIZE, run.end * PAGE_SIZE):
            span = max(last, data // PAGE_SIZE * PAGE_SIZE), -(-hole // PAGE_SIZE) * PAGE_SIZE
            if span[0] < span[1]:
                yield span
                last = span[1]


def nonzero_spans(map_: PageMap, start: int, end: int) -> Spans:
    """Yield the runs of pages in [start, end) that hold anything but zeros; long ones in parts."""
    for data, hole in data_spans(map_, start, end):
        for at in range(data, hole, PIECE):
            page = read_pages(map_, at, min(at + PIECE, hole))
            for a, b in sparse.nonzero_runs(page, PAGE_SIZE):
                yield at + a, at + b


def merged(ranges: Iterator[PageRange]) -> list[PageRange]:
    """Return ``ranges`` with neighbours of one kind made one."""
    result: list[PageRange] = []
    for one in ranges:
        if result and result[-1].offset + result[-1].size == one.offset and result[-1].cleared == one.cleared:
            result[-1] = result[-1]._replace(size=result[-1].size + one.size)
        else:
            result.append(one)
    return result


def _different_layers(now: PageMap, then: PageMap) -> Spans:
    """Yield, in bytes, what the two maps have in different layers, in parts of no more than a piece."""
    for run in now.runs(0, now.pages):
        common = max(run.start, min(run.end, then.pages))
        for other in then.runs(run.start, common):
            if other.layer is not run.layer:
                yield other.start * PAGE_SIZE, other.end * PAGE_SIZE
        if common < run.end:
            yield common * PAGE_SIZE, run.end * PAGE_SIZE


def _with_data(now: PageMap, then: PageMap, start: int, end: int) -> Spans:
    """Yield the pieces of [start, end) in which one of the two is no hole."""
    spans = sorted([*data_spans(now, start, end), *data_spans(then, start, end)])
    last = start
    for data, hole in spans:
        for at in range(max(last, data), hole, PIECE):
            yield at, min(at + PIECE, hole)
        last = max(last, hole)


def _compare(now: bytes, then: bytes, offset: int) -> Iterator[PageRange]:
    """Yield the runs of pages in which the bytes differ."""
    if now == then:
        return

    def kind_at(at: int) -> bool | None:
        """Return None for a page that is the same, else whether it is zeros now."""
        page = now[at : at + PAGE_SIZE]
        return None if page == then[at : at + PAGE_SIZE] else sparse.is_zero(page)

    for kind, pages in groupby(range(0, len(now), PAGE_SIZE), kind_at):
        starts = list(pages)
        if kind is not None:
            yield PageRange(offset + starts[0], PAGE_SIZE * len(starts), kind)

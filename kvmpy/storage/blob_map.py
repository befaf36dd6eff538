"""The map of a page blob: which layer holds each page, as runs, so that its size is that of what was written.

::

    page 0                                   pages
    | layer a     | layer b | layer a           |      starts  0, 14, 24
                                                       layers  a,  b,  a

Neighbours in one layer are one run. A page's place in its layer is its place in the blob. Not here: what layers are,
where the map is kept. Floor: storage.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Self

from kvmpy.storage.blob_layer import Layer


class Run(NamedTuple):
    """The pages from ``start`` to before ``end`` are in ``layer``."""

    start: int
    end: int
    layer: Layer


class PageMap:
    """The layers of ``pages`` pages. ``starts`` begins with 0 and ascends; ``layers`` is as long."""

    def __init__(self, pages: int, starts: Sequence[int], layers: Sequence[Layer]) -> None:
        self.pages = pages
        self.starts = list(starts)
        self.layers = list(layers)
        self._ends: dict[Layer, int] | None = None  # asked for often, and changed by `assign` only

    def __len__(self) -> int:
        return len(self.starts)

    def copy(self) -> Self:
        """Return a map of its own that says the same."""
        return type(self)(self.pages, self.starts, self.layers)

    def runs(self, start: int, end: int) -> Iterator[Run]:
        """Yield what covers [start, end), the first and the last run cut to that. Not to be changed meanwhile."""
        for run in self.whole_runs(start, end):
            yield Run(max(run.start, start), min(run.end, end), run.layer)

    def whole_runs(self, start: int, end: int) -> Iterator[Run]:
        """Yield each run that has a page in [start, end), as long as it is. Not to be changed meanwhile."""
        if start >= end:
            return
        for at in range(bisect_right(self.starts, start) - 1, bisect_left(self.starts, end)):
            yield Run(self.starts[at], self._end(at), self.layers[at])

    def _end(self, at: int) -> int:
        return self.starts[at + 1] if at + 1 < len(self.starts) else self.pages

    def assign(self, start: int, end: int, layer: Layer) -> None:
        """Say that [start, end), which is not empty and inside the map, is in ``layer``."""
        first = bisect_right(self.starts, start) - 1
        last = bisect_left(self.starts, end)
        pieces = [(start, layer)]
        if self.starts[first] < start:
            pieces.insert(0, (self.starts[first], self.layers[first]))
        elif first > 0:
            first -= 1
            pieces.insert(0, (self.starts[first], self.layers[first]))
        if end < self._end(last - 1):
            pieces.append((end, self.layers[last - 1]))
        elif last < len(self.starts):
            pieces.append((self.starts[last], self.layers[last]))
            last += 1
        self._ends = None
        merged = [piece for at, piece in enumerate(pieces) if not at or pieces[at - 1][1] is not piece[1]]
        self.starts[first:last] = [piece[0] for piece in merged]
        self.layers[first:last] = [piece[1] for piece in merged]

    def resized(self, pages: int, layer: Layer) -> Self:
        """Return a map of ``pages`` pages: cut off, or what is new in ``layer``."""
        keep = bisect_left(self.starts, pages)
        resized = type(self)(pages, self.starts[:keep], self.layers[:keep])
        if pages > self.pages:
            resized.assign(self.pages, pages, layer)
        return resized

    def ends(self) -> dict[Layer, int]:
        """Return each layer in the map, with the end of its last page: as many pages the layer must have."""
        if self._ends is None:
            self._ends = dict(zip(self.layers, [*self.starts[1:], self.pages], strict=True))
        return self._ends

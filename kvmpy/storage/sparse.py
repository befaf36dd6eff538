"""Where a sparse file has bytes, and where bytes are zeros."""

import errno
import os
from collections.abc import Iterator

_ZEROS = bytes(1 << 20)


def data_runs(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of each run inside [start, end) that is no hole of the file, ascending, in bytes.

    What is not yielded reads as zeros, or lies behind the end of the file. What is yielded may be zeros too.
    """
    while start < end:
        try:
            data = os.lseek(fd, start, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # no data behind here
                return
            if error.errno != errno.EINVAL:
                raise
            yield start, end  # a block device knows of no holes
            return
        if data >= end:
            return
        hole = min(os.lseek(fd, data, os.SEEK_HOLE), end)
        yield data, hole
        start = hole


def is_zero(data: bytes | memoryview) -> bool:
    """Tell whether every byte is zero; at the speed of memcmp."""
    if len(data) <= len(_ZEROS):
        return data == memoryview(_ZEROS)[: len(data)]
    with memoryview(data) as view:
        return all(is_zero(view[at : at + len(_ZEROS)]) for at in range(0, len(view), len(_ZEROS)))


def nonzero_runs(data: bytes | memoryview, unit: int) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of each run of ``unit``-sized pieces of ``data`` that are not all zeros, in bytes."""
    if is_zero(data):
        return
    first = -1
    with memoryview(data) as view:
        for at in range(0, len(view), unit):
            if not is_zero(view[at : at + unit]):
                first = at if first < 0 else first
            elif first >= 0:
                yield first, at
                first = -1
        if first >= 0:
            yield first, len(view)

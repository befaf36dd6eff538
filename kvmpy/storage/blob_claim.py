"""Claims: pages come into the active layer, where they can be written.

::

    before    | frozen layer: data | hole |   active   |         the map
                        [ 64 KiB ]                               a page in it is to be written
    after     | frozen  |  active  |hole |   active   |         its chunk was copied; one record in the journal

A chunk, not a page, is copied, so that the map of a blob whose guest writes here and there has no more than about a
million runs, whatever its size. Of a hole as much as there is of it is claimed at once: nothing has to be copied, and
the guest goes on without asking.

What is claimed may hold bytes already in the active layer, left there by a claim that a crash or a full disk ended
before its record. They are cleared first. Zeros are punched where pages are in the active layer; elsewhere their
chunks are claimed with a hole. Floor: storage.
"""

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

from kvmpy.storage import files, sparse
from kvmpy.storage.blob_journal import Change, Kind
from kvmpy.storage.blob_layer import Layer
from kvmpy.storage.blob_map import Run
from kvmpy.storage.blob_meta import PAGE_SIZE, Meta
from kvmpy.storage.blob_writer import BlobWriter
from kvmpy.units import KiB

SMALLEST_CHUNK = 64 * KiB
_MOST_CHUNKS = 20
"""Of a blob, as a power of two: from 64 GiB on, chunks are larger than 64 KiB."""
_AT_ONCE = 1024
"""Claims that are made durable together; what is larger is done in parts."""


class Claim(NamedTuple):
    """Pages [start, end), which the frozen layer ``source`` has; what is not in ``keep`` is to be zeros."""

    start: int
    end: int
    source: Layer
    keep: tuple[tuple[int, int], ...]


def chunk_pages(size: int) -> int:
    """Return the pages of a chunk in a blob of ``size`` bytes: a power of two."""
    return max(SMALLEST_CHUNK, 1 << max((size - 1).bit_length() - _MOST_CHUNKS, 0)) // PAGE_SIZE


def claims_to_write(meta: Meta, start: int, end: int) -> list[Claim]:
    """Return what must be claimed so that pages [start, end) can be written."""
    chunk = chunk_pages(meta.size)
    claims = []
    for run in meta.map.whole_runs(start, end):
        if run.layer is not meta.active:
            first, last = _whole_chunks(run, max(run.start, start), min(run.end, end), chunk)
            last = max(last, _end_of_hole(run, last, chunk))
            claims.append(Claim(first, last, run.layer, ((first, last),)))
    return claims


def claims_to_zero(meta: Meta, start: int, end: int) -> list[Claim]:
    """Return what must be claimed so that pages [start, end) are zeros: they are, where a frozen layer has a hole."""
    chunk = chunk_pages(meta.size)
    claims = []
    for run in meta.map.whole_runs(start, end):
        if run.layer is not meta.active:
            zero, zero_end = max(run.start, start), min(run.end, end)
            if run.layer.first_data(zero * PAGE_SIZE, zero_end * PAGE_SIZE) is not None:
                first, last = _whole_chunks(run, zero, zero_end, chunk)
                claims.append(Claim(first, last, run.layer, ((first, zero), (zero_end, last))))
    return claims


def _whole_chunks(run: Run, start: int, end: int, chunk: int) -> tuple[int, int]:
    """Return [start, end) made longer to whole chunks, as far as they are in the run."""
    return max(run.start, start // chunk * chunk), min(run.end, -(-end // chunk) * chunk)


def _end_of_hole(run: Run, page: int, chunk: int) -> int:
    """Return the last border of a chunk up to which there is nothing in the layer of ``run``, from ``page`` on."""
    data = run.layer.first_data(page * PAGE_SIZE, run.end * PAGE_SIZE)
    return run.end if data is None else data // PAGE_SIZE // chunk * chunk


def claim_pages(writer: BlobWriter, start: int, end: int) -> None:
    """Have pages [start, end) in the active layer, durably, with the bytes that they had. Raises as `claim`."""
    claim(writer, claims_to_write(writer.meta, start, end))


def zero_pages(writer: BlobWriter, start: int, end: int) -> None:
    """Make pages [start, end) zeros, durably, and give their room back. Raises as `claim`."""
    active = writer.meta.active
    written = [run for run in writer.meta.map.runs(start, end) if run.layer is active]
    claim(writer, claims_to_zero(writer.meta, start, end))
    for run in written:
        files.zero(active.own_fd, run.start * PAGE_SIZE, (run.end - run.start) * PAGE_SIZE)
    if written:
        writer.sync_pages()


def claim(writer: BlobWriter, claims: Sequence[Claim]) -> None:
    """Have the claims in the active layer, durably, with the bytes that they had, and zeros outside `Claim.keep`.

    Raises:
        OSError: no room (then those that fitted are claimed, which nobody notices), or the host failed.
        BlobError: a frozen layer is shorter than it was.
    """
    for at in range(0, len(claims), _AT_ONCE):
        some = claims[at : at + _AT_ONCE]
        try:
            for one in some:
                _fill(one, writer.meta.active)
            writer.sync_pages()
            writer.record([Change(Kind.CLAIM, one.start, one.end - one.start) for one in some])
        except BaseException:
            if not writer.broken:  # else a record may be durable that needs the bytes
                _give_back(some, writer.meta.active)
            raise


def _fill(one: Claim, active: Layer) -> None:
    """Give the claimed pages of ``active`` the bytes that they are to have."""
    _clear(one, active)
    for start, end in one.keep:
        for data, hole in one.source.data_runs(start * PAGE_SIZE, end * PAGE_SIZE):
            for offset in range(data, hole, files.PIECE):
                files.pwrite_all(active.own_fd, one.source.read(offset, min(files.PIECE, hole - offset)), offset)


def _clear(one: Claim, active: Layer) -> None:
    start, end = one.start * PAGE_SIZE, one.end * PAGE_SIZE
    if any(True for _ in sparse.data_runs(active.own_fd, start, end)):
        files.zero(active.own_fd, start, end - start)


def _give_back(claims: Sequence[Claim], active: Layer) -> None:
    """Free the room of claims that came to nothing, as far as the host lets us."""
    with contextlib.suppress(OSError):
        for one in claims:
            _clear(one, active)

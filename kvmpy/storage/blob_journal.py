"""The journal of a page blob: what has changed since its ``meta``, one record a change, appended and made durable.

::

    0   kind, u16           CLAIM: pages [a, a + b) are in the active layer now
    2   zero, u16           TOUCH: the ETag is a, the time of the last change b (in ticks)
    4   number, u32         of this record in the file, from 0
    8   durable, u32        how many records were durable when this one was written
    12  a, u64
    20  b, u64
    28  CRC-32, u32         of the 28 bytes before, begun with the generation

32 bytes, so that none crosses a sector: a power cut leaves each record whole, or leaves zeros, or nothing. Records are
written together and then made durable together; those that a power cut took away, and the ones beside them that it
left, were never relied on and are passed over. But when a later record says that a missing one had been durable,
somebody damaged the file.

Not here: when records are written, and what must be durable before. Floor: storage.
"""

import os
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from enum import IntEnum
from struct import Struct, pack
from typing import NamedTuple

from kvmpy.errors import BlobError
from kvmpy.storage import files
from kvmpy.units import MiB

MAX_JOURNAL = 1 * MiB
"""Bytes; then the metadata is written anew, with an empty journal."""

_RECORD = Struct("<HHIIQQI")
_BODY = Struct("<HHIIQQ")
RECORD_SIZE = _RECORD.size
_NOTHING = bytes(RECORD_SIZE)


class Kind(IntEnum):
    """What a record says."""

    CLAIM = 1
    TOUCH = 2


class Change(NamedTuple):
    """One record's meaning."""

    kind: Kind
    a: int
    b: int


class Journal:
    """The journal of a generation, empty and open for appending; ``fd`` is its own."""

    def __init__(self, fd: int, generation: int) -> None:
        self._fd = fd
        self._seed = generation & 0xFFFFFFFF
        self._records = 0
        self.broken = False
        """What it holds is not known: a sync failed. Nothing may be appended."""

    def has_room(self, changes: int) -> bool:
        return (self._records + changes) * RECORD_SIZE <= MAX_JOURNAL

    def append(self, changes: Iterable[Change]) -> None:
        """Write a record for each change; they are durable on return. Raises OSError; then none of them is written."""
        records = [
            encode_record(change, self._records + at, self._records, self._seed) for at, change in enumerate(changes)
        ]
        self.broken = True  # until it is known to hold what we think
        end = self._records * RECORD_SIZE
        try:
            files.pwrite_all(self._fd, b"".join(records), end)
        except OSError:
            # Half of them may be there, and shorter ones would follow.
            files.truncate(self._fd, end)
            self.broken = False
            raise
        files.fdatasync(self._fd)
        self._records += len(records)
        self.broken = False

    def close(self) -> None:
        with suppress(OSError):
            os.close(self._fd)


def encode_record(change: Change, number: int, durable: int, seed: int) -> bytes:
    """Return the 32 bytes."""
    body = _BODY.pack(change.kind, 0, number, durable, change.a, change.b)
    return body + pack("<I", zlib.crc32(body, seed))


def decode(data: bytes, generation: int, path: str) -> Iterator[tuple[int, Change]]:
    """Yield (offset, change) of each record up to where a power cut took the rest.

    Raises:
        BlobError: a record is none of ours, or one is missing that had been durable; names the offset.
    """
    missing = len(data)
    for offset in range(0, len(data), RECORD_SIZE):
        record = data[offset : offset + RECORD_SIZE]
        if record == _NOTHING[: len(record)] or len(record) < RECORD_SIZE:
            missing = min(missing, offset)
            continue
        change, durable = _decode_record(record, offset, generation & 0xFFFFFFFF, path)
        if durable * RECORD_SIZE > missing:
            raise BlobError("a record is missing that had been durable", path=path, offset=missing)
        if missing == len(data):
            yield offset, change


def _decode_record(record: bytes, offset: int, seed: int, path: str) -> tuple[Change, int]:
    kind, zero, number, durable, a, b, crc = _RECORD.unpack(record)
    if crc != zlib.crc32(record[: _BODY.size], seed):
        raise BlobError("damaged: the CRC of this record is another", path=path, offset=offset)
    if zero or kind not in Kind.__members__.values():
        raise BlobError(f"a record of kind {kind}: there is none", path=path, offset=offset)
    if number * RECORD_SIZE != offset or durable > number:
        raise BlobError(f"record {number} is not in its place", path=path, offset=offset)
    return Change(Kind(kind), a, b), durable

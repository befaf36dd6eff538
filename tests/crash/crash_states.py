"""What a file system may show after a power cut: from a recording, a point in it, and what had reached the disk.

A change of a file's bytes or size is safe once that file was synced after it; a change of names is safe once its
folder was. Everything else that was done before the cut may be there or not, in any combination: the kernel writes
back in an order of its own. Of a write that is not safe and longer than a sector, any sectors may be there.

This is weaker than what ext4 promises, and no weaker than what POSIX does.
"""

import ctypes
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

from recording import (
    DATA_KINDS,
    MARK,
    MKDIR,
    NAME_KINDS,
    PUNCH,
    RENAME,
    RMDIR,
    ROOT,
    SYNC,
    TRUNCATE,
    UNLINK,
    WRITE,
    Op,
    Place,
)

SECTOR_SIZE = 512
KEEP_SIZE, PUNCH_HOLE = 1, 2


class Cut(NamedTuple):
    """A power cut behind the first ``at`` operations; of those, the indices in ``lost`` had not reached the disk.

    Of a write in ``torn`` only the sectors whose bit is set (the first is bit 0) had.
    """

    at: int
    lost: frozenset[int] = frozenset()
    torn: tuple[tuple[int, int], ...] = ()


def unsafe(ops: Sequence[Op], at: int) -> list[int]:
    """Return the indices of the operations before ``at`` that a power cut there may undo, ascending."""
    synced: set[int] = set()
    found = []
    for i in range(at - 1, -1, -1):
        op = ops[i]
        if op.kind == SYNC:
            synced.add(op.file)
        elif op.kind in DATA_KINDS:
            if op.file not in synced:
                found.append(i)
        elif any(folder not in synced for folder, _ in op.places):
            found.append(i)
    return found[::-1]


def has_effect(ops: Sequence[Op], i: int) -> bool:
    """Tell whether the sync ``i`` makes anything safe that was not."""
    return len(unsafe(ops, i + 1)) < len(unsafe(ops, i))


def simple_cuts(ops: Sequence[Op], at: int) -> Iterator[Cut]:
    """Yield what a power cut at ``at`` may leave when the disk was quick, or slow: nothing lost, or all that may be."""
    yield Cut(at)
    yield Cut(at, frozenset(unsafe(ops, at)))


def single_cuts(ops: Sequence[Op], at: int, recent: int) -> Iterator[Cut]:
    """Yield the cuts that lose one change alone, or all but one: each of the last ``recent`` that may be lost."""
    loose = unsafe(ops, at)
    for i in loose[: -recent - 1 : -1]:
        yield Cut(at, frozenset((i,)))
        yield Cut(at, frozenset(loose) - {i})


def random_cuts(ops: Sequence[Op], at: int, random: Random, samples: int) -> Iterator[Cut]:
    """Yield cuts that lose some of the changes that may be lost, some of them in part."""
    loose = unsafe(ops, at)
    for _ in range(samples if loose else 0):
        lost = frozenset(i for i in loose if random.random() < 0.5)
        writes = [i for i in loose if ops[i].kind == WRITE and _sectors(ops[i]) > 1 and i not in lost]
        yield Cut(at, lost, tuple((i, random.getrandbits(_sectors(ops[i]))) for i in writes if random.random() < 0.3))


def _sectors(op: Op) -> int:
    return -(-(op.offset + op.size) // SECTOR_SIZE) - op.offset // SECTOR_SIZE


def effect(ops: Sequence[Op], cut: Cut) -> tuple[object, ...]:
    """Return what differs where two cuts differ in what is on the disk, or in the marks before them."""
    last = next((i for i in range(cut.at - 1, -1, -1) if ops[i].kind != SYNC), -1)
    return last, cut.lost, cut.torn


# --- making it ----------------------------------------------------------------------------------------------------


def build(ops: Sequence[Op], cut: Cut, folder: Path) -> None:
    """Make ``folder``, which is empty, what the disk shows after ``cut``."""
    entries: dict[Place, int] = {}
    changes: dict[int, list[tuple[Op, int]]] = {}
    torn = dict(cut.torn)
    for i, op in enumerate(ops[: cut.at]):
        if i in cut.lost:
            continue
        if op.kind in DATA_KINDS:
            changes.setdefault(op.file, []).append((op, torn.get(i, -1)))
        elif op.kind in NAME_KINDS:
            _change_names(entries, op)
    names: dict[int, dict[str, int]] = {op.file: {} for op in ops if op.kind == MKDIR}
    names[ROOT] = {}
    for (parent, name), file in entries.items():
        names[parent][name] = file
    _make_folder(folder, ROOT, names, changes, {})


def _change_names(entries: dict[Place, int], op: Op) -> None:
    """Apply a change of names; one whose ground is missing, since it was lost, changes nothing."""
    if op.kind in (UNLINK, RMDIR):
        entries.pop(op.places[0], None)
    elif op.kind == RENAME:
        # Both names are entries of folders; the file itself is there whether or not its first name was kept.
        entries.pop(op.places[0], None)
        entries[op.places[1]] = op.file
    else:
        entries[op.places[0]] = op.file


def _make_folder(
    path: Path,
    number: int,
    names: dict[int, dict[str, int]],
    changes: dict[int, list[tuple[Op, int]]],
    made: dict[int, Path],
) -> None:
    """Fill the folder; one that no name leads to is seen by nobody. ``made`` are files that have a name already."""
    for name, file in names[number].items():
        below = path / name
        if file in names:
            below.mkdir()
            _make_folder(below, file, names, changes, made)
        elif file in made:
            os.link(made[file], below)
        else:
            _make_file(below, changes.get(file, ()))
            made[file] = below


def _make_file(path: Path, changes: Sequence[tuple[Op, int]]) -> None:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        for op, sectors in changes:
            _change(fd, op, sectors)
    finally:
        os.close(fd)


def _change(fd: int, op: Op, sectors: int) -> None:
    end = op.offset + op.size
    if op.kind == TRUNCATE:
        os.ftruncate(fd, op.size)
    elif op.kind == PUNCH:
        _punch(fd, op.offset, op.size)
    elif op.kind == WRITE and sectors == -1:
        os.pwrite(fd, op.data, op.offset)
    else:
        if os.fstat(fd).st_size < end:
            os.ftruncate(fd, end)
        if op.kind == WRITE:
            _write_sectors(fd, op, sectors)


def _write_sectors(fd: int, op: Op, sectors: int) -> None:
    """Write those sectors of ``op`` whose bits are set."""
    first = op.offset // SECTOR_SIZE
    for sector in range(first, first + _sectors(op)):
        if sectors >> (sector - first) & 1:
            start = max(sector * SECTOR_SIZE, op.offset)
            end = min((sector + 1) * SECTOR_SIZE, op.offset + op.size)
            os.pwrite(fd, op.data[start - op.offset : end - op.offset], start)


_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def _punch(fd: int, offset: int, size: int) -> None:
    if _libc.fallocate(fd, KEEP_SIZE | PUNCH_HOLE, offset, size):
        raise OSError(ctypes.get_errno(), "fallocate")


def marks(ops: Sequence[Op], at: int) -> list[str]:
    """Return the marks before ``at``."""
    return [op.data.decode() for op in ops[:at] if op.kind == MARK]

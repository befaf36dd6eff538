"""Planted defects: from the recording of a program, those of programs that sync once too little, or write too early.

A sync is left out when it made something safe. A change of metadata (a name given, changed or taken away, a record of
a journal, the place of a block) is made before the sync that it waited for. Each must be seen, so that every sync is
needed, and in its place, and whoever judges the cuts sees.

What is no defect: to make a file or a folder earlier, which nothing refers to yet; a sync that found nothing to do
this time; and the order of two changes without a sync between them, which no disk keeps.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from crash_states import has_effect
from recording import LINK, RENAME, SYNC, UNLINK, WRITE, Op

METADATA_FILES = ("journal", "meta", "meta.new")
METADATA_SITES = ("Growth.",)
"""Where else metadata is written: the table and the bitmaps of a VHD."""


class Defect(NamedTuple):
    """What a defective program does; its cuts differ from the sound one's at ``points`` and nowhere else."""

    name: str
    ops: list[Op]
    points: range


def planted(ops: Sequence[Op], start: int = 0) -> Iterator[Defect]:
    """Yield every defect from the operation ``start`` on, in the order of the places where they are."""
    for i, op in enumerate(ops):
        if i < start:
            continue
        if op.kind == SYNC and has_effect(ops, i):
            yield _without(ops, i)
        elif is_metadata(op):
            sync = _waited_for(ops, i)
            if sync is not None and has_effect(ops, sync):
                yield _moved(ops, i, sync)


def one_of_each_site(defects: Sequence[Defect]) -> list[Defect]:
    """Return the first defect of each name: one for each line of the program by way of each caller."""
    return list({defect.name: defect for defect in reversed(defects)}.values())[::-1]


def is_metadata(op: Op) -> bool:
    """Tell whether ``op`` changes what refers to something else."""
    if op.kind == WRITE:
        return op.role in METADATA_FILES or any(site in op.site for site in METADATA_SITES)
    return op.kind in (RENAME, LINK, UNLINK)


def _waited_for(ops: Sequence[Op], i: int) -> int | None:
    """Return the sync just before ``ops[i]`` and others of its kind; None: it comes behind something else."""
    at = i - 1
    while at >= 0 and ops[at].kind == ops[i].kind:
        at -= 1
    return at if at >= 0 and ops[at].kind == SYNC else None


def _without(ops: Sequence[Op], i: int) -> Defect:
    # The next sync of the same file makes up for it.
    later = next((at for at in range(i + 1, len(ops)) if ops[at].kind == SYNC and ops[at].file == ops[i].file), None)
    end = len(ops) if later is None else later
    return Defect(f"without: {ops[i]}", [*ops[:i], *ops[i + 1 :]], range(i, end))


def _moved(ops: Sequence[Op], i: int, sync: int) -> Defect:
    moved = [*ops[:sync], ops[i], *ops[sync:i], *ops[i + 1 :]]
    return Defect(f"too early: {ops[i]}; before: {ops[sync]}", moved, range(sync + 1, i + 1))

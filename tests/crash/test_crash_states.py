"""What a power cut may leave, on recordings of a few operations: the ground under the other tests here."""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import pytest
from crash_states import Cut, build, has_effect, single_cuts, unsafe
from defects import planted
from recording import CREATE, LINK, MKDIR, PUNCH, RENAME, ROOT, SYNC, TRUNCATE, UNLINK, WRITE, Op

FILE, OTHER, FOLDER = 1, 2, 3


def create(file: int, name: str, folder: int = ROOT) -> Op:
    return Op(CREATE, file, path=name, places=((folder, name),))


def write(file: int, data: bytes, offset: int = 0, path: str = "") -> Op:
    return Op(WRITE, file, offset, len(data), path, data=data)


def sync(file: int) -> Op:
    return Op(SYNC, file)


def rename(file: int, old: str, new: str, folder: int = ROOT) -> Op:
    return Op(RENAME, file, places=((folder, old), (folder, new)))


def left(ops: Sequence[Op], folder: Path, cut: Cut | None = None) -> dict[str, bytes]:
    """Return the files that a cut leaves; without one, all that was done."""
    folder.mkdir()
    build(ops, cut or Cut(len(ops)), folder)
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_bytes_are_safe_when_their_file_was_synced_after_them() -> None:
    ops = [create(FILE, "a"), write(FILE, b"old"), sync(FILE), write(FILE, b"new"), sync(OTHER)]
    assert unsafe(ops, len(ops)) == [0, 3]
    assert unsafe(ops, 2) == [0, 1]


def test_name_is_safe_when_its_folder_was_synced_not_when_its_file_was() -> None:
    ops = [create(FILE, "a"), sync(FILE), sync(ROOT), rename(FILE, "a", "b")]
    assert unsafe(ops, 2) == [0]
    assert unsafe(ops, 4) == [3]


def test_rename_between_folders_needs_both_synced() -> None:
    ops = [Op(MKDIR, FOLDER, places=((ROOT, "d"),)), Op(RENAME, FILE, places=((ROOT, "a"), (FOLDER, "a")))]
    for folders, expected in (((ROOT,), [1]), ((FOLDER,), [0, 1]), ((ROOT, FOLDER), [])):
        synced = [*ops, *map(sync, folders)]
        assert unsafe(synced, len(synced)) == expected


def test_rename_is_there_or_not(disk: Path) -> None:
    ops = [create(FILE, "a"), create(OTHER, "b"), write(FILE, b"new"), write(OTHER, b"old"), rename(FILE, "a", "b")]
    assert left(ops, disk) == {"b": b"new"}
    assert left(ops, disk.with_name("lost"), Cut(5, frozenset((4,)))) == {"a": b"new", "b": b"old"}


def test_file_that_lost_its_bytes_is_empty(disk: Path) -> None:
    """What happens to who renames before he syncs."""
    ops = [create(FILE, "a"), write(FILE, b"new"), rename(FILE, "a", "b"), sync(ROOT)]
    assert left(ops, disk, Cut(4, frozenset(unsafe(ops, 4)))) == {"b": b""}


def test_folder_that_is_renamed_keeps_what_was_synced_in_it(disk: Path) -> None:
    ops = [
        *(Op(MKDIR, FOLDER, places=((ROOT, "d"),)), create(FILE, "a", FOLDER), sync(FOLDER)),
        *(Op(RENAME, FOLDER, places=((ROOT, "d"), (ROOT, "e"))), sync(ROOT)),
    ]
    assert unsafe(ops, 5) == []
    assert left(ops, disk) == {"e/a": b""}
    assert left(ops, disk.with_name("lost"), Cut(4, frozenset((0, 3)))) == {}


def test_file_of_two_names_is_one(disk: Path) -> None:
    ops = [
        create(FILE, "a"),
        Op(LINK, FILE, places=((ROOT, "b"),)),
        write(FILE, b"both"),
        Op(UNLINK, FILE, places=((ROOT, "a"),)),
    ]
    assert left(ops, disk) == {"b": b"both"}
    assert left(ops, disk.with_name("lost"), Cut(4, frozenset((3,)))) == {"a": b"both", "b": b"both"}


def test_torn_write_has_any_of_its_sectors(disk: Path) -> None:
    """Sectors of the file, wherever in them the write begins; it is as long as if all were there."""
    ops = [create(FILE, "a"), write(FILE, b"1" * 100 + b"2" * 512 + b"3" * 50, 412)]
    assert left(ops, disk, Cut(2, torn=((1, 0b101),))) == {"a": bytes(412) + b"1" * 100 + bytes(512) + b"3" * 50}


def test_size_and_holes_are_bytes_too(disk: Path) -> None:
    ops = [create(FILE, "a"), write(FILE, b"x" * 8), Op(PUNCH, FILE, 2, 4), Op(TRUNCATE, FILE, size=12)]
    assert left(ops, disk) == {"a": b"xx\0\0\0\0xx\0\0\0\0"}
    assert left(ops, disk.with_name("lost"), Cut(4, frozenset((2, 3)))) == {"a": b"x" * 8}


def test_each_change_that_may_be_lost_is_lost_and_kept_alone() -> None:
    ops = [create(FILE, "a"), write(FILE, b"1"), write(FILE, b"2", 512)]
    lost = [set(cut.lost) for cut in single_cuts(ops, 3, recent=2)]
    assert lost == [{2}, {0, 1}, {1}, {0, 2}]


# --- planted defects ----------------------------------------------------------------------------------------------

REPLACE = [
    *(create(FILE, "new"), write(FILE, b"meta", path="new"), sync(FILE), rename(FILE, "new", "meta"), sync(ROOT)),
    *(Op(UNLINK, OTHER, places=((ROOT, "old"),)), sync(FILE), write(FILE, b"next", path="journal"), sync(FILE)),
]
"""A file is replaced; a sync that finds nothing to do; a record in a journal."""


def test_syncs_are_left_out_and_metadata_comes_before_them() -> None:
    found = [defect.ops for defect in planted(REPLACE)]
    without = [[op for i, op in enumerate(REPLACE) if i != sync] for sync in (2, 4, 8)]
    early = [_swapped(3), _swapped(5)]
    assert sorted(found, key=str) == sorted([*without, *early], key=str)


def _swapped(i: int) -> list[Op]:
    ops = list(REPLACE)
    ops[i - 1 : i + 1] = ops[i], ops[i - 1]
    return ops


def test_sync_without_effect_is_no_defect_to_leave_out() -> None:
    assert [i for i, op in enumerate(REPLACE) if op.kind == SYNC and has_effect(REPLACE, i)] == [2, 4, 8]


@pytest.mark.parametrize("defect", list(planted(REPLACE)), ids=lambda defect: defect.name)
def test_cuts_of_a_defect_differ_at_its_points_alone(defect, disk: Path) -> None:
    """Elsewhere its program may leave nothing that the sound one may not."""
    sound = {state for at in range(len(REPLACE) + 1) for state in _states(REPLACE, at, disk)}
    for at in range(len(defect.ops) + 1):
        if at not in defect.points:
            assert _states(defect.ops, at, disk) <= sound


def _states(ops: Sequence[Op], at: int, disk: Path) -> set[tuple[tuple[str, bytes], ...]]:
    """Return all that a cut may leave."""
    loose = unsafe(ops, at)
    losses = [frozenset(lost) for count in range(len(loose) + 1) for lost in combinations(loose, count)]
    found = set()
    for number, lost in enumerate(losses):
        folder = disk.with_name(f"{len(ops)}-{at}-{number}-{id(ops)}")
        found.add(tuple(sorted(left(ops, folder, Cut(at, lost)).items())))
    return found

"""A process dies, or the disk is full, at any step of any operation: the old state or the new one, and nothing else.

Here all that was written stays, as after kill -9; what a power cut takes is another suite's.
"""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from blob_engine import CHUNK, PAGE, Engine, pages

from kvmpy.storage import files
from kvmpy.storage.blob import PageBlob
from kvmpy.storage.blob_check import check
from kvmpy.storage.blob_copy import copy, delete
from kvmpy.storage.blob_folder import load
from kvmpy.storage.blob_layer import Folder
from kvmpy.storage.sparse import nonzero_runs

SIZE = 4 * CHUNK
CHANGING = (
    *("create", "pwrite_all", "truncate", "zero", "reserve", "rename", "link", "make_folder"),
    *("unlink", "discard", "remove_folder", "fdatasync", "fsync_folder"),
)
MAY_LACK_ROOM = ("create", "pwrite_all", "reserve", "rename", "link", "make_folder")


def opened(change: Callable[[PageBlob], object]) -> Callable[[Path], None]:
    """Return an operation on an open blob, which is not closed: that is one of its own."""

    def operate(folder: Path) -> None:
        blob = PageBlob.open(folder / "data.blob")
        try:
            change(blob)
        finally:
            blob.abandon()

    return operate


def copy_bytes(folder: Path) -> None:
    """Copy to what has to be taken for another file system."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    link, files.link = files.link, refuse
    try:
        copy(folder / "data.blob", folder / "copy.blob")
    finally:
        files.link = link


OPERATIONS: dict[str, Callable[[Path], object]] = {
    "create": lambda folder: PageBlob.create(folder / "new.blob", SIZE).abandon(),
    "open": opened(lambda blob: None),
    "close": lambda folder: PageBlob.open(folder / "data.blob").close(),
    "write in place": opened(lambda blob: blob.write(0, pages("N"))),
    "write to a snapshotted page": opened(lambda blob: blob.write(2 * CHUNK, pages("N"))),
    "guest's first write": opened(lambda blob: Engine(blob).write(2 * CHUNK + PAGE, pages("N"))),
    "clear": opened(lambda blob: blob.clear(0, PAGE)),
    "clear a snapshotted page": opened(lambda blob: blob.clear(2 * CHUNK, PAGE)),
    "guest's discard": opened(lambda blob: blob.zero(2 * CHUNK // PAGE, 1)),
    "grow": opened(lambda blob: blob.resize(2 * SIZE)),
    "shrink": opened(lambda blob: blob.resize(CHUNK)),
    "sequence number": opened(lambda blob: blob.set_sequence_number("increment")),
    "snapshot": opened(lambda blob: blob.snapshot()),
    "delete a snapshot": opened(lambda blob: blob.delete_snapshot(blob.snapshots[0].id)),
    "copy": lambda folder: copy(folder / "data.blob", folder / "copy.blob"),
    "copy bytes": copy_bytes,
    "copy a snapshot": lambda folder: copy(
        folder / "data.blob", folder / "copy.blob", snapshot=next(iter(state_of(folder)["data.blob"][3]))
    ),
    "delete": lambda folder: delete(folder / "data.blob"),
}


@pytest.fixture
def prepared(in_memory: Path) -> Path:
    """A folder with a blob that has a snapshot, pages in two layers, and was not closed."""
    folder = in_memory / "prepared"
    folder.mkdir()
    blob = PageBlob.create(folder / "data.blob", SIZE)
    for offset in (0, 2 * CHUNK, SIZE - PAGE):
        blob.write(offset, pages("o"))
    blob.snapshot()
    blob.write(0, pages("p"))
    blob.abandon()
    return folder


def clone(source: Path, target: Path) -> Path:
    """Copy a folder with all in it; what are names of one file stay so."""
    made: dict[int, Path] = {}
    for folder, _, names in os.walk(source):
        into = target / Path(folder).relative_to(source)
        into.mkdir()
        for name in names:
            inode = os.stat(f"{folder}/{name}").st_ino
            if inode in made:
                os.link(made[inode], into / name)
            else:
                data = Path(folder, name).read_bytes()
                with (into / name).open("wb") as file:
                    file.truncate(len(data))
                    for start, end in nonzero_runs(data, PAGE):
                        os.pwrite(file.fileno(), data[start:end], start)
                made[inode] = into / name
    return target


State = dict[str, tuple[int, bytes, int, dict[str, bytes]]]


def state_of(folder: Path) -> State:
    """Return what there is to be read in the blobs of a folder; each is sound."""
    state: State = {}
    for path in sorted(folder.glob("*.blob")):
        assert check(path) == []
        with PageBlob.open(path, readonly=True) as blob:
            ids = [snapshot.id for snapshot in blob.snapshots]
            old = {id_: whole(path, snapshot=id_) for id_ in ids}
            state[path.name] = (blob.content_length, blob.read(0, blob.content_length), blob.sequence_number, old)
    return state


def etags_of(folder: Path) -> dict[str, str]:
    """Return the ETag of each blob in a folder."""
    etags = {}
    for path in folder.glob("*.blob"):
        with PageBlob.open(path, readonly=True) as blob:
            etags[path.name] = blob.etag
    return etags


def whole(path: Path, **options: str) -> bytes:
    with PageBlob.open(path, readonly=True, **options) as blob:
        return blob.read(0, blob.content_length)


def without_ids(state: State) -> list[object]:
    """Return the state without the times in it: two runs of one operation differ in them."""
    return [(name, *fields[:3], list(fields[3].values())) for name, fields in state.items()]


@pytest.mark.parametrize("name", OPERATIONS)
def test_process_that_dies_at_any_step_leaves_the_old_or_the_new_state(name, prepared, monkeypatch):
    """And the next writer takes over, and removes what was left."""
    before, etags, crashes = state_of(prepared), etags_of(prepared), []
    for call in CHANGING:
        real = getattr(files, call)

        def recorded(*args, real=real, **options):
            crashes.append(clone(prepared, prepared.parent / f"crash{len(crashes)}"))
            return real(*args, **options)

        monkeypatch.setattr(files, call, recorded)
    OPERATIONS[name](prepared)
    monkeypatch.undo()
    after = state_of(prepared)
    assert crashes
    for crash in crashes:
        state = state_of(crash)
        assert state in (before, after)
        if not name.startswith(("guest", "delete", "snapshot")):
            assert state == before or etags_of(crash) != etags, "changed, and the ETag does not tell"
        for path in crash.glob("*.blob"):
            PageBlob.open(path).close()
        assert strays(crash) == []
        assert state_of(crash) == state


@pytest.mark.parametrize("name", OPERATIONS)
def test_full_disk_at_any_step_leaves_the_old_state(name, prepared, monkeypatch):
    """ENOSPC is told, nothing is left behind, and with room again the same operation succeeds."""
    OPERATIONS[name](done := clone(prepared, prepared.parent / "done"))
    after = without_ids(state_of(done))
    before = state_of(prepared)
    for number in range(room_taken(name, clone(prepared, prepared.parent / "counted"), monkeypatch)):
        folder = clone(prepared, prepared.parent / f"full{number}")
        if fails_for_want_of_room(name, folder, monkeypatch, number):
            assert state_of(folder) == before
            assert sorted(os.listdir(folder)) == sorted(os.listdir(prepared))
            assert strays(folder) == []
            OPERATIONS[name](folder)
        assert without_ids(state_of(folder)) == after


def room_taken(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Do the operation and return how many of its calls take room."""
    with monkeypatch.context() as patch:
        calls = full_at(patch, -1)
        OPERATIONS[name](folder)
    assert calls
    return len(calls)


def fails_for_want_of_room(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> bool:
    """Do the operation while the disk is full for that one of its calls."""
    with monkeypatch.context() as patch:
        full_at(patch, number)
        try:
            OPERATIONS[name](folder)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            return True
    return False


def full_at(monkeypatch: pytest.MonkeyPatch, number: int) -> list[object]:
    """Let that of the calls which take room fail for want of it; return where they are collected."""
    calls: list[object] = []
    for call in MAY_LACK_ROOM:
        real = getattr(files, call)

        def fails(*args, real=real, **options):
            calls.append(real)
            if len(calls) - 1 == number:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args, **options)

        monkeypatch.setattr(files, call, fails)
    return calls


def strays(folder: Path) -> list[str]:
    """Return the files in the blobs of a folder that nothing names."""
    found: list[str] = []
    for path in folder.glob("*.blob"):
        opened_folder = Folder(os.open(path, os.O_RDONLY), str(path))
        state = load(opened_folder)
        os.close(opened_folder.fd)
        named = {"meta", "lock", f"journal-{state.generation}", *(layer.name for layer in state.meta.layers())}
        found += sorted(set(os.listdir(path)) - named)
    return found

"""Runs a program under ``recorder.c`` and reads what it wrote down: every change of files, every sync, every mark."""

import atexit
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import NamedTuple

HERE = Path(__file__).parent
RECORDER = HERE / "recorder.c"
HEAD = struct.Struct("<cQQQ")
LENGTH = struct.Struct("<I")
PATH_LENGTH = struct.Struct("<H")

CREATE, WRITE, TRUNCATE, PUNCH, EXTEND, SYNC = "c", "w", "t", "p", "e", "s"
RENAME, LINK, UNLINK, MKDIR, RMDIR, MARK = "r", "l", "u", "d", "x", "m"
DATA_KINDS = frozenset((WRITE, TRUNCATE, PUNCH, EXTEND))
NAME_KINDS = frozenset((CREATE, RENAME, LINK, UNLINK, MKDIR, RMDIR))
WORDS = {
    CREATE: "create",
    WRITE: "write",
    TRUNCATE: "truncate",
    PUNCH: "zero",
    EXTEND: "extend",
    SYNC: "sync",
    RENAME: "rename",
    LINK: "link",
    UNLINK: "unlink",
    MKDIR: "mkdir",
    RMDIR: "rmdir",
    MARK: "mark",
}

SITE = "@"
"""What a mark begins with that says where in the program the next change is made (``sites.py``)."""
ROOT = 0
"""The number of the recorded folder."""

Place = tuple[int, str]
"""An entry of a folder: the folder's number, and a name in it."""


class Op(NamedTuple):
    """One change.

    ``file`` is the number of the file, or folder, that is changed, named or synced: never given twice, as inodes are.
    ``places`` are the entries that change: one, or for a rename the old and the new. ``path`` is for people.
    """

    kind: str
    file: int
    offset: int = 0
    size: int = 0
    path: str = ""
    places: tuple[Place, ...] = ()
    data: bytes = b""
    site: str = ""
    """Where in the program it was made, as far as the program told."""

    @property
    def role(self) -> str:
        """What kind of file it is about: its name without what differs from run to run."""
        name = os.path.basename(self.path)
        stem, dot, suffix = name.rpartition(".")
        return suffix if dot and len(stem) > 20 else name.split("-")[0]

    def __str__(self) -> str:
        return f"{WORDS[self.kind]} {self.role} ({self.site or 'in C'})"


class _Raw(NamedTuple):
    """A record as it is in the log."""

    kind: str
    inode: int
    offset: int
    size: int
    path: str
    second: str
    data: bytes


def parse(log: bytes) -> list[Op]:
    """Return the records of a log, in order."""
    numbers = _Numbers()
    ops = []
    site = (0, "")
    for raw in _records(log):
        if raw.kind == MARK and raw.data.startswith(SITE.encode()):
            kind, _, where = raw.data.decode().removeprefix(SITE).partition(" ")
            site = (ord(kind), where)
            continue
        op = numbers.op(raw)
        # One that does not fit was told for a call that changed nothing.
        ops.append(op._replace(site=site[1]) if site[0] == ord(op.kind) else op)
        site = (0, "")
    return ops


class _Numbers:
    """Gives each file and each folder a number of its own, as they come."""

    def __init__(self) -> None:
        self._files: dict[int, int] = {}
        self._folders = {"": ROOT}
        self._last = ROOT

    def op(self, raw: _Raw) -> Op:
        """Return ``raw`` with numbers."""
        places: tuple[Place, ...] = ()
        if raw.kind in (RENAME, LINK):
            places = (self._place(raw.path), self._place(raw.second))[raw.kind == LINK :]
        elif raw.kind in NAME_KINDS:
            places = (self._place(raw.path),)
        file = self._file(raw)
        if raw.kind == MKDIR:
            self._folders[raw.path] = file
        elif raw.kind == RENAME:
            self._move(raw.path, raw.second)
        path = raw.second if raw.kind == LINK else raw.path
        return Op(raw.kind, file, raw.offset, raw.size, path, places, raw.data)

    def _file(self, raw: _Raw) -> int:
        if raw.kind == MARK:
            return -1
        if raw.path in self._folders and raw.kind != MKDIR:
            return self._folders[raw.path]
        if raw.kind in (CREATE, MKDIR) or raw.inode not in self._files:
            self._last += 1
            self._files[raw.inode] = self._last
        return self._files[raw.inode]

    def _place(self, path: str) -> Place:
        folder, _, name = path.rpartition("/")
        return self._folders[folder], name

    def _move(self, old: str, new: str) -> None:
        """Know a folder that was renamed, and what is below it, by the new name."""
        for path in [path for path in self._folders if path == old or path.startswith(old + "/")]:
            self._folders[new + path.removeprefix(old)] = self._folders.pop(path)


def _records(log: bytes) -> Iterator[_Raw]:
    at = 0
    while at < len(log):
        (length,) = LENGTH.unpack_from(log, at)
        record = log[at + 4 : at + 4 + length]
        at += 4 + length
        kind, inode, offset, size = HEAD.unpack_from(record)
        path, rest = _take(record[HEAD.size :])
        second, data = _take(rest)
        yield _Raw(kind.decode(), inode, offset, size, path.decode(), second.decode(), data)


def _take(record: bytes) -> tuple[bytes, bytes]:
    (length,) = PATH_LENGTH.unpack_from(record)
    return record[2 : 2 + length], record[2 + length :]


@cache
def recorder() -> Path:
    """Return the compiled recorder."""
    folder = mkdtemp(prefix="kvmpy-recorder-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    library = Path(folder) / "recorder.so"
    command = ["gcc", "-shared", "-fPIC", "-O2", "-Wall", "-Wextra", "-o", library, RECORDER, "-ldl"]
    subprocess.run(command, check=True)
    return library


class Recording(NamedTuple):
    """What a program did, in order, to the files below ``folder``, which are as it left them."""

    ops: list[Op]
    folder: Path


def record(program: str, folder: Path, *arguments: str) -> Recording:
    """Run ``program FOLDER/files ARGUMENTS``, one of those beside this file, with a descriptor for its marks.

    The program gets the number of that descriptor in KVMPY_RECORD_MARKS.
    """
    files, log = folder / "files", folder / "log"
    files.mkdir()
    marks = os.open(os.devnull, os.O_WRONLY)
    try:
        environment = {
            **os.environ,
            "LD_PRELOAD": str(recorder()),
            "KVMPY_RECORD_ROOT": str(files),
            "KVMPY_RECORD_LOG": str(log),
            "KVMPY_RECORD_MARKS": str(marks),
            "PYTHONPATH": os.pathsep.join(str(path) for path in (HERE, HERE.parents[1])),
        }
        command = [sys.executable, str(HERE / program), str(files), *arguments]
        done = subprocess.run(command, env=environment, pass_fds=(marks,), capture_output=True, text=True, timeout=100)
    finally:
        os.close(marks)
    assert done.returncode == 0, done.stderr
    return Recording(parse(log.read_bytes()), files)


def ready(ops: Sequence[Op]) -> int:
    """Return how many operations there are up to the mark ``ready``: what a story begins with is durable."""
    return 1 + next(i for i, op in enumerate(ops) if op.kind == MARK and op.data == b"ready")

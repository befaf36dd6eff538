"""The lease of a page blob: who may change its folder. One at a time, for as long as that process lives.

The lease *is* the `WriterLock` on the file ``lock`` in the folder. What the file says is for people and never decides
anything::

    pid 4711
    host build7
    since 2026-11-20T23:39:36.1234567Z
    lease 0123456789abcdef0123456789abcdef

A dead holder's lease needs no breaking, since the kernel has dropped the lock; a live one's cannot be taken. Floor:
storage.
"""

import os
from contextlib import suppress
from typing import NamedTuple, Self

from kvmpy.errors import BlobError, DiskError, LeaseError
from kvmpy.storage import files
from kvmpy.storage.blob_time import format_moment, now
from kvmpy.storage.lock import WriterLock, holder, is_locked

LOCK = "lock"
_LONGEST_NOTE = 1024


class LeaseState(NamedTuple):
    """Whether somebody writes a blob, and who, as far as it is known."""

    leased: bool
    pid: int | None = None
    since: str | None = None
    host: str | None = None


class Lease:
    """The right to change the blob whose folder is open as ``folder``, until `close`. ``id`` is new for each.

    Raises:
        LeaseError: somebody else has it; the message says who.
        BlobError: there is no file ``lock``, which each blob has from its beginning.
    """

    def __init__(self, folder: int, path: str) -> None:
        self.id = os.urandom(16).hex()
        self.path = path
        fd = _open_lock(folder, path, os.O_RDWR)
        try:
            self._lock = _take(fd, path)
            self._file = os.fstat(fd)
            self._folder = os.dup(folder)
            try:
                self.check()
                with suppress(OSError):  # a full disk keeps nobody from what needs no room
                    _sign(fd, self.id)
            except BaseException:
                self.close()
                raise
        finally:
            os.close(fd)

    @property
    def held(self) -> bool:
        """False once it is closed, and in a child of the process that took it."""
        return self._lock.held

    def check(self) -> None:
        """Raise LeaseError where the right is lost: closed, not inherited by a child, or ``lock`` is another file."""
        if not self.held:
            raise LeaseError("this process does not hold the lease", path=self.path)
        try:
            there = os.stat(LOCK, dir_fd=self._folder, follow_symlinks=False)
        except FileNotFoundError:
            there = None
        if there is None or not os.path.samestat(there, self._file):
            raise LeaseError("the lease is lost: the file lock was replaced", path=self.path)

    def close(self) -> None:
        """Give the right up. Closing twice is harmless."""
        self._lock.close()
        if self._folder >= 0:
            os.close(self._folder)
            self._folder = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def acquire(path: str | os.PathLike[str]) -> Lease:
    """Take the lease of the blob at ``path`` without opening the blob: nobody changes it meanwhile.

    Raises:
        LeaseError: somebody else has it.
        BlobError: there is no page blob.
    """
    path = os.fspath(path)
    folder = open_blob_folder(path)
    try:
        return Lease(folder, path)
    finally:
        os.close(folder)


def lease_state(path: str | os.PathLike[str]) -> LeaseState:
    """Tell who writes the blob at ``path``, disturbing nobody. Raises BlobError when there is no page blob."""
    path = os.fspath(path)
    folder = open_blob_folder(path)
    try:
        fd = _open_lock(folder, path, os.O_RDONLY)
    finally:
        os.close(folder)
    try:
        pid = holder(fd)
        if pid is None:
            return LeaseState(is_locked(fd))
        note = _read_note(fd)
    finally:
        os.close(fd)
    if note.get("pid") != str(pid):  # not signed yet, or by a process that we see under another number
        return LeaseState(True, pid)
    return LeaseState(True, pid, note.get("since"), note.get("host"))


def open_blob_folder(path: str) -> int:
    """Open the folder ``path``. Raises BlobError when it is none, or cannot be opened."""
    try:
        return files.open_folder(path)
    except NotADirectoryError as error:
        raise BlobError("is no page blob, which is a folder", path=path) from error
    except OSError as error:
        raise BlobError(error.strerror or str(error), path=path) from error


def _open_lock(folder: int, path: str, access: int) -> int:
    try:
        return files.open_regular(LOCK, access | os.O_NOFOLLOW, folder=folder)
    except FileNotFoundError as error:
        raise BlobError("is no page blob: it has no file lock", path=path) from error
    except DiskError as error:
        raise BlobError(error.message, path=f"{path}/{LOCK}") from error
    except OSError as error:
        raise BlobError(error.strerror or str(error), path=f"{path}/{LOCK}") from error


def _take(fd: int, path: str) -> WriterLock:
    try:
        return WriterLock(fd, path)
    except LeaseError as error:
        note = _read_note(fd)
        if str(holder(fd)) != note.get("pid"):
            raise
        who = f"process {note['pid']} on {note.get('host')} has it open for writing, since {note.get('since')}"
        raise LeaseError(who, path=path) from error


def _sign(fd: int, lease: str) -> None:
    """Write who we are. Nothing depends on it, so it is not made durable."""
    note = f"pid {os.getpid()}\nhost {os.uname().nodename}\nsince {format_moment(now())}\nlease {lease}\n"
    files.truncate(fd, 0)
    files.pwrite_all(fd, note.encode(), 0)


def _read_note(fd: int) -> dict[str, str]:
    """Return what the holder wrote; nothing of it that would not print."""
    lines = files.pread_all(fd, _LONGEST_NOTE, 0).decode("ascii", "replace").splitlines()
    return {key: value for key, _, value in (line.partition(" ") for line in lines) if line_prints(key + value)}


def line_prints(text: str) -> bool:
    return text.isascii() and text.isprintable()

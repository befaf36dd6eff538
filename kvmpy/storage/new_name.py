"""The name of a new file: given when the file is whole and durable, never taken from another.

It is written under a temporary name beside its own, and linked. Whatever ends the work, the temporary name goes; only
a process that is killed leaves it behind, and it may be deleted.

Not here: what is written, and folders (`blob_aside`).
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from kvmpy.errors import DiskError
from kvmpy.storage import files


@contextmanager
def new_file(path: str) -> Iterator[int]:
    """Give a new empty file to write, which is at ``path`` afterwards: whole and durable, or not at all.

    What is at ``path`` already, or comes there in the meantime, stays. Raises DiskError, OSError.
    """
    refuse_existing(path)
    folder = files.open_folder(os.path.dirname(path) or os.curdir)
    try:
        with _temporary_file(folder) as (fd, temporary):
            yield fd
            files.fdatasync(fd)
            _give_name(temporary, path, folder)
        files.fsync_folder(folder)
    finally:
        os.close(folder)


@contextmanager
def _temporary_file(folder: int) -> Iterator[tuple[int, str]]:
    """Give a new file and its name in ``folder``, which are both gone afterwards."""
    temporary = temporary_name()
    fd = files.create(temporary, folder=folder)
    try:
        yield fd, temporary
    finally:
        os.close(fd)
        files.unlink(temporary, folder=folder)


def _give_name(temporary: str, path: str, folder: int) -> None:
    try:
        files.link(temporary, os.path.basename(path), old_folder=folder, new_folder=folder)
    except FileExistsError:
        raise _exists(path) from None
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP):
            raise
        message = "cannot be made without a risk to overwrite another: its file system has no hard links"
        raise DiskError(message, path=path) from error


def temporary_name() -> str:
    """Return a name that nobody has: what is left behind with it, by a process that was killed, may be deleted."""
    return f".kvmpy-{os.urandom(8).hex()}.new"


def refuse_existing(path: str) -> None:
    """Raise DiskError when there is something at ``path``, a dangling link included."""
    if os.path.lexists(path):
        raise _exists(path)


def _exists(path: str) -> DiskError:
    return DiskError("exists already: nothing is overwritten", path=path)

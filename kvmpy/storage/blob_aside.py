"""A folder beside the place where a blob is to be, in which it is made, or taken apart, before anybody sees it there.

::

    data.blob.kvmpy-unfinished/     lock, layers, journal-1, meta       seen by nobody as data.blob
        |  rename, and the same back when a blob is deleted       the one step that is the change
    data.blob/

There is one such name for each path, so that crashes leave at most one such folder, which the next use of the path
removes. Who holds the lock in it may use it; what else is in it must be what blobs are made of. Floor: storage.
"""

import errno
import os
from contextlib import suppress
from typing import Self

from kvmpy.errors import BlobError, LeaseError
from kvmpy.storage import blob_meta_file, files
from kvmpy.storage.blob_layer import Folder, Layer
from kvmpy.storage.blob_meta import Meta
from kvmpy.storage.blob_meta_file import META
from kvmpy.storage.blob_writer import BlobWriter, is_removable, new_journal, write_file
from kvmpy.storage.lease import LOCK, Lease

SUFFIX = ".kvmpy-unfinished"
"""No blob may have a name that ends so: what does is somebody's aside, and may be removed."""
_IN_THE_WAY = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)
_NO_PLACE = (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EROFS, errno.ELOOP, errno.ENAMETOOLONG)
_ATTEMPTS = 100
"""How often to begin again when others remove the folder at the same moment."""


class Aside:
    """The empty folder in which the blob for ``path`` is made; gone at the end of ``with`` unless it was published.

    What is in it may reach the disk in any order, and its names too, so before the rename `publish` makes the bytes
    of ``meta`` durable, and then all names in the folder. The layers' bytes are the maker's to make durable, where
    the map relies on them. After the rename the folder above is made durable: then there is a new blob.

    Raises:
        BlobError: there is something at ``path``, or a folder that is not ours where the aside is to be.
        LeaseError: another process makes or deletes a blob there.
        OSError: the host refused.
    """

    def __init__(self, path: str) -> None:
        self._path = path.rstrip("/")
        _check_name(self._path)
        if os.path.lexists(self._path):
            raise BlobError("exists already", path=path)
        fd, self._lease = _take(self._path + SUFFIX)
        self.folder = Folder(fd, path)
        self._layers: list[Layer] = []
        self._published = False
        try:
            _remove_files(fd)  # what a crash has left
        except BaseException:
            self.__exit__()
            raise

    def new_layer(self, size: int) -> Layer:
        """Make a layer in it, which is closed with it unless it is published."""
        layer = Layer.create(self.folder, size)
        self._layers.append(layer)
        return layer

    def publish(self, meta: Meta) -> BlobWriter:
        """Write ``meta`` and give the folder its name, durably; return its writer, which now owns what is open.

        Raises:
            BlobError: something has come to be at the path.
        """
        journal = new_journal(self.folder, 1)
        try:
            write_file(self.folder, META, blob_meta_file.encode(meta, 1))
            files.fsync_folder(self.folder.fd)
            rename_durably(self._path + SUFFIX, self._path)
        except BaseException:
            journal.close()
            raise
        self._published = True
        return BlobWriter(self.folder, self._lease, meta, 1, journal)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._published:
            return
        for layer in self._layers:
            layer.close()
        with suppress(OSError):
            dismantle(self.folder.fd, self._path + SUFFIX)
        self._lease.close()
        os.close(self.folder.fd)


def _check_name(path: str) -> None:
    """Refuse a place where a blob would be lost, or in the way. Raises BlobError."""
    if path.endswith(SUFFIX):
        raise BlobError(f"names that end in {SUFFIX} are for what is being made", path=path)
    folder = os.path.dirname(path)
    if os.path.lexists(os.path.join(folder, META)) and os.path.lexists(os.path.join(folder, LOCK)):
        raise BlobError("would lie inside a page blob", path=path)


def rename_durably(old: str, new: str) -> None:
    """Rename a folder within the folder that it is in. Raises BlobError where there is something already."""
    parent = files.open_folder(os.path.dirname(old) or ".")
    try:
        files.rename(old, new)
        files.fsync_folder(parent)
    except OSError as error:
        if error.errno not in _IN_THE_WAY:
            raise
        raise BlobError("exists already", path=new) from error
    finally:
        os.close(parent)


def check_contents(folder: int, path: str) -> None:
    """Raise BlobError when there is anything that no blob has."""
    for name in os.listdir(folder):
        if not is_removable(name) and name not in (META, LOCK):
            raise BlobError(f"holds {name!r}, which is no part of a page blob", path=path)


def clear_aside(path: str) -> None:
    """Remove what a crash has left of a blob that was to be at ``path``. Raises LeaseError, BlobError as `Aside`."""
    name = path + SUFFIX
    if os.path.lexists(name):
        folder, lease = _take(name)
        with lease:
            dismantle(folder, name)
            os.close(folder)


def dismantle(folder: int, path: str) -> None:
    """Remove the open folder ``path`` with all that is a blob's in it, the lock last: until then it is ours."""
    _remove_files(folder)
    files.unlink(LOCK, folder=folder)
    files.remove_folder(path)


def _remove_files(folder: int) -> None:
    for name in os.listdir(folder):
        if is_removable(name) or name == META:
            files.unlink(name, folder=folder)


def _take(name: str) -> tuple[int, Lease]:
    """Make the folder ``name``, or take the one that a crash has left, and return it open with its lease."""
    for _ in range(_ATTEMPTS):
        folder = _open_or_make(name)
        try:
            lease = _lease_of(folder, name)
            if lease is not None:
                return folder, lease
        except BaseException:
            os.close(folder)
            with suppress(OSError):
                files.remove_folder(name)  # where it is empty
            raise
        os.close(folder)
    raise BlobError("is made and removed again and again by others", path=name)


def _open_or_make(name: str) -> int:
    try:
        with suppress(FileExistsError):
            files.make_folder(name)
        return files.open_folder(name, os.O_NOFOLLOW)
    except OSError as error:
        if error.errno not in _NO_PLACE:
            raise
        raise BlobError(error.strerror or str(error), path=name.removesuffix(SUFFIX)) from error


def _lease_of(folder: int, name: str) -> Lease | None:
    """Return the lease of the open folder; None when its last owner has removed it meanwhile."""
    try:
        check_contents(folder, name)
        with suppress(FileExistsError):
            os.close(files.create(LOCK, folder=folder))
        lease = Lease(folder, name)
    except (FileNotFoundError, BlobError, LeaseError):
        if not _is_at(folder, name):
            return None
        raise
    if _is_at(folder, name):
        return lease
    lease.close()
    return None


def _is_at(folder: int, name: str) -> bool:
    """Tell whether the open folder has this name still."""
    try:
        return os.path.samestat(os.fstat(folder), os.stat(name, follow_symlinks=False))
    except FileNotFoundError:
        return False

"""A layer: a sparse file that holds pages of one blob, or of many that were copied from each other.

Byte x of the blob is byte x of the layer. A blob has one layer that it writes, the *active* one; all others are
frozen: no byte of them ever changes, so they may have names in the folders of several blobs, and the kernel counts.

::

    active, open for writing                                frozen, or open for reading
    fd             what engines read and write              opened when an extent first names it
    unaligned_fd   the same; with O_DIRECT without it       as fd
    own_fd         ours: copies into it, makes it durable   (opened and closed for each use)

Our own descriptor, because the kernel reports a failed write once for each open(2): an fdatasync of ours on ``fd``
would take the error from the engine, whose next flush would then succeed without the bytes.

Not here: which page is in which layer. Floor: storage.
"""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from kvmpy.errors import BlobError, DiskError
from kvmpy.storage import files, sparse

SUFFIX = ".layer"
_NAME_DIGITS = 32


class Folder(NamedTuple):
    """An open folder of a blob. Names in it are used relative to ``fd``: nothing leads out of it, moved or not."""

    fd: int
    path: str
    direct: bool = False
    """Its layers are opened with O_DIRECT too."""

    def path_of(self, name: str) -> str:
        return f"{self.path}/{name}"


def is_layer_name(name: str) -> bool:
    """Tell whether ``name`` is one that we give: no path, nothing but our digits and suffix."""
    digits = name.removesuffix(SUFFIX)
    return len(digits) == _NAME_DIGITS and not digits.strip("0123456789abcdef") and name == digits + SUFFIX


class Layer:
    """The layer ``name`` in ``folder``. Nothing is opened yet."""

    def __init__(self, folder: Folder, name: str) -> None:
        self.name = name
        self._folder = folder
        self.fd = self.unaligned_fd = self.own_fd = -1

    @property
    def path(self) -> str:
        return self._folder.path_of(self.name)

    @property
    def is_open(self) -> bool:
        """Extents may name its descriptors."""
        return self.fd >= 0

    # --- opening ---

    @classmethod
    def create(cls, folder: Folder, size: int) -> "Layer":
        """Make a layer of ``size`` bytes that are all zeros, open for writing; nothing of it is durable yet."""
        layer = cls(folder, os.urandom(_NAME_DIGITS // 2).hex() + SUFFIX)
        layer.own_fd = files.create(layer.name, folder=folder.fd)
        try:
            files.truncate(layer.own_fd, size)
            layer._open_shared(os.O_RDWR)
        except BaseException:
            layer.close()
            files.discard(layer.name, folder=folder.fd)
            raise
        return layer

    def open_for_writing(self, size: int) -> None:
        """Open the active layer, and lengthen it to ``size`` bytes where a crash left it shorter."""
        self.own_fd = self._open(os.O_RDWR)
        if os.fstat(self.own_fd).st_size < size:
            files.truncate(self.own_fd, size)
        self._open_shared(os.O_RDWR)

    def open_for_reading(self) -> None:
        """Open it for extents to name it."""
        self._open_shared(os.O_RDONLY)

    def _open_shared(self, access: int) -> None:
        self.unaligned_fd = self.fd = self._open(access)
        if self._folder.direct:
            try:
                self.fd = files.reopen(self.unaligned_fd, access | os.O_DIRECT)
            except OSError as error:
                message = f"cannot be opened past the page cache: {error.strerror}"
                raise DiskError(message, path=self.path) from error

    def _open(self, access: int) -> int:
        """Open the file itself: no symbolic link, no FIFO, nothing outside the folder."""
        try:
            return files.open_regular(self.name, access | os.O_NOFOLLOW, folder=self._folder.fd)
        except DiskError as error:
            raise BlobError(error.message, path=self.path, offset=0) from None
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ELOOP):
                raise
            raise BlobError("the layer is missing", path=self.path, offset=0) from error

    @contextmanager
    def reading(self) -> Iterator[int]:
        """Give a descriptor to read from, which is not kept: a blob of a thousand layers needs no thousand of them."""
        if self.is_open:
            yield self.unaligned_fd
            return
        fd = self._open(os.O_RDONLY)
        try:
            yield fd
        finally:
            os.close(fd)

    # --- what is in it ---

    def read(self, offset: int, size: int) -> bytes:
        """Return ``size`` bytes. Raises BlobError where the file ends first: somebody cut it."""
        with self.reading() as fd:
            data = files.pread_all(fd, size, offset)
            if len(data) < size:
                raise self._cut(os.fstat(fd).st_size)
        return data

    def data_runs(self, start: int, end: int) -> list[tuple[int, int]]:
        """Return (start, end), in bytes, of what is no hole in the range. Raises BlobError as `read`."""
        with self.reading() as fd:
            self._check_length(fd, end)
            return list(sparse.data_runs(fd, start, end))

    def first_data(self, start: int, end: int) -> int | None:
        """Return the first byte in the range that is in no hole, or None. Raises BlobError as `read`."""
        with self.reading() as fd:
            self._check_length(fd, end)
            return next((data for data, _ in sparse.data_runs(fd, start, end)), None)

    def _check_length(self, fd: int, end: int) -> None:
        """Take no missing end for a hole."""
        size = os.fstat(fd).st_size
        if size < end:
            raise self._cut(size)

    def _cut(self, size: int) -> BlobError:
        return BlobError("the layer ends here, before its pages do", path=self.path, offset=size)

    def status(self) -> os.stat_result:
        """Return what the folder has under its name. Raises BlobError unless it is a regular file."""
        try:
            status = os.stat(self.name, dir_fd=self._folder.fd, follow_symlinks=False)
        except FileNotFoundError as error:
            raise BlobError("the layer is missing", path=self.path, offset=0) from error
        if not stat.S_ISREG(status.st_mode):
            raise BlobError("not a regular file", path=self.path, offset=0)
        return status

    # --- the end of writing ---

    def freeze(self) -> None:
        """Take the right to write from every descriptor of it; their numbers stay good for reading.

        An engine that still has the layer as writable in its table gets EBADF, and no snapshot changes.
        """
        for fd in {self.fd, self.unaligned_fd}:
            direct = os.O_DIRECT if self._folder.direct and fd == self.fd else 0
            try:
                readonly = files.reopen(fd, os.O_RDONLY | direct)
            except OSError:
                # No descriptor left: that of the folder, which nobody can read or write, is better than a writable one.
                os.dup2(self._folder.fd, fd, inheritable=False)
                continue
            os.dup2(readonly, fd, inheritable=False)
            os.close(readonly)
        os.close(self.own_fd)
        self.own_fd = -1

    def close(self) -> None:
        """Close what is open. Closing twice is harmless."""
        for fd in {self.fd, self.unaligned_fd, self.own_fd} - {-1}:
            os.close(fd)
        self.fd = self.unaligned_fd = self.own_fd = -1

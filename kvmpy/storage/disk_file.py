"""A file of the host that holds a disk: opened once, locked for its writer, read in checked pieces.

Whatever else stands at the path is refused before it is opened: a FIFO would make us wait, some devices start when
they are opened. With O_DIRECT there are two descriptors of the same file; small and odd transfers take the other one.

Not here: what the bytes mean, and every call that changes them (`files`).
"""

import os
import stat
from typing import Self

from kvmpy.errors import DiskError
from kvmpy.storage import files
from kvmpy.storage.disk import SECTOR_SIZE
from kvmpy.storage.lock import WriterLock

LAYER_SUFFIX = ".layer"
"""Of the files that a page blob's pages are in."""
PAGE_CACHE_ALIGNMENT = 1
DIRECT_ALIGNMENT = 4096
"""Assumed where the host does not say: no disk in use has larger logical blocks."""

_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
)


class DiskFile:
    """An open file, regular or, with ``devices``, a block device; unless ``readonly`` it is locked for this writer.

    ``fd`` is what extents name; ``unaligned_fd`` is the same file through the page cache (equal to ``fd`` without
    ``direct``), and what metadata goes through. ``size`` is the length in bytes when it was opened.

    Raises:
        DiskError: it cannot be opened, or is something else.
        LeaseError: another process writes it.
    """

    def __init__(self, path: str, *, readonly: bool, direct: bool = False, devices: bool = False) -> None:
        self.path = path
        self.readonly = readonly
        self.direct = direct
        self.alignment = PAGE_CACHE_ALIGNMENT
        self._lock: WriterLock | None = None
        access = os.O_RDONLY if readonly else os.O_RDWR
        self.fd = self.unaligned_fd = _open_disk_file(path, access, devices)
        try:
            if not readonly:
                self._lock = WriterLock(self.unaligned_fd, path)
            if direct:
                self._open_direct(access)
            # lseek also knows the size of a block device.
            self.size = os.lseek(self.unaligned_fd, 0, os.SEEK_END)
        except OSError as error:
            self.abandon()
            raise DiskError(error.strerror or str(error), path=path) from error
        except BaseException:
            self.abandon()
            raise

    def _open_direct(self, access: int) -> None:
        try:
            # By the descriptor, not by the path: at the path there may be another file by now.
            self.fd = files.reopen(self.unaligned_fd, access | os.O_DIRECT)
        except OSError as error:
            message = f"cannot be opened past the page cache: {error.strerror}"
            raise DiskError(message, path=self.path) from error
        self.alignment = direct_alignment(os.fstat(self.fd))

    def read(self, offset: int, size: int) -> bytes:
        """Return exactly ``size`` bytes from ``offset``. Raises DiskError: it ends before, or cannot be read."""
        try:
            data = files.pread_all(self.unaligned_fd, size, offset)
        except OSError as error:
            raise DiskError(f"cannot be read: {error.strerror}", path=self.path, offset=offset) from error
        if len(data) < size:
            raise DiskError("truncated: the file ends here", path=self.path, offset=offset + len(data))
        return data

    def check_access(self, sector: int, sectors: int, size: int, *, write: bool) -> None:
        """Refuse what leaves a disk of ``size`` bytes (ValueError), and to write what is read-only (DiskError)."""
        if sector < 0 or sectors < 0 or (sector + sectors) * SECTOR_SIZE > size:
            raise ValueError(f"sectors {sector}+{sectors}: the disk has {size // SECTOR_SIZE}")
        if write and self.readonly:
            raise DiskError("is open read-only", path=self.path, offset=sector * SECTOR_SIZE)

    def close(self) -> None:
        """Make all durable and close, which gives up the lock. Closing twice is harmless. Raises OSError (EIO)."""
        try:
            if self._lock is not None:
                files.fdatasync(self.unaligned_fd)
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Close without making anything durable. Closing twice is harmless."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None
        for fd in {self.fd, self.unaligned_fd} - {-1}:
            os.close(fd)
        self.fd = self.unaligned_fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def direct_alignment(status: os.stat_result) -> int:
    """Return what O_DIRECT wants of offsets, lengths and addresses, in bytes, for the file of this status."""
    device = status.st_rdev if stat.S_ISBLK(status.st_mode) else status.st_dev
    folder = f"/sys/dev/block/{os.major(device)}:{os.minor(device)}"
    for queue in ("queue", "../queue"):  # a partition has that of its disk
        try:
            with open(f"{folder}/{queue}/logical_block_size") as file:
                return int(file.read())
        except (OSError, ValueError):
            continue
    return DIRECT_ALIGNMENT


def _refuse_layer(path: str, access: int) -> None:
    """Let nobody write into a page blob behind its back. Raises DiskError."""
    folder, name = os.path.split(os.path.realpath(path))
    if access == os.O_RDWR and name.endswith(LAYER_SUFFIX) and os.path.lexists(os.path.join(folder, "meta")):
        raise DiskError(f"is a part of the page blob {folder}", path=path)


def _open_disk_file(path: str, access: int, devices: bool) -> int:
    """Open ``path`` and return its descriptor; never waits, and opens nothing that is no disk."""

    def allowed(mode: int) -> bool:
        return stat.S_ISREG(mode) or (devices and stat.S_ISBLK(mode))

    _refuse_layer(path, access)
    try:
        # Looked at before it is opened: opening alone starts some devices.
        mode = os.stat(path).st_mode
        if allowed(mode):
            # Should it become a FIFO in between, O_NONBLOCK keeps open() from waiting for the other end.
            fd = os.open(path, access | os.O_CLOEXEC | os.O_NONBLOCK)
            mode = os.fstat(fd).st_mode
            if allowed(mode):
                return fd
            os.close(fd)
    except OSError as error:
        raise DiskError(error.strerror or str(error), path=path) from error
    kind = next((name for is_kind, name in _KINDS if is_kind(mode)), "no regular file")
    raise DiskError(f"is {kind}: a regular file is wanted", path=path)

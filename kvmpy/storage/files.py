"""Every system call by which a disk image changes a file or a folder, in one place.

Whoever wants to know what survives a power cut reads the callers of this file. What the kernel promises::

    pwrite_all, truncate, zero      in the page cache: seen at once by every process, lost with the power
    fdatasync(fd)                   the file's bytes and its size are on the disk; its name need not be
    create, link, rename, unlink    the name is changed for every process at once, and back after a power cut
    fsync_folder(fd)                the names in that folder are on the disk

Until a sync, changes reach the disk in any order, or not at all; each sector of 512 bytes whole or not at all.

Names are relative to ``folder``, a descriptor, where one is given. Nothing here opens anything but regular files and
folders, and nothing waits: a FIFO or a device where a file should be is a DiskError. Errors of the kernel are OSError.
"""

import errno
import os
import stat
from contextlib import suppress

from kvmpy.errors import DiskError
from kvmpy.storage.disk import SyncFailed
from kvmpy.units import MiB

# What <linux/falloc.h> calls FALLOC_FL_KEEP_SIZE and FALLOC_FL_PUNCH_HOLE.
KEEP_SIZE = 0x01
PUNCH_HOLE = 0x02

PIECE = 1 * MiB
"""Bytes that are read or written at once where much is copied."""


# --- opening ------------------------------------------------------------------------------------------------------


def open_folder(path: str, flags: int = 0) -> int:
    """Open a folder, for names relative to it and for `fsync_folder`; ``flags`` may add O_NOFOLLOW."""
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | flags)


def open_regular(name: str, flags: int, *, folder: int | None = None) -> int:
    """Open a regular file that exists; ``flags`` as for open(2). O_NOFOLLOW is the caller's choice.

    Raises:
        DiskError: it is a FIFO, a folder, a device, a socket.
        OSError: the kernel refused.
    """
    # O_NONBLOCK: opening a FIFO returns at once. It means nothing to a regular file.
    fd = os.open(name, flags | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY, dir_fd=folder)
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return fd
    os.close(fd)
    raise DiskError("not a regular file", path=name)


def reopen(fd: int, flags: int) -> int:
    """Open the file behind ``fd`` once more: its own position, lock, flags and report of failed writes."""
    return os.open(f"/proc/self/fd/{fd}", flags | os.O_CLOEXEC | os.O_NONBLOCK)


def create(name: str, *, folder: int | None = None) -> int:
    """Make a new empty file and open it for reading and writing. Raises FileExistsError."""
    return os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666, dir_fd=folder)


# --- bytes --------------------------------------------------------------------------------------------------------


def pread_all(fd: int, size: int, offset: int) -> bytes:
    """Return ``size`` bytes from ``offset``; fewer only where the file ends."""
    data = os.pread(fd, size, offset)
    while 0 < len(data) < size:
        more = os.pread(fd, size - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


def pwrite_all(fd: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    """Write all of ``data`` at ``offset``."""
    with memoryview(data) as view:
        done = 0
        while done < len(view):
            done += os.pwrite(fd, view[done:], offset + done)


def truncate(fd: int, size: int) -> None:
    """Cut the file off at ``size`` bytes, or lengthen it with a hole."""
    os.ftruncate(fd, size)


def zero(fd: int, offset: int, size: int) -> None:
    """Make the range, which lies inside the file, read as zeros, and give its room back where the host can."""
    try:
        _fallocate(fd, KEEP_SIZE | PUNCH_HOLE, offset, size)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        _write_zeros(fd, offset, size)


def reserve(fd: int, offset: int, size: int) -> None:
    """Have room for the range, as far as the host can promise it: writing there does not fail for want of any."""
    try:
        _fallocate(fd, KEEP_SIZE, offset, size)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise


def _write_zeros(fd: int, offset: int, size: int) -> None:
    """Write zeros, which take room."""
    zeros = bytes(min(size, PIECE))
    for done in range(0, size, PIECE):
        pwrite_all(fd, memoryview(zeros)[: size - done], offset + done)


def _fallocate(fd: int, mode: int, offset: int, size: int) -> None:
    """Call fallocate(2), which Python's own library has without its modes only."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    while size and libc.fallocate(fd, mode, offset, size):
        error = ctypes.get_errno()
        if error != errno.EINTR:
            raise OSError(error, os.strerror(error))


def fdatasync(fd: int) -> None:
    """Return when the bytes and the size of the file are on the disk.

    Raises:
        SyncFailed: they may be lost. That is told once for each open(2) of the file.
    """
    try:
        os.fdatasync(fd)
    except OSError as error:
        raise SyncFailed(error.errno, error.strerror) from error


# --- names --------------------------------------------------------------------------------------------------------


def rename(old: str, new: str, *, old_folder: int | None = None, new_folder: int | None = None) -> None:
    """Give a file or a folder another name, replacing the file, or the empty folder, that has it."""
    os.rename(old, new, src_dir_fd=old_folder, dst_dir_fd=new_folder)


def link(old: str, new: str, *, old_folder: int | None = None, new_folder: int | None = None) -> None:
    """Give a file one more name. Raises FileExistsError, and OSError EXDEV, EMLINK, EPERM where it may not have one."""
    os.link(old, new, src_dir_fd=old_folder, dst_dir_fd=new_folder, follow_symlinks=False)


def unlink(name: str, *, folder: int | None = None) -> None:
    """Take a name away; the file goes with its last name and its last descriptor."""
    os.unlink(name, dir_fd=folder)


def discard(name: str, *, folder: int | None = None) -> None:
    """Take a name away if it is there and the host lets us: for what nobody needs any more, after an error too."""
    with suppress(OSError):
        os.unlink(name, dir_fd=folder)


def make_folder(name: str, *, folder: int | None = None) -> None:
    """Make an empty folder. Raises FileExistsError."""
    os.mkdir(name, dir_fd=folder)


def remove_folder(name: str, *, folder: int | None = None) -> None:
    """Remove an empty folder. Raises OSError ENOTEMPTY."""
    os.rmdir(name, dir_fd=folder)


def fsync_folder(fd: int) -> None:
    """Return when the names in the folder are on the disk."""
    os.fsync(fd)

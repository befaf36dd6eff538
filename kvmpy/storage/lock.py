"""The writer's lock: at most one open disk may write a file, across all processes of the host.

It is flock(2) on a descriptor of its own, so the kernel decides who is alive: the lock goes with its holder, however
that dies, and two opens in one process exclude each other too. Nothing is kept in the file, which may be a guest's
disk. A child made by fork() does not hold its parent's lock: it closes the descriptor first of all.
"""

import fcntl
import os
import time

from kvmpy.errors import LeaseError
from kvmpy.storage import files


class WriterLock:
    """The right to write the file behind ``fd``, which stays the caller's; held until `close` or the process's end.

    Raises:
        LeaseError: somebody else has it; names the process where the kernel tells it.
    """

    def __init__(self, fd: int, path: str) -> None:
        self._fd = files.reopen(fd, os.O_RDWR)
        _HELD.add(self)  # before it is locked: a fork at this moment must not keep the lock
        try:
            if not self._take():
                pid = holder(self._fd)
                who = f"process {pid}" if pid else "another process"
                raise LeaseError(f"{who} has it open for writing", path=path)
        except BaseException:
            self.close()
            raise

    def _take(self) -> bool:
        """Try to take it, and again for some milliseconds while only somebody who asks `is_locked` is in the way."""
        for _ in range(_ATTEMPTS):
            if _flock(self._fd, fcntl.LOCK_EX):
                return True
            if holder(self._fd) is not None:
                return False
            time.sleep(0.001)
        return False

    @property
    def held(self) -> bool:
        """False once it is closed, and in a child of the process that took it."""
        return self._fd >= 0

    def close(self) -> None:
        """Give the right up. Closing twice is harmless."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            _HELD.discard(self)


_ATTEMPTS = 5
_HELD: set[WriterLock] = set()
"""Those of this process."""


def _close_in_child() -> None:
    for lock in tuple(_HELD):
        lock.close()  # the parent's lock stays: only the last descriptor of an open file gives it up


os.register_at_fork(after_in_child=_close_in_child)


def holder(fd: int) -> int | None:
    """Return the process that has the writer's lock on the file behind ``fd``; None where we see none.

    Those in another pid namespace are not seen. Source: proc_locks(5).
    """
    status = os.fstat(fd)
    file = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    with open("/proc/locks") as locks:
        for line in locks:
            fields = line.split()  # 1: FLOCK ADVISORY WRITE <pid> <device>:<inode> 0 EOF; waiting ones have a "->"
            if fields[1] == "FLOCK" and fields[3] == "WRITE" and fields[5] == file:
                return int(fields[4])
    return None


def is_locked(fd: int) -> bool:
    """Tell whether anybody has the writer's lock on the file behind ``fd``."""
    if holder(fd) is not None:
        return True
    probe = files.reopen(fd, os.O_RDONLY)
    try:
        return not _flock(probe, fcntl.LOCK_SH)
    finally:
        os.close(probe)


def _flock(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True

"""Waiting for several descriptors and for other threads: the main thread of a running PC sleeps here."""

import os
import select
import threading
import time
from collections.abc import Callable
from typing import Protocol


class EventLoop:
    """Calls back when a watched descriptor is readable; `wake` ends a wait from any thread.

    Python's signal handlers run between two waits, in the main thread, as always.
    """

    def __init__(self) -> None:
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._closing = threading.RLock()  # re-entrant: `wake` is for signal handlers too
        self._poll = select.poll()
        self._wakes = select.poll()
        self._wakes.register(self._wake_fd, select.POLLIN)
        self._callbacks: dict[int, Callable[[], None]] = {}
        self.watch(self._wake_fd, self._awake)

    def watch(self, fd: int, callback: Callable[[], None]) -> None:
        """Call ``callback`` whenever ``fd`` is readable or hung up, from `wait`."""
        self._callbacks[fd] = callback
        self._poll.register(fd, select.POLLIN)

    def unwatch(self, fd: int) -> None:
        """Forget ``fd``; it need not be watched."""
        if self._callbacks.pop(fd, None) is not None:
            self._poll.unregister(fd)

    def wake(self) -> None:
        """Make a `wait` under way, or the next, return. From any thread or signal handler, also after `close`."""
        with self._closing:
            if self._wake_fd >= 0:
                os.eventfd_write(self._wake_fd, 1)

    def wait(self, timeout: float | None) -> None:
        """Wait up to ``timeout`` seconds for the first events and serve them."""
        milliseconds = None if timeout is None else max(0, int(timeout * 1000 + 0.999))
        for fd, _ in self._poll.poll(milliseconds):
            callback = self._callbacks.get(fd)
            if callback is not None:
                callback()

    def rest(self, milliseconds: int) -> None:
        """Wait up to ``milliseconds`` for a `wake` alone, while other events gather."""
        self._wakes.poll(milliseconds)

    def _awake(self) -> None:
        os.eventfd_read(self._wake_fd)

    def close(self) -> None:
        """Close the loop's own descriptor; closing twice is harmless."""
        with self._closing:
            if self._wake_fd >= 0:
                os.close(self._wake_fd)
                self._wake_fd = -1


class Watch(Protocol):
    """Who looks at a running guest now and then: at least every ``interval`` seconds, which may change."""

    @property
    def interval(self) -> float: ...

    def look(self) -> None: ...


class Deadline:
    """A point in time, or never."""

    def __init__(self, timeout: float | None) -> None:
        self._at = None if timeout is None else time.monotonic() + timeout

    def remaining(self, longest: float) -> float:
        """Return the seconds left, at least 0 and at most ``longest``."""
        return longest if self._at is None else min(longest, max(0.0, self._at - time.monotonic()))

    @property
    def passed(self) -> bool:
        """Tell whether it is over."""
        return self._at is not None and time.monotonic() >= self._at

"""The time that a guest gets to stop by itself, before a signal ends its run."""

import os
import select
import threading
import time
from collections.abc import Callable

ASK_AGAIN = 1.0  # seconds


class Grace:
    """Once `begin` was called, calls ``ask`` once a second, and ``stop`` when ``seconds`` have passed.

    Once is not enough: a kernel that has not set up its power button yet misses the edge.
    It has a thread of its own: the main thread may be busy with output whose reader sleeps.
    """

    def __init__(self, seconds: float, *, ask: Callable[[], object], stop: Callable[[], object]) -> None:
        self._seconds, self._ask, self._stop = seconds, ask, stop
        self._begun_fd = os.eventfd(0, os.EFD_CLOEXEC)
        self._closed_fd = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._main, name="kvmpy-grace", daemon=True)
        self._thread.start()

    def begin(self) -> None:
        """Let the time run; the second time nothing happens. For signal handlers."""
        os.eventfd_write(self._begun_fd, 1)

    def _main(self) -> None:
        begun, _, _ = select.select([self._begun_fd, self._closed_fd], [], [])
        if self._closed_fd in begun:
            return
        deadline = time.monotonic() + self._seconds
        left = self._seconds
        while left > 0:
            self._ask()
            closed, _, _ = select.select([self._closed_fd], [], [], min(left, ASK_AGAIN))
            if closed:
                return
            left = deadline - time.monotonic()
        self._stop()

    def close(self) -> None:
        """Call neither any more."""
        os.eventfd_write(self._closed_fd, 1)
        self._thread.join()
        os.close(self._begun_fd)
        os.close(self._closed_fd)

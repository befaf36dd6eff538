"""A timer of the host for a device: one thread that calls back when a time has come, and exists only while needed.

::

    vCPU threads    arm(delay) ---> a thread, begun when there is none, sleeps that long ---> on_due()
                    arm(delay), arm(None): otherwise; the last word counts

The thread sleeps until the next time, never shorter, and ends when nobody has needed it for a second.
"""

import threading
import time
from collections.abc import Callable
from typing import Protocol

NANOSECONDS = 10**9
LINGER = 1.0
"""Seconds that the thread stays when there is nothing to wait for."""

StartThread = Callable[[threading.Thread], None]


class Timer(Protocol):
    """What a device needs of it. ``on_due`` is the device's, and called without a lock."""

    on_due: Callable[[], None]

    def arm(self, delay_ns: int | None) -> None:
        """Be due once after that time, or never, whatever was said before. From any thread."""


class HostTimer:
    """A `Timer` whose thread is called ``name``; ``start`` starts it: it says on which CPUs of the host.

    ``on_error`` gets what ``on_due`` raised, in the thread, which then ends.
    """

    def __init__(
        self,
        name: str,
        *,
        on_error: Callable[[BaseException], None],
        start: StartThread = threading.Thread.start,
    ) -> None:
        self.on_due: Callable[[], None] = lambda: None
        self._name, self._on_error, self._start = name, on_error, start
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._due_ns: int | None = None
        self._closed = False

    def arm(self, delay_ns: int | None) -> None:
        """Be due once after that time, or never, whatever was said before. From any thread."""
        with self._changed:
            self._due_ns = None if delay_ns is None else time.monotonic_ns() + delay_ns
            if self._due_ns is None or self._closed:
                return
            if self._thread is None:
                self._thread = threading.Thread(target=self._main, name=self._name, daemon=True)
                self._start(self._thread)
            else:
                self._changed.notify()

    def close(self) -> None:
        """End the thread; the timer is never due any more. Not from ``on_due``. Closing twice is harmless."""
        with self._changed:
            self._closed = True
            self._changed.notify()
            thread = self._thread
        if thread is not None:
            thread.join()

    def _main(self) -> None:
        try:
            while self._wait():
                self.on_due()
        except BaseException as error:  # nothing above this frame would see it
            self._on_error(error)

    def _wait(self) -> bool:
        """Return True when the time has come, False when the thread shall end."""
        with self._changed:
            while not self._closed:
                if self._due_ns is None:
                    if not self._changed.wait(LINGER) and self._due_ns is None:
                        break
                elif (left_ns := self._due_ns - time.monotonic_ns()) > 0:
                    self._changed.wait(left_ns / NANOSECONDS)
                else:
                    self._due_ns = None
                    return True
            self._thread = None
            return False

"""Signals that end a run in good order: the vCPUs leave the guest, results are written, the terminal is restored."""

import os
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any, Self

from kvmpy.pc.loop import EventLoop

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


class Interruption:
    """Catches SIGNALS while its block is entered. ``received`` is the number of the first that came, or 0.

    Before `attach`, and from the second one on, a signal raises KeyboardInterrupt where the main thread is. In
    between it is passed on through a descriptor: a handler runs between any two steps of the main thread, which may
    hold just the locks that ending a run takes.
    """

    def __init__(self) -> None:
        self.received = 0
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._attached = False
        self._before: dict[signal.Signals, Any] = {}

    def attach(self, loop: EventLoop, stop: Callable[[], object]) -> None:
        """Call ``stop`` from ``loop`` after a signal; from now on a first signal interrupts nothing."""

        def received() -> None:
            os.eventfd_read(self._fd)
            stop()

        loop.watch(self._fd, received)
        self._attached = True

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        first = not self.received
        self.received = signum
        if not (first and self._attached):
            raise KeyboardInterrupt
        os.eventfd_write(self._fd, 1)

    def __enter__(self) -> Self:
        for signum in SIGNALS:
            # nohup says that the terminal may go; nobody may say that a run cannot be interrupted.
            if signum == signal.SIGHUP and signal.getsignal(signum) == signal.SIG_IGN:
                continue
            self._before[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        os.close(self._fd)

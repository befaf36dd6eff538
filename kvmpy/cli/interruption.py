"""Signals that end a run in good order: the vCPUs leave the guest, results are written, the terminal is restored."""

import os
import select
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from kvmpy.cli.grace import Grace
    from kvmpy.pc.loop import EventLoop

IMPATIENCE = 1.0  # seconds
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
POLITE = (signal.SIGTERM, signal.SIGHUP)
"""Those before which a guest may be asked to stop by itself: nobody sits there and waits."""


class Interruption:
    """Catches SIGNALS while its block is entered. ``received`` is the number of the last that came, or 0.

    Before `hold_back`, and when one comes IMPATIENCE after the first, a signal raises KeyboardInterrupt where the main
    thread is. (Sooner it is the same wish twice: timeout(1) signals a process, and then its group.) Otherwise it is
    passed on through a pipe, for two reasons. A handler runs between any two steps of the main thread,
    which may hold just the locks that ending a run takes. And a signal that comes when the main thread is about to
    wait would not end that wait: Python runs the handler only afterwards, but writes to the pipe at once.

    With a time of grace a first one of POLITE interrupts nothing: the guest is asked to stop, and the signal counts
    when that time has passed, or another signal comes.
    """

    def __init__(self) -> None:
        self.received = 0
        self._first_at = 0.0
        self._read_fd, self._write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._held_back = False
        self._grace: Grace | None = None
        self._asked_at = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def hold_back(self) -> None:
        """From now on a first signal interrupts nothing: whoever works looks at ``received`` where it may stop."""
        self._held_back = True

    def attach(self, loop: "EventLoop", stop: Callable[[], object]) -> None:
        """Call ``stop`` from ``loop`` after a signal, which is held back."""

        def wake() -> None:
            os.read(self._read_fd, 64)
            if self.received:
                stop()

        loop.watch(self._read_fd, wake)
        self.hold_back()

    @contextmanager
    def grace(self, seconds: float, *, ask: Callable[[], object], stop: Callable[[], object]) -> Iterator[None]:
        """Inside, give the guest time: ``ask`` it to stop, repeatedly, and ``stop`` it then. A thread calls both."""
        from kvmpy.cli.grace import Grace

        def expire() -> None:
            self.received = signal.SIGTERM
            stop()

        grace = self._grace = Grace(seconds, ask=ask, stop=expire)
        try:
            yield
        finally:
            self._grace = None
            grace.close()

    def wait(self, seconds: float | None) -> None:
        """Sleep for ``seconds``, or for ever; a signal ends that, also one that comes just before."""
        select.select([self._read_fd], [], [], seconds)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._grace is not None and signum in POLITE and not self.received:
            if not self._asked_at:
                self._asked_at = now
                self._grace.begin()
            if now - self._asked_at <= IMPATIENCE:
                return
        if not self.received:
            self._first_at = now
        self.received = signum
        if not self._held_back or now - self._first_at > IMPATIENCE:
            raise KeyboardInterrupt

    def __enter__(self) -> Self:
        self._wakeup_before = signal.set_wakeup_fd(self._write_fd, warn_on_full_buffer=False)
        for signum in SIGNALS:
            # nohup says that the terminal may go; nobody may say that a run cannot be interrupted.
            if signum == signal.SIGHUP and signal.getsignal(signum) == signal.SIG_IGN:
                continue
            self._before[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._read_fd)
        os.close(self._write_fd)

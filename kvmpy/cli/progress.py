"""A progress bar on standard error, for work that takes longer than a second.

::

    importing  [########............]   41% of 512 MiB  97.2 MiB/s  0:03 left

Only on a terminal, and gone when the work ends, well or badly. Not here: what the work is, and who may interrupt it.
"""

import os
import time
from collections import deque
from collections.abc import Callable
from typing import Self

from kvmpy.cli.messages import STDERR, one_line, show
from kvmpy.units import MiB, format_size

QUIET = 1.0  # seconds: what is done by then needs no bar
REDRAW = 0.1  # seconds
WINDOW = 50  # samples, so 5 s: the rate is that of the recent past, which is what is left is guessed from
BAR = 20  # characters
COLUMNS = 80
ERASE = "\r\x1b[K"


class ProgressBar:
    """Shows how far some work is. Calling it with (bytes done, bytes in all) draws, at most ten times a second."""

    def __init__(self, label: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._label = one_line(label)
        self._clock = clock
        self._samples: deque[tuple[float, int]] = deque(maxlen=WINDOW)
        self._next = 0.0
        self._drawn = False
        self._terminal = os.isatty(STDERR)

    def __enter__(self) -> Self:
        self._samples.append((self._clock(), 0))
        self._next = self._clock() + QUIET
        return self

    def __exit__(self, *_: object) -> None:
        if self._drawn:
            show(ERASE)

    def __call__(self, done: int, total: int) -> None:
        """Take note of how far the work is."""
        now = self._clock()
        if not self._terminal or now < self._next:
            return
        began, done_then = self._samples[0]
        self._samples.append((now, done))
        self._next = now + REDRAW
        self._drawn = True
        rate = max(done - done_then, 0) / (now - began)
        # Not the last column: a terminal would go on to the next line, which ERASE does not reach.
        show(ERASE + line(self._label, done, total, rate, width() - 1))


def line(label: str, done: int, total: int, rate: float, columns: int) -> str:
    """Return the bar as text of at most ``columns`` characters, less of it where room is short; ``rate`` in bytes/s."""
    share = min(done / total, 1.0) if total else 1.0
    filled = int(share * BAR)
    bar = f"[{'#' * filled}{'.' * (BAR - filled)}]  "
    percent = f"{int(share * 100):3}%"
    speed = f" of {format_size(total)}  {rate / MiB:.1f} MiB/s"
    left = f"  {duration((total - done) / rate)} left" if rate > 0 else ""
    for text in (bar + percent + speed + left, percent + speed + left, percent + left, percent):
        if len(label) + 2 + len(text) <= columns:
            return f"{label}  {text}"
    return percent[:columns]


def duration(seconds: float) -> str:
    """Return a time as a clock shows it: ``0:07``, ``12:30``, ``1:02:03``."""
    minutes, rest = divmod(round(max(seconds, 0.0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def width() -> int:
    """Return the terminal's columns."""
    try:
        return os.get_terminal_size(STDERR).columns or COLUMNS
    except OSError:
        return COLUMNS

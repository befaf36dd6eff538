"""The terminal of ``kvmpy run -i``: raw, so that each key reaches the guest, and restored however the run ends
(but by SIGKILL).

Ctrl-A is for kvmpy: x ends the run, c opens and closes the monitor, h helps, Ctrl-A Ctrl-A sends one Ctrl-A.
"""

import atexit
import errno
import os
import termios
from collections.abc import Callable
from typing import Any, Self

from kvmpy.cli.messages import say
from kvmpy.cli.monitor import Monitor

ESCAPE = 0x01
"""Ctrl-A"""
KEYS = "Ctrl-A x ends the run, Ctrl-A c opens the monitor, Ctrl-A Ctrl-A sends Ctrl-A"

_IFLAG, _OFLAG, _CFLAG, _LFLAG, _CC = 0, 1, 2, 3, 6


class RawTerminal:
    """Puts the terminal ``fd`` into raw mode while its block is entered. Raises OSError when that is refused.

    Output processing stays on: a guest that ends its lines with a line feed alone, and kvmpy's own lines, look right.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._saved: list[Any] | None = None

    def __enter__(self) -> Self:
        check_foreground(self._fd)
        # Also when the process ends without leaving the block, by a second signal at the wrong moment.
        atexit.register(self.restore)
        try:
            self._saved = termios.tcgetattr(self._fd)
            termios.tcsetattr(self._fd, termios.TCSANOW, raw(self._saved))
        except termios.error as error:
            raise OSError(error.args[0], error.args[1], "terminal") from error
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()
        atexit.unregister(self.restore)

    def restore(self) -> None:
        """Bring back the mode that was found. A terminal that is gone needs none."""
        if self._saved is None:
            return
        try:
            # Not TCSADRAIN: a terminal that takes no output would keep us waiting.
            termios.tcsetattr(self._fd, termios.TCSANOW, self._saved)
        except termios.error:
            return


def check_foreground(fd: int) -> None:
    """Raise OSError when ``fd`` is this process's terminal, and another process group is in its foreground.

    A change of its mode would stop this one (SIGTTOU), or fail with EINTR or EIO. Source: tcsetattr(3), setpgid(2).
    """
    try:
        foreground = os.tcgetpgrp(fd)
    except OSError:  # ENOTTY: not our controlling terminal, where groups mean nothing
        return
    if foreground != os.getpgrp():
        why = "not in the foreground of its terminal (timeout needs --foreground)"
        raise OSError(errno.EIO, why, "-i")


def raw(mode: list[Any]) -> list[Any]:
    """Return ``mode``, as tcgetattr gives it, without line editing, echo, signals or flow control.

    Source: termios(3), cfmakeraw, but for OPOST.
    """
    changed = [*mode[:_CC], list(mode[_CC])]
    changed[_IFLAG] &= ~(
        termios.IGNBRK
        | termios.BRKINT
        | termios.PARMRK
        | termios.ISTRIP
        | termios.INLCR
        | termios.IGNCR
        | termios.ICRNL
        | termios.IXON
    )
    changed[_CFLAG] = changed[_CFLAG] & ~(termios.CSIZE | termios.PARENB) | termios.CS8
    changed[_LFLAG] &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.ISIG | termios.IEXTEN)
    changed[_CC][termios.VMIN], changed[_CC][termios.VTIME] = 1, 0
    return changed


class Keyboard:
    """Sorts what is typed on ``fd``: keys go to ``guest``, or to ``monitor`` while that is open.

    ``stop`` ends the run: Ctrl-A x, or a terminal that has hung up.
    """

    def __init__(
        self, fd: int, *, guest: Callable[[bytes], object], monitor: Monitor, stop: Callable[[], object]
    ) -> None:
        self._fd = fd
        self._guest = guest
        self._monitor = monitor
        self._stop = stop
        self._escaped = False

    def read(self) -> None:
        """Take what was typed; called when the terminal is readable."""
        try:
            data = os.read(self._fd, 4096)
        except BlockingIOError:
            return
        except OSError:  # EIO: the terminal has hung up
            data = b""
        if not data:
            self._stop()
            return
        self.type(data)

    def type(self, data: bytes) -> None:
        """Take ``data`` as if it had been typed."""
        while data:
            if self._escaped:
                self._escaped = False
                self._command(data[:1])
                data = data[1:]
                continue
            keys, escape, data = data.partition(bytes([ESCAPE]))
            if keys:
                self._deliver(keys)
            self._escaped = bool(escape)

    def _deliver(self, keys: bytes) -> None:
        if self._monitor.is_open:
            self._monitor.type(keys)
        else:
            self._guest(keys)

    def _command(self, key: bytes) -> None:
        match key:
            case b"x":
                self._stop()
            case b"c":
                self._monitor.toggle()
            case b"\x01":
                self._deliver(key)
            case b"h" | b"?":
                say(KEYS)

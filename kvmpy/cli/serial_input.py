"""Standard input that is no terminal: a pipe or file feeds the guest's console to its end, at the guest's pace."""

import os
from collections.abc import Callable

from kvmpy.cli.messages import say
from kvmpy.devices.line import Line
from kvmpy.pc.loop import EventLoop

AHEAD = 4096
"""Bytes that may wait for the guest before reading stops."""


class SerialInput:
    """Reads ``fd`` while fewer than AHEAD bytes wait in the line, and from the start again when it has drained.

    ``line`` gives the one that is there now: a reboot may bring another, which takes over what waits.
    """

    def __init__(self, fd: int, line: Callable[[], Line], loop: EventLoop) -> None:
        self._fd = fd
        self._line = line
        self._loop = loop
        self._reading = True
        # Drained is noticed by a vCPU's thread; the loop's watches are the loop's thread's alone.
        self._drained_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        loop.watch(fd, self._read)
        loop.watch(self._drained_fd, self._read_on)
        line().on_drained = self._on_drained

    def _read(self) -> None:
        try:
            data = os.read(self._fd, AHEAD)
        except BlockingIOError:
            return
        except OSError as error:  # a directory, or write-only: the guest then has no input
            say(f"standard input: {error.strerror}")
            data = b""
        if not data:
            self._loop.unwatch(self._fd)
            self._loop.unwatch(self._drained_fd)
            return
        self._line().feed(data)
        if self._line().pending >= AHEAD:
            self._reading = False
            self._loop.unwatch(self._fd)
            # What drained in between has set the event already, and wakes us at once.

    def _on_drained(self) -> None:
        os.eventfd_write(self._drained_fd, 1)

    def _read_on(self) -> None:
        os.eventfd_read(self._drained_fd)
        if not self._reading:
            self._reading = True
            self._loop.watch(self._fd, self._read)

    def close(self) -> None:
        """Free the event; the vCPUs are out of the guest. The descriptor stays the caller's."""
        os.close(self._drained_fd)

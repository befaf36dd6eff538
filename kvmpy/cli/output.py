"""Where a guest's bytes go: standard output, a file, or nowhere; unbuffered, complete, and never stuck for ever.

A reader that is slow makes the guest wait, as a slow terminal does. A reader that has stopped (``| less``) must not
keep a signal or a time limit from ending the run: so no write is begun that could block, and between two looks at
the descriptor the run may be abandoned.
"""

import os
import select
from collections.abc import Callable
from threading import Lock

LOOK_MS = 100
CHUNK = select.PIPE_BUF
"""As much as a pipe takes without blocking once poll() says that it is writable."""


class Output:
    """Writes to ``fd``, which stays the caller's; from any thread.

    While ``fd`` takes nothing, ``abandoned`` is asked ten times a second whether to give up: the rest is then
    dropped. An error of the descriptor is kept in ``error``, and ``on_error`` called once; what comes later is dropped.
    """

    def __init__(self, fd: int, *, name: str, abandoned: Callable[[], bool], on_error: Callable[[], object]) -> None:
        self.fd = fd
        self.name = name
        self.error: OSError | None = None
        self.at_line_start = True
        self._abandoned, self._on_error = abandoned, on_error
        self._poll = select.poll()
        self._poll.register(fd, select.POLLOUT)
        self._lock = Lock()

    def write(self, data: bytes) -> None:
        """Write all of ``data``, or as much as can be before the run is abandoned."""
        with self._lock:
            if data and self.error is None:
                self.at_line_start = data.endswith(b"\n")
                self._write(memoryview(data))

    def _write(self, left: memoryview) -> None:
        while left and self._wait():
            try:
                left = left[os.write(self.fd, left[:CHUNK]) :]
            except BlockingIOError:
                continue  # somebody made the terminal non-blocking, and was faster than we
            except OSError as error:
                self._fail(error)
                return

    def _wait(self) -> bool:
        """Wait until the descriptor takes something (or has an error, which the write will tell)."""
        while not self._poll.poll(LOOK_MS):
            if self._abandoned():
                return False
        return True

    def _fail(self, error: OSError) -> None:
        self.error = type(error)(error.errno, error.strerror, self.name)
        self._on_error()


def open_output(path: str) -> int:
    """Open the file of ``file:PATH`` for a guest's output, emptied. Raises OSError.

    Two ports may share one file: each appends.
    """
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o666)

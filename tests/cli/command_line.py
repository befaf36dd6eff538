"""``kvmpy`` as a process: its environment, a terminal for it, and guests of a few lines."""

import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

HELLO = """
    movb $'H', %al ; outb %al, $0xe9
    movb $'i', %al ; outb %al, $0xe9
    movb $'\\n', %al ; outb %al, $0xe9
    movb $7, %al ; outb %al, $0xf4
    hlt
"""
"""Prints Hi on the debug console and ends with status 7."""

ECHO = """
1:  movw $0x3fd, %dx ; inb %dx, %al ; testb $1, %al ; jz 1b
    movw $0x3f8, %dx ; inb %dx, %al
    cmpb $4, %al ; je 2f
    outb %al, %dx ; jmp 1b
2:  movb $4, %al ; outb %al, $0xf4
    hlt
"""
"""Sends each byte that COM1 receives back; Ctrl-D ends it with status 4."""

SPIN = "1: jmp 1b"

DEADLINE = 30.0  # seconds; what fails takes this long, what works does not wait


def environment() -> dict[str, str]:
    """Return an environment in which ``python -m kvmpy`` finds this checkout from any directory."""
    return {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}


def start(
    *arguments: str,
    stdin: int = subprocess.DEVNULL,
    stdout: int = subprocess.PIPE,
    before: Callable[[], object] | None = None,
) -> "subprocess.Popen[bytes]":
    """Start ``kvmpy`` and leave it running."""
    command = [sys.executable, "-m", "kvmpy", *arguments]
    return subprocess.Popen(
        command, stdin=stdin, stdout=stdout, stderr=subprocess.PIPE, env=environment(), preexec_fn=before, bufsize=0
    )


class Terminal:
    """A terminal with ``kvmpy`` in it. ``screen`` is what it has printed so far.

    With ``before``, a command that starts another, a shell leads the session and starts that.
    """

    def __init__(self, *arguments: str, before: tuple[str, ...] = ()) -> None:
        shell = ("sh", "-c", '"$@"; exit $?', "sh", *before) if before else ()
        self.master, self.slave = pty.openpty()
        self.mode = termios.tcgetattr(self.slave)
        self.screen = b""
        self.process = subprocess.Popen(
            [*shell, sys.executable, "-m", "kvmpy", *arguments],
            env=environment(),
            preexec_fn=lambda: os.login_tty(self.slave),
            pass_fds=(self.slave,),
        )

    def type(self, keys: bytes) -> None:
        """Type ``keys``."""
        os.write(self.master, keys)

    def read_until(self, text: bytes) -> bytes:
        """Read until ``text`` is on the screen behind what was read before; return what came."""
        at = len(self.screen)
        deadline = time.monotonic() + DEADLINE
        while text not in self.screen[at:]:
            left = deadline - time.monotonic()
            ready, _, _ = select.select([self.master], [], [], max(left, 0))
            assert ready, f"{text!r} did not come, but {self.screen[at:]!r}"
            self.screen += os.read(self.master, 4096)
        return self.screen[at:]

    def wait(self) -> int:
        """Return the exit status of the process."""
        return self.process.wait(DEADLINE)

    def send_signal(self, signum: signal.Signals) -> None:
        """Send a signal to the process."""
        self.process.send_signal(signum)

    def close(self) -> None:
        """End the process, if it lives, and close the terminal."""
        self.process.kill()
        self.process.wait()
        os.close(self.master)
        os.close(self.slave)

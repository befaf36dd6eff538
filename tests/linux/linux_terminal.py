"""A guest's shell on a terminal, as somebody uses it who typed ``kvmpy run -i``."""

import os
import pty
import select
import subprocess
import termios
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import linux_guest
from linux_runs import TIME_LIMIT

PROMPT = "/ # "
CTRL_A, CTRL_C = "\x01", "\x03"


class Terminal:
    """A terminal in which somebody has typed ``command``; ``screen`` is all that it has shown."""

    def __init__(self, command: Sequence[str], *, folder: Path | None = None) -> None:
        self.screen = ""
        self._read = 0
        self.master, self.slave = pty.openpty()
        self._mode = termios.tcgetattr(self.slave)
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(linux_guest.ROOT)},
            preexec_fn=lambda: os.login_tty(self.slave),
            pass_fds=(self.slave,),
        )

    def type(self, keys: str) -> None:
        """Type ``keys``."""
        os.write(self.master, keys.encode())

    def until(self, text: str) -> str:
        """Read until ``text`` is on the screen, behind what was read so before; return what came before it."""
        deadline = time.monotonic() + TIME_LIMIT
        while (found := self.screen.find(text, self._read)) < 0:
            ready, _, _ = select.select([self.master], [], [], max(deadline - time.monotonic(), 0))
            assert ready, f"{text!r} did not come: {self.screen}"
            self.screen += os.read(self.master, 4096).decode(errors="replace").replace("\r", "")
        shown, self._read = self.screen[self._read : found], found + len(text)
        return shown

    def obey(self, line: str) -> str:
        """Let the guest's shell, which has prompted, obey ``line``; return what that printed."""
        self.type(f"{line}\r")
        self.until("\n")
        return self.until(PROMPT)

    def end(self) -> int:
        """Read to the end; return the exit status. The terminal is then as it was."""
        while select.select([self.master], [], [], 0.1)[0] or self.process.poll() is None:
            if select.select([self.master], [], [], 0)[0]:
                self.screen += os.read(self.master, 4096).decode(errors="replace")
        assert termios.tcgetattr(self.slave) == self._mode
        return self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)
        os.close(self.slave)

"""How far a boot of Linux came, read off its console, and when: on the host's clock, from the start of kvmpy."""

import re
from collections.abc import Iterable
from typing import NamedTuple

MILESTONES = {
    "first byte": r".",
    "console enabled": r"printk: console \[ttyS0\] enabled",
    "code patched": r"Freeing SMP alternatives memory|smpboot: CPU0:",
    "drivers": r"NET: Registered PF_INET protocol family",
    "root file system unpacked": r"Freeing initrd memory",
    "kernel done": r"Run /init as init process",
    "init": r"init: the first process",
    "disk mounted": r"init: /dev/vda is mounted",
    "shell": r"init: a shell after",
    "power-off": r"reboot: Power down",
}
"""In the order in which they come: their names, and what a line says that is one."""


class Line(NamedTuple):
    """A line of the console, and at which second it ended."""

    at: float
    text: str


class Progress:
    """What the lines so far tell."""

    def __init__(self) -> None:
        self.reached: dict[str, float] = {}
        self.last = Line(0.0, "")

    def take(self, line: Line) -> list[str]:
        """Take the next line; return the milestones that it is."""
        if not line.text.strip():
            return []
        self.last = line
        names = [name for name, says in MILESTONES.items() if name not in self.reached and re.search(says, line.text)]
        self.reached.update(dict.fromkeys(names, line.at))
        return names

    def report(self) -> str:
        """Return a table of the milestones, and the last line."""
        rows = [f"{name:26}{self._time(name)}" for name in MILESTONES]
        return "\n".join([*rows, f"last line, at {self.last.at:.1f} s: {self.last.text.strip()}"])

    def _time(self, name: str) -> str:
        return f"{self.reached[name]:7.1f} s" if name in self.reached else "      -"


def progress_of(lines: Iterable[Line]) -> Progress:
    """Return what all of ``lines`` tell."""
    progress = Progress()
    for line in lines:
        progress.take(line)
    return progress

"""One process from its start to its end, as whoever waits for it sees it."""

import os
import sys
import time
from collections.abc import Mapping
from typing import NamedTuple

LEFT_OUT = ("PYTHONDONTWRITEBYTECODE", "PYTHONUNBUFFERED", "PYTHONPROFILEIMPORTTIME", "PYTHONPATH")
"""Variables that would make Python start slower than a user's does."""

KVMPY_RUN = (sys.executable, "-m", "kvmpy", "run")


class Life(NamedTuple):
    """Milliseconds from the start to the first byte on standard output and to the end; what was printed; the status."""

    first_byte: float
    end: float
    output: bytes
    status: int


def plain_environment() -> Mapping[str, str]:
    """Return the environment of a user who has set nothing for Python."""
    return {name: value for name, value in os.environ.items() if name not in LEFT_OUT}


def live(command: list[str]) -> Life:
    """Start ``command`` with nothing on standard input, and wait for its end."""
    reader, writer = os.pipe()
    nothing = os.open(os.devnull, os.O_RDWR)
    actions = [(os.POSIX_SPAWN_DUP2, nothing, 0), (os.POSIX_SPAWN_DUP2, writer, 1), (os.POSIX_SPAWN_DUP2, nothing, 2)]
    environment = plain_environment()
    started_ns = time.perf_counter_ns()
    pid = os.posix_spawn(command[0], command, environment, file_actions=actions)
    os.close(writer)
    output = os.read(reader, 1)
    first_ns = time.perf_counter_ns()
    while more := os.read(reader, 1 << 16):
        output += more
    _, status = os.waitpid(pid, 0)
    ended_ns = time.perf_counter_ns()
    os.close(reader)
    os.close(nothing)
    return Life((first_ns - started_ns) / 1e6, (ended_ns - started_ns) / 1e6, output, os.waitstatus_to_exitcode(status))

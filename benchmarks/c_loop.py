"""The baseline of test_exits.py: ``c_loop.c``, compiled and waiting for how many exits to take next."""

import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("c_loop.c")


class CLoop:
    """The C program; `close` ends it."""

    def __init__(self, program: Path) -> None:
        program.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["gcc", "-O2", "-Wall", "-Wextra", "-o", program, SOURCE], check=True)
        self._process = subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def round(self, exits: int) -> float:
        """Return the microseconds of one exit, over ``exits`` of them."""
        requests, answers = self._process.stdin, self._process.stdout
        assert requests is not None
        assert answers is not None
        requests.write(f"{exits}\n")
        requests.flush()
        return float(answers.readline()) / 1000

    def close(self) -> None:
        """End the program."""
        self._process.communicate()

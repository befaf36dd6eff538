"""The baseline of test_disk.py: ``disk_loop.c``, compiled and waiting for what to transfer next."""

import subprocess
from pathlib import Path

from disk_guest import Workload

SOURCE = Path(__file__).with_name("disk_loop.c")


class DiskLoop:
    """The C program; `close` ends it."""

    def __init__(self, program: Path, image: Path, span: int) -> None:
        subprocess.run(["gcc", "-O2", "-Wall", "-Wextra", "-o", program, SOURCE], check=True)
        command = [program, image, str(span)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def round(self, workload: Workload) -> float:
        """Return the microseconds of one transfer."""
        requests, answers = self._process.stdin, self._process.stdout
        assert requests is not None
        assert answers is not None
        requests.write(f"{workload.write:d} {workload.size} {workload.count} {workload.random:d}\n")
        requests.flush()
        return float(answers.readline()) / 1000

    def close(self) -> None:
        """End the program."""
        self._process.communicate()

"""A baseline in C: compiled, running, and waiting for what to measure next."""

import subprocess
from pathlib import Path

HERE = Path(__file__).parent


class CProgram:
    """``source`` of this folder, compiled into ``folder`` and started with ``arguments``; `close` ends it."""

    def __init__(self, source: str, folder: Path, *arguments: str | Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        program = folder / Path(source).stem
        subprocess.run(["gcc", "-O2", "-Wall", "-Wextra", "-o", program, HERE / source], check=True)
        command = [program, *arguments]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def round(self, request: str) -> float:
        """Return the microseconds of one of what ``request``, a line in the program's own words, asks for."""
        requests, answers = self._process.stdin, self._process.stdout
        assert requests is not None
        assert answers is not None
        requests.write(f"{request}\n")
        requests.flush()
        return float(answers.readline()) / 1000

    def close(self) -> None:
        """End the program."""
        self._process.communicate()

"""What tests of the command line share."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from command_line import DEADLINE, Terminal, environment
from guest_code import assemble

from kvmpy.cli.main import main


@pytest.fixture
def image(tmp_path: Path) -> Callable[..., str]:
    """Return a function that assembles a flat real-mode guest and returns its path."""

    def image(text: str, name: str = "guest.bin") -> str:
        path = tmp_path / name
        path.write_bytes(assemble(text, "real"))
        return str(path)

    return image


@pytest.fixture
def kvmpy(tmp_path: Path) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """Return a function that runs ``python -m kvmpy`` with some arguments to its end, in an empty directory."""

    def run(*arguments: str, **options: Any) -> "subprocess.CompletedProcess[str]":
        if "input" not in options:
            options.setdefault("stdin", subprocess.DEVNULL)
        options.setdefault("stdout", subprocess.PIPE)
        options.setdefault("env", environment())
        command = [sys.executable, "-m", "kvmpy", *arguments]
        return subprocess.run(command, stderr=subprocess.PIPE, cwd=tmp_path, text=True, timeout=DEADLINE, **options)

    return run


@pytest.fixture
def blob(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """Return a function that runs ``kvmpy blob`` with some arguments in this process, in an empty directory."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
        capfd.readouterr()
        status = main(["blob", *arguments])
        return subprocess.CompletedProcess(arguments, status, *capfd.readouterr())

    return run


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    """Return a function that starts ``kvmpy`` with some arguments in a terminal of its own."""
    with ExitStack() as stack:

        def start(*arguments: str) -> Terminal:
            started = Terminal(*arguments)
            stack.callback(started.close)
            return started

        yield start

"""kvmpy's own last lines, where they share a file or pipe with what the guest printed."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import DEADLINE, SPIN, environment

pytestmark = pytest.mark.kvm

Image = Callable[..., str]
WAITS = "movb $'!', %al ; outb %al, $0xe9\n" + SPIN
ENDS = "movb $'!', %al ; outb %al, $0xe9 ; movb $7, %al ; outb %al, $0xf4"
LIMIT = ("--timeout", "0.3")


def run(*arguments: str, stdout: int = subprocess.PIPE) -> bytes:
    """Run a flat guest with one pipe or file for both; return what came through the pipe."""
    command = [sys.executable, "-m", "kvmpy", "run", *arguments, "--format", "flat"]
    streams = {"stdin": subprocess.DEVNULL, "stdout": stdout, "stderr": subprocess.STDOUT}
    return subprocess.run(command, **streams, env=environment(), timeout=DEADLINE, check=False).stdout


def test_in_one_pipe_they_begin_a_line(image: Image) -> None:
    assert run(image(WAITS), *LIMIT) == b"!\nkvmpy: timeout\n"


def test_in_one_file_they_begin_a_line(image: Image, tmp_path: Path) -> None:
    with (tmp_path / "out").open("wb") as out:
        run(image(WAITS), *LIMIT, stdout=out.fileno())
    assert (tmp_path / "out").read_bytes() == b"!\nkvmpy: timeout\n"


def test_a_run_that_says_nothing_adds_nothing(image: Image) -> None:
    assert run(image(ENDS)) == b"!"


def test_apart_from_them_the_guests_output_stays_as_it_is(
    kvmpy: Callable[..., "subprocess.CompletedProcess[str]"], image: Image
) -> None:
    done = kvmpy("run", image(WAITS), "--format", "flat", *LIMIT)
    assert (done.stdout, done.stderr) == ("!", "kvmpy: timeout\n")

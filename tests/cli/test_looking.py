"""The commands that run nothing: inspect, lessons, --help and --version."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import DEADLINE, HELLO, environment

import kvmpy as package
from kvmpy.lessons import find, lessons

Kvmpy = Callable[..., "subprocess.CompletedProcess[str]"]


def test_version_is_one_line(kvmpy: Kvmpy) -> None:
    done = kvmpy("--version")
    assert done.returncode == 0
    assert re.fullmatch(rf"kvmpy {re.escape(package.__version__)} \(Python 3\.\S+, Linux \S+\)\n", done.stdout)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_names_every_command(kvmpy: Kvmpy, arguments: list[str]) -> None:
    done = kvmpy(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    for command in ("run", "inspect", "lessons", "doctor"):
        assert re.search(rf"^  {command} ", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("command", ["run", "inspect", "lessons", "doctor"])
def test_each_command_explains_itself(kvmpy: Kvmpy, command: str) -> None:
    done = kvmpy(command, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: kvmpy {command} ")


def test_a_command_needs_no_c_shim_to_say_what_there_is() -> None:
    """--version and --help work where nothing is built, and start at once."""
    code = "import sys; from kvmpy.cli.main import main; main(['--help']); print('kvmpy._shim' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment(), timeout=DEADLINE)
    assert done.stdout.endswith(b"\nFalse\n")


# --- inspect ----------------------------------------------------------------------------------------------------


def test_inspect_shows_every_protocol_that_a_file_offers(kvmpy: Kvmpy) -> None:
    done = kvmpy("inspect", str(find("pvh_hello").image))
    assert done.returncode == 0
    assert re.search(r"^what +ELF64 executable for x86-64", done.stdout, re.MULTILINE)
    assert re.search(r"^boots +as pvh$", done.stdout, re.MULTILINE)
    assert "PVH (--format pvh)\n  starts  at 0x100000 in protected mode\n" in done.stdout
    assert "ELF (--format elf)\n  starts  at 0x100000 in long mode\n" in done.stdout
    assert re.search(
        r"^  loads   0x00101000-0x0010\w{4}  \d+ bytes from offset 0x2000, then ", done.stdout, re.MULTILINE
    )


def test_inspect_says_why_a_file_would_not_boot(kvmpy: Kvmpy, image: Callable[..., str]) -> None:
    done = kvmpy("inspect", image(HELLO))
    assert done.returncode == 0
    assert re.search(r"^boots +no: .*--format flat", done.stdout, re.MULTILINE)


def test_inspect_names_the_offset_of_what_is_broken(kvmpy: Kvmpy, tmp_path: Path) -> None:
    (tmp_path / "cut").write_bytes(find("elf64_hello").image.read_bytes()[:100])
    done = kvmpy("inspect", "cut")
    assert done.returncode == 0
    assert re.search(r"^  broken  .*\(at offset 0x\w+\)$", done.stdout, re.MULTILINE)


def test_inspect_looks_with_the_memory_that_is_given(kvmpy: Kvmpy) -> None:
    image = str(find("elf64_hello").image)
    assert "boots   as elf\n" in kvmpy("inspect", image, "--mem", "2M").stdout
    assert "boots   no: " in kvmpy("inspect", image, "--mem", "1M").stdout


def test_inspect_as_json(kvmpy: Kvmpy) -> None:
    found = json.loads(kvmpy("inspect", str(find("elf64_hello").image), "--json").stdout)
    assert (found["boots"], found["error"]) == ("elf", None)
    assert found["offers"][0]["entry"] == 0x10_0000


def test_a_name_that_is_no_text_can_be_printed(kvmpy: Kvmpy, tmp_path: Path) -> None:
    """File names are bytes."""
    name = os.fsdecode(b"caf\xe9")
    (tmp_path / name).write_bytes(b"no image")
    strict = {**environment(), "PYTHONIOENCODING": "utf-8:strict"}
    done = kvmpy("inspect", name, errors="surrogateescape", env=strict)
    assert done.returncode == 0
    assert name in done.stdout


# --- lessons ----------------------------------------------------------------------------------------------------


def test_lessons_lists_all_of_them(kvmpy: Kvmpy) -> None:
    lines = kvmpy("lessons").stdout.splitlines()
    assert [line.split()[0] for line in lines] == [lesson.name for lesson in lessons()]
    assert any(re.match(r"hello +real mode +the VM exit", line) for line in lines)


def test_a_lesson_is_shown_with_its_header_and_command(kvmpy: Kvmpy) -> None:
    shown = kvmpy("lessons", "hello").stdout
    assert shown.startswith("hello.S -- ")
    assert re.search(r"^Prints: +Hello, world$", shown, re.MULTILINE)
    assert shown.endswith("  kvmpy run lesson:hello\n")


@pytest.mark.kvm
def test_the_command_of_a_lesson_with_input_can_be_typed(kvmpy: Kvmpy, tmp_path: Path) -> None:
    command = kvmpy("lessons", "serial_echo").stdout.splitlines()[-1]
    command = command.replace("kvmpy run", f"'{sys.executable}' -m kvmpy run")
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, env=environment(), timeout=DEADLINE)
    assert (done.returncode, done.stdout) == (0, find("serial_echo").prints)


def test_a_reader_that_goes_away_is_no_error() -> None:
    command = f"'{sys.executable}' -m kvmpy lessons | :"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, env=environment(), timeout=DEADLINE)
    assert done.stderr == ""

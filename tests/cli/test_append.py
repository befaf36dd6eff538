"""``--append``, and the words that kvmpy adds to it."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.kvm

Kvmpy = Callable[..., "subprocess.CompletedProcess[str]"]


def test_append_may_be_repeated(kvmpy: Kvmpy) -> None:
    assert "you and me" in kvmpy("run", "lesson:pvh_hello", "--append", "you", "--append", "and me").stdout


def test_verbose_shows_the_command_line_and_what_was_added(kvmpy: Kvmpy, tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(65536))
    disk = ("--disk", "disk,format=raw")
    lines = kvmpy("run", "lesson:pvh_hello", *disk, "-v", "--append", "x").stderr.splitlines()
    word = "virtio_mmio.device=4K@0xd0000000:5"
    assert f"kvmpy: command line: x {word}" in lines
    assert f"kvmpy: added to it: {word}: where a virtio device is" in lines
    lines = kvmpy("run", "lesson:pvh_hello", *disk, "-v", "--append", "x", "--append-exact").stderr.splitlines()
    assert "kvmpy: command line: x" in lines
    assert not any("added" in line for line in lines)


def test_what_is_appended_takes_the_place_of_a_lessons_own(kvmpy: Kvmpy) -> None:
    assert "says: world\n" in kvmpy("run", "lesson:pvh_hello").stdout
    assert "says: you\n" in kvmpy("run", "lesson:pvh_hello", "--append", "you").stdout

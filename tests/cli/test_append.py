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


EXACT = ("run", "lesson:pvh_hello", "--append-exact")


@pytest.mark.parametrize(
    ("options", "devices"),
    [
        (("--disk", "disk,format=raw"), "disk"),
        (("--rng", "--console", "virtio"), "entropy device and console"),
        (
            ("--disk", "disk,format=raw,readonly", "--disk", "disk,format=raw,readonly", "--rng"),
            "disks and entropy device",
        ),
        (("--disk", "disk,format=raw", "--rng", "--console", "virtio"), "disk, entropy device and console"),
    ],
)
def test_exact_words_that_leave_devices_untold_are_warned_of(
    kvmpy: Kvmpy, tmp_path: Path, options: tuple[str, ...], devices: str
) -> None:
    (tmp_path / "disk").write_bytes(bytes(65536))
    warning = f"warning: --append-exact: the guest is not told of its {devices}; --virtio acpi tells it"
    assert kvmpy(*EXACT, *options).stderr == f"kvmpy: {warning}\n"


def test_where_nothing_is_left_out_there_is_no_warning(kvmpy: Kvmpy, tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(65536))
    disk = ("--disk", "disk,format=raw")
    told = ("--append", "virtio_mmio.device=4K@0xd0000000:5")
    for options in ((), (*disk, "--virtio", "acpi"), (*disk, *told)):
        assert kvmpy(*EXACT, *options).stderr == ""
    assert kvmpy("run", "lesson:hello", *disk, "--append-exact").stderr == ""  # no Linux: told nothing in any case


def test_what_is_appended_takes_the_place_of_a_lessons_own(kvmpy: Kvmpy) -> None:
    assert "says: world\n" in kvmpy("run", "lesson:pvh_hello").stdout
    assert "says: you\n" in kvmpy("run", "lesson:pvh_hello", "--append", "you").stdout

"""Bad input: one line on standard error that names the cause, the documented status, no traceback."""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import DEADLINE, HELLO, environment

USAGE, IMAGE, HOST, CRASH = 192, 194, 196, 198

Kvmpy = Callable[..., "subprocess.CompletedProcess[str]"]


def check(done: "subprocess.CompletedProcess[str]", status: int, *words: str) -> None:
    """Fail unless the process ended with ``status`` and one line that has all ``words``."""
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("kvmpy: ")
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.endswith("\n")
    assert done.returncode == status, done.stderr
    for word in words:
        assert word in done.stderr
    assert done.stdout == ""


# --- the command line -------------------------------------------------------------------------------------------

MISTAKES: dict[str, tuple[list[str], list[str]]] = {
    "no file": (["run"], ["FILE"]),
    "a file without a name": (["run", ""], ["FILE", "empty"]),
    "unknown command": (["walk"], ["walk", "run, inspect, lessons, doctor"]),
    "unknown option of kvmpy": (["--walk"], ["--walk"]),
    "unknown option": (["run", "x", "--walk"], ["--walk"]),
    "abbreviated option": (["run", "x", "--core", "2"], ["--core"]),
    "two files": (["run", "x", "y"], ["y"]),
    "memory is no size": (["run", "x", "--mem", "much"], ["--mem", "'much'", "512M"]),
    "memory of nothing": (["run", "x", "--mem", "0"], ["0 bytes", "1 MiB to ", "4 KiB"]),
    "memory of a byte": (["run", "x", "--mem", "1"], ["1 bytes", "1 MiB to "]),
    "memory not in pages": (["run", "x", "--mem", "4198401"], ["multiples of 4 KiB"]),
    "memory of a page and a byte": (["run", "x", "--mem", "4097"], ["1 MiB to "]),
    "memory below zero": (["run", "x", "--mem", "-1M"], ["--mem"]),
    "more memory than the host": (["run", "x", "--mem", "4096T"], ["4096 TiB", "this host's"]),
    "fraction of a byte": (["run", "x", "--mem", "0.1"], ["whole number of bytes"]),
    "no cores": (["run", "x", "--cores", "0"], ["0 cores", "1 to"]),
    "cores below zero": (["run", "x", "--cores", "-1"], ["-1 cores", "1 to"]),
    "cores that are no number": (["run", "x", "--cores", "two"], ["--cores", "'two'"]),
    "unknown format": (["run", "x", "--format", "coff"], ["coff", "multiboot1", "flat"]),
    "unknown mode": (["run", "x", "--mode", "virtual"], ["virtual", "real"]),
    "address is no number": (["run", "x", "--address", "here"], ["--address", "'here'", "0x7c00"]),
    "address beyond 64 bits": (["run", "x", "--entry", hex(1 << 64)], ["--entry", "0xffffffffffffffff"]),
    "time of zero": (["run", "x", "--timeout", "0"], ["--timeout", "above 0"]),
    "time below zero": (["run", "x", "--timeout", "-1"], ["--timeout", "above 0"]),
    "time that is no number": (["run", "x", "--timeout", "nan"], ["--timeout", "above 0"]),
    "time without end": (["run", "x", "--timeout", "inf"], ["--timeout", "above 0"]),
    "grace below zero": (["run", "x", "--grace", "-1"], ["--grace", "0 for none"]),
    "grace without end": (["run", "x", "--grace", "inf"], ["--grace", "0 for none"]),
    "unknown reboot": (["run", "x", "--on-reboot", "halt"], ["--on-reboot", "restart"]),
    "time in words": (["run", "x", "--timeout", "soon"], ["--timeout", "'soon'"]),
    "no exits": (["run", "x", "--max-exits", "0"], ["--max-exits", "1 to"]),
    "more exits than C counts": (["run", "x", "--max-exits", str(1 << 63)], ["--max-exits", "1 to"]),
    "module without file": (["run", "x", "--module", ",text"], ["--module", "FILE[,TEXT]"]),
    "parameter without value": (["run", "x", "--param", "colour"], ["--param", "KEY=VALUE"]),
    "parameter without key": (["run", "x", "--param", "=red"], ["--param", "KEY=VALUE"]),
    "unknown device": (["run", "x", "--device-mode", "floppy=c"], ["--device-mode", "serial"]),
    "unknown device mode": (["run", "x", "--device-mode", "serial=rust"], ["--device-mode", "c|python|trace"]),
    "disk without a name": (["run", "x", "--disk", ",readonly"], ["--disk", "PATH"]),
    "disk with a strange key": (["run", "x", "--disk", "d,size=4"], ["--disk", "'size'", "format, readonly", ",,"]),
    "disk with a key twice": (["run", "x", "--disk", "d,iops=1,iops=2"], ["--disk", "iops is given twice"]),
    "disk with no queues": (["run", "x", "--disk", "d,queues=0"], ["--disk", "0 queues", "1 to 64"]),
    "disk cached elsewhere": (
        ["run", "x", "--disk", "d,cache=none"],
        ["cache=none", "writeback, writethrough, direct"],
    ),
    "disk of an unknown format": (["run", "x", "--disk", "d,format=qcow2"], ["--disk", "format=qcow2", "raw, vhd"]),
    "disk with a long serial": (["run", "x", "--disk", "d,serial=" + "s" * 21], ["up to 20 printable"]),
    "seventeen disks": (["run", "x", *["--disk", "d"] * 17], ["17", "up to 16"]),
    "unknown announcement": (["run", "x", "--virtio", "pci"], ["pci", "cmdline", "acpi"]),
    "serial nowhere": (["run", "x", "--serial", "moon"], ["--serial", "stdio"]),
    "serial to no file": (["run", "x", "--serial", "file:"], ["--serial", "file:PATH"]),
    "pins that are no numbers": (["run", "x", "--pin", "0,b"], ["--pin", "0,1"]),
    "pin to a CPU that is not there": (["run", "x", "--pin", "99999"], ["99999", "may use"]),
    "too few pins": (["run", "x", "--cores", "2", "--pin", "0"], ["one for each"]),
    "unknown exit convention": (["run", "x", "--debug-exit", "bochs"], ["bochs", "qemu"]),
    "interactive without a terminal": (["run", "x", "-i"], ["-i", "terminal"]),
    "interactive twice": (["run", "x", "-i", "-i"], ["-i", "terminal"]),
    "no such lesson": (["run", "lesson:nothing"], ["nothing"]),
    "lesson with a path": (["run", "lesson:../hello"], ["../hello"]),
    "no such lesson to show": (["lessons", "helo"], ["helo", "hello"]),
    "inspect nothing": (["inspect"], ["FILE"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_with_what_is_allowed(kvmpy: Kvmpy, mistake: str) -> None:
    arguments, words = MISTAKES[mistake]
    check(kvmpy(*arguments), USAGE, *words)


@pytest.mark.kvm
def test_more_cores_than_kvm_gives_are_refused(kvmpy: Kvmpy, image: Callable[..., str]) -> None:
    check(kvmpy("run", image(HELLO), "--format", "flat", "--cores", "100000"), USAGE, "100000 cores", "1 to ")


# --- images -----------------------------------------------------------------------------------------------------


def elf_header() -> bytes:
    """Return a sound ELF64 header whose program headers lie behind the end of the file."""
    return bytes.fromhex(
        "7f454c46020101000000000000000000 02003e0001000000 0000100000000000 4000000000000000 0000000000000000"
        "00000000 4000 3800 0100 0000 0000 0000"
    )


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A directory of files that are no images."""
    (tmp_path / "empty").touch()
    (tmp_path / "nothing").write_bytes(b"just some text, no magic at all\n" * 40)
    (tmp_path / "truncated").write_bytes(elf_header())
    (tmp_path / "short").write_bytes(elf_header()[:20])
    (tmp_path / "packed").write_bytes(b"\x1f\x8b\x08" + bytes(600))
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    return tmp_path


IMAGES = {
    "missing": ["missing", "No such file"],
    "empty": ["empty", "offset 0x0"],
    "nothing": ["--format flat"],
    "truncated": ["truncated", "offset 0x"],
    "short": ["truncated", "offset 0x"],
    "packed": ["gzip"],
    "directory": ["directory"],
    "fifo": ["FIFO"],
    "loop": ["loop"],
    "/dev/zero": ["character device"],
    "a\nname": ["a\\nname"],
}


@pytest.mark.kvm
@pytest.mark.parametrize("name", IMAGES)
def test_a_file_that_is_no_image_is_refused(kvmpy: Kvmpy, files: Path, name: str) -> None:
    """Never read to its end, never waited for: a FIFO has no writer here."""
    check(kvmpy("run", name), IMAGE, *IMAGES[name])


@pytest.mark.parametrize("name", ["missing", "empty", "directory", "fifo", "/dev/zero", "a\nname"])
def test_inspect_refuses_what_is_no_file(kvmpy: Kvmpy, files: Path, name: str) -> None:
    check(kvmpy("inspect", name), IMAGE, *IMAGES[name])


@pytest.mark.kvm
def test_a_missing_module_is_an_image_error(kvmpy: Kvmpy) -> None:
    check(kvmpy("run", "lesson:memory_map", "--module", "missing,text"), IMAGE, "missing")


@pytest.mark.kvm
def test_an_option_that_the_protocol_does_not_know_is_refused(kvmpy: Kvmpy, image: Callable[..., str]) -> None:
    check(kvmpy("run", image(HELLO), "--format", "flat", "--append", "text"), USAGE, "append")


@pytest.mark.kvm
def test_a_parameter_that_does_not_fit_is_refused(kvmpy: Kvmpy, image: Callable[..., str]) -> None:
    check(kvmpy("run", image(HELLO), "--format", "flat", "--param", "k=" + "v" * 5000), USAGE, "pairs", "allowed")
    check(kvmpy("run", image(HELLO), "--format", "flat", "--name", "n" * 64), USAGE, "name", "63")


@pytest.mark.kvm
@pytest.mark.parametrize("option", ["--json", "--serial", "--debugcon"])
def test_a_path_that_cannot_be_written_is_found_before_the_guest_runs(
    kvmpy: Kvmpy, image: Callable[..., str], option: str
) -> None:
    where = "missing/out" if option == "--json" else "file:missing/out"
    check(kvmpy("run", image(HELLO), "--format", "flat", option, where), HOST, "missing/out", "No such file")


@pytest.mark.kvm
def test_memory_of_4095_mib_is_just_a_size(kvmpy: Kvmpy, image: Callable[..., str]) -> None:
    done = kvmpy("run", image(HELLO), "--format", "flat", "--mem", "4095M")
    assert (done.returncode, done.stdout, done.stderr) == (7, "Hi\n", "")


# --- no KVM -----------------------------------------------------------------------------------------------------

WITH_DEVICE = """
import contextlib, io, os, sys
import kvmpy.kvm.system
from kvmpy.cli.main import main

kvmpy.kvm.system.DEVICE = sys.argv[1]
with contextlib.redirect_stdout(io.StringIO()):
    main(["run", "--help"])  # loads what is needed: a Python of root's may be out of reach in a moment
if os.geteuid() == 0:  # to whom nothing is forbidden
    os.setresuid(65534, 65534, 65534)
sys.exit(main(["run", sys.argv[2], "--format", "flat"]))
"""


def run(command: list[str]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command, env=environment(), timeout=DEADLINE, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )


def run_with_device(device: str, image: str) -> "subprocess.CompletedProcess[str]":
    """Run kvmpy, without privileges, where ``device`` stands for /dev/kvm."""
    return run([sys.executable, "-c", WITH_DEVICE, device, image])


def test_without_dev_kvm_the_module_is_named(image: Callable[..., str]) -> None:
    done = run_with_device("/dev/missing", image(HELLO))
    check(done, HOST, "/dev/missing", "ENOENT", "kvm_intel")


def test_without_the_right_to_dev_kvm_the_group_is_named(image: Callable[..., str]) -> None:
    with tempfile.TemporaryDirectory() as folder:  # tmp_path lies where others may not look
        os.chmod(folder, 0o755)
        device = Path(folder) / "kvm"
        device.touch()
        device.chmod(0)
        check(run_with_device(str(device), image(HELLO)), HOST, "EACCES", "usermod -aG kvm")


def test_a_device_that_is_not_kvm_is_told(image: Callable[..., str]) -> None:
    check(run_with_device("/dev/null", image(HELLO)), HOST, "/dev/null", "not a KVM device")


# --- faults of our own ------------------------------------------------------------------------------------------

RAISING_DEVICE = """
import sys
from kvmpy.devices.debug import DebugConsole
from kvmpy.cli.main import main

def write(self, offset, data):
    raise ValueError("a fault in a device")

DebugConsole.write = write
sys.exit(main(["run", sys.argv[1], "--format", "flat", "--device-mode", "debugcon=python", "--json", sys.argv[2]]))
"""


@pytest.mark.kvm
def test_a_python_device_that_raises_shows_its_traceback(image: Callable[..., str], tmp_path: Path) -> None:
    """Its ValueError is no mistake of the user's: the status blames the host."""
    command = [sys.executable, "-c", RAISING_DEVICE, image(HELLO), str(tmp_path / "out.json")]
    done = run(command)
    assert done.returncode == HOST
    assert re.search(r"Traceback .*ValueError: a fault in a device\n", done.stderr, re.DOTALL)
    assert "a fault in a device" in (tmp_path / "out.json").read_text()

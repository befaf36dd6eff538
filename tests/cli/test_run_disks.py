"""``kvmpy run --disk``: what is told of disks, and disks that cannot be had: one line with the name, status 194."""

import ctypes
import fcntl
import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import HELLO
from guest_code import assemble

from kvmpy.units import KiB

pytestmark = pytest.mark.kvm

Kvmpy = Callable[..., "subprocess.CompletedProcess[str]"]
FLAT = ("--format", "flat")
PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 24, 1, 2  # <linux/prctl.h>, <linux/capability.h>
DISK = 194


@pytest.fixture
def hello(image: Callable[..., str]) -> str:
    return image(HELLO)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "a,b.img"
    path.write_bytes(bytes(64 * KiB))
    return path


def test_a_guest_with_a_disk_runs_as_ever(kvmpy: Kvmpy, hello: str, disk: Path) -> None:
    done = kvmpy("run", hello, *FLAT, "--disk", "a,,b.img,format=raw,engine=python")
    assert (done.returncode, done.stdout, done.stderr) == (7, "Hi\n", "")


def test_verbose_tells_where_the_guest_finds_each_disk(kvmpy: Kvmpy, hello: str, disk: Path) -> None:
    one = "a,,b.img,format=raw,readonly,engine=python"
    lines = kvmpy("run", hello, *FLAT, "-v", "--disk", one, "--disk", one).stderr
    text = "kvmpy: disk a,b.img: 64 KiB, read-only, python engine, 1 queue, at 0x{:x}, GSI {}\n"
    assert text.format(0xD000_0000, 5) + text.format(0xD000_1000, 6) in lines


def test_stats_and_json_count_what_each_disk_did(kvmpy: Kvmpy, hello: str, disk: Path, tmp_path: Path) -> None:
    option = "a,,b.img,format=raw,engine=python"
    done = kvmpy("run", hello, *FLAT, "--stats", "--json", "out.json", "--disk", option)
    assert re.search(r"^  disk +requests +bytes read +bytes written +flushes +errors$", done.stderr, re.MULTILINE)
    assert re.search(r"^  a,b.img( +0){5}$", done.stderr, re.MULTILINE)
    (use,) = json.loads((tmp_path / "out.json").read_text())["disks"]
    assert use == {
        "path": "a,b.img", "requests": 0, "reads": 0, "writes": 0, "flushes": 0, "others": 0, "errors": 0,
        "bytes_read": 0, "bytes_written": 0,
    }  # fmt: skip


def test_a_disk_in_mode_trace_shows_each_register(kvmpy: Kvmpy, disk: Path, tmp_path: Path) -> None:
    """virtio 1.2 §4.2.2: the magic value, and a notification, which is an exit only here."""
    code = "movl $KVMPY_VIRTIO_MMIO, %edi ; movl (%rdi), %eax ; movl $0, 0x50(%rdi) ; xorl %eax, %eax ; outb %al, $0xf4"
    (tmp_path / "guest").write_bytes(assemble(code, "long"))
    options = ("--device-mode", "disk=trace", "--disk", "a,,b.img,format=raw,engine=python")
    done = kvmpy("run", "guest", *FLAT, "--mode", "long", *options)
    assert done.returncode == 0
    first, second = done.stderr.splitlines()
    assert re.fullmatch(r"#1 vcpu0 rip 0x\w+ MmioRead gpa=0xd0000000 size=4 data=0x74726976 disk", first)
    assert re.fullmatch(r"#2 vcpu0 rip 0x\w+ MmioWrite gpa=0xd0000050 size=4 data=0x0 disk", second)


# --- disks that cannot be had -----------------------------------------------------------------------------------

REFUSED: dict[str, tuple[str, list[str]]] = {
    "missing": ("missing,format=raw", ["missing: ", "No such file"]),
    "of no said format": ("plain", ["plain: ", "format=raw or format=vhd"]),
    "of an odd size": ("odd,format=raw", ["odd: ", "513 bytes", "multiple of 512"]),
    "empty": ("empty,format=raw", ["empty: ", "0 bytes"]),
    "a folder that is no blob": ("folder", ["folder"]),
    "a folder as raw": ("folder,format=raw", ["folder: ", "format=raw"]),
    "a FIFO": ("fifo,format=raw", ["fifo: ", "FIFO"]),
    "a character device": ("/dev/zero,format=raw", ["/dev/zero: ", "character device"]),
    "a link to itself": ("loop,format=raw", ["loop: ", "symbolic links"]),
    "no VHD": ("plain,format=vhd", ["plain: "]),
    "no blob": ("plain,format=blob", ["plain: ", "no page blob"]),
    "below a file": ("plain/x,format=raw", ["plain/x: "]),
    "with a line feed in its name": ("a\nb,format=raw", ["a\\nb: "]),
    "with a long name": ("x" * 300 + ",format=raw", ["xxx: ", "too long"]),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_disk_that_cannot_be_opened_is_named_in_one_line(kvmpy: Kvmpy, hello: str, tmp_path: Path, what: str) -> None:
    (tmp_path / "plain").write_bytes(bytes(4096))
    (tmp_path / "odd").write_bytes(bytes(513))
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "fifo")
    option, words = REFUSED[what]
    check_refused(kvmpy("run", hello, *FLAT, "--disk", option), *words)


def check_refused(done: "subprocess.CompletedProcess[str]", *words: str) -> None:
    assert (done.returncode, done.stdout) == (DISK, "")
    assert re.fullmatch(r"kvmpy: [^\n]+\n", done.stderr), done.stderr
    for word in words:
        assert word in done.stderr


def test_a_disk_that_another_process_writes_is_refused_and_untouched(kvmpy: Kvmpy, hello: str, disk: Path) -> None:
    with disk.open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        check_refused(kvmpy("run", hello, *FLAT, "--disk", "a,,b.img,format=raw"), "a,b.img: ", "writing")
    assert kvmpy("run", hello, *FLAT, "--disk", "a,,b.img,format=raw,engine=python").returncode == 7


def obey_permissions() -> None:
    """Take from root, for the program that is executed next, the right to pass over them; others never had it."""
    for capability in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
        ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)


def test_a_disk_that_may_not_be_read_is_refused(kvmpy: Kvmpy, hello: str, disk: Path) -> None:
    disk.chmod(0)
    refused = kvmpy("run", hello, *FLAT, "--disk", "a,,b.img,format=raw", preexec_fn=obey_permissions)
    check_refused(refused, "a,b.img: ", "Permission denied")


def test_json_tells_of_a_disk_that_cannot_be_opened(kvmpy: Kvmpy, hello: str, tmp_path: Path) -> None:
    assert kvmpy("run", hello, *FLAT, "--json", "out.json", "--disk", "missing,format=raw").returncode == DISK
    result = json.loads((tmp_path / "out.json").read_text())
    assert (result["status"], result["reason"]) == (DISK, "error")
    assert "missing" in result["message"]

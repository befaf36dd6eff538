"""``kvmpy run``: what goes where, what the options show, and how it ends."""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import DEADLINE, ECHO, HELLO, SPIN, environment, start

import kvmpy as package
from kvmpy.units import PAGE_SIZE

pytestmark = pytest.mark.kvm

Kvmpy = Callable[..., "subprocess.CompletedProcess[str]"]
FLAT = ("--format", "flat")

SERIAL_HELLO = """
    movw $0x3f8, %dx
    movb $'s', %al ; outb %al, %dx
    movb $'d', %al ; outb %al, $0xe9
    xorb %al, %al ; outb %al, $0xf4
    hlt
"""
"""Prints s on COM1 and d on the debug console."""

PRINT_FOR_EVER = "1: movb $'y', %al ; outb %al, $0xe9 ; movb $10, %al ; outb %al, $0xe9 ; jmp 1b"


@pytest.fixture
def hello(image: Callable[..., str]) -> str:
    return image(HELLO)


# --- status -----------------------------------------------------------------------------------------------------


def test_the_guests_output_and_status_pass_through(kvmpy: Kvmpy, hello: str) -> None:
    done = kvmpy("run", hello, *FLAT)
    assert (done.returncode, done.stdout, done.stderr) == (7, "Hi\n", "")


@pytest.mark.parametrize(("option", "status"), [("kvmpy", 0x23), ("qemu", 0x47)])
def test_the_exit_value_becomes_a_status_by_either_convention(
    kvmpy: Kvmpy, image: Callable[..., str], option: str, status: int
) -> None:
    """v & 0x7f, or QEMU's (v << 1) | 1 in eight bits."""
    assert kvmpy("run", image("movb $0xa3, %al ; outb %al, $0xf4"), *FLAT, "--debug-exit", option).returncode == status


ENDS = {
    "time": (SPIN, ["--timeout", "0.2"], 200, "timeout"),
    "budget": (PRINT_FOR_EVER, ["--max-exits", "5"], 200, "exit budget"),
    "halted": ("cli ; hlt", [], 198, "halted for ever"),
    "reset": ("movb $0xfe, %al ; outb %al, $0x64 ; 1: jmp 1b", [], 202, "reset"),
    "power-off": ("movw $0x3400, %ax ; movw $0x604, %dx ; outw %ax, %dx ; 1: jmp 1b", [], 0, ""),
}


@pytest.mark.parametrize("end", ENDS)
def test_each_end_has_its_status_and_at_most_one_line(kvmpy: Kvmpy, image: Callable[..., str], end: str) -> None:
    text, options, status, words = ENDS[end]
    done = kvmpy("run", image(text), *FLAT, *options)
    assert done.returncode == status
    assert done.stderr.count("\n") == (1 if words else 0)
    assert words in done.stderr


def test_a_triple_fault_is_a_crash(kvmpy: Kvmpy) -> None:
    done = kvmpy("run", "lesson:triple_fault")
    assert done.returncode == 198
    assert re.fullmatch(r"kvmpy: vCPU 0: triple fault, last known rip 0x\w+\n", done.stderr)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_run(image: Callable[..., str], signum: signal.Signals) -> None:
    process = start("run", image("movb $'!', %al ; outb %al, $0xe9\n" + SPIN), *FLAT)
    assert process.stdout is not None
    assert process.stdout.read(1) == b"!"
    process.send_signal(signum)
    _, errors = process.communicate(timeout=DEADLINE)
    assert (process.returncode, errors) == (130, b"kvmpy: interrupted\n")


def test_nohup_is_respected(image: Callable[..., str]) -> None:
    process = start("run", image(ECHO), *FLAT, stdin=subprocess.PIPE, before=ignore_hangup)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"!")
    process.stdin.flush()
    assert process.stdout.read(1) == b"!"
    process.send_signal(signal.SIGHUP)
    process.communicate(b"\x04", timeout=DEADLINE)
    assert process.returncode == 4


def ignore_hangup() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


# --- output -----------------------------------------------------------------------------------------------------


def test_each_port_goes_where_its_option_says(kvmpy: Kvmpy, image: Callable[..., str], tmp_path: Path) -> None:
    guest = image(SERIAL_HELLO)
    assert sorted(kvmpy("run", guest, *FLAT).stdout) == ["d", "s"]
    assert kvmpy("run", guest, *FLAT, "--serial", "none").stdout == "d"
    assert kvmpy("run", guest, *FLAT, "--debugcon", "none").stdout == "s"
    assert kvmpy("run", guest, *FLAT, "--serial", "file:out").stdout == "d"
    assert (tmp_path / "out").read_text() == "s"


def test_one_file_takes_both_ports_and_begins_empty(kvmpy: Kvmpy, image: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "out").write_text("of an earlier run")
    kvmpy("run", image(SERIAL_HELLO), *FLAT, "--serial", "file:out", "--debugcon", "file:out")
    assert sorted((tmp_path / "out").read_text()) == ["d", "s"]


def test_output_is_not_held_back(image: Callable[..., str]) -> None:
    process = start("run", image("movb $'!', %al ; outb %al, $0xe9\n" + SPIN), *FLAT)
    assert process.stdout is not None
    assert process.stdout.read(1) == b"!"
    process.kill()
    process.communicate()


def test_all_of_a_long_output_arrives(kvmpy: Kvmpy, image: Callable[..., str]) -> None:
    """More than the ring, the pipe and a write hold, in order."""
    guest = image(
        "movl $70000, %ecx ; 1: movb %cl, %al ; orb $0x80, %al ; outb %al, $0xe9 ; decl %ecx ; jnz 1b\n" + END
    )
    done = subprocess.run(
        [sys.executable, "-m", "kvmpy", "run", guest, *FLAT],
        stdin=subprocess.DEVNULL, capture_output=True, env=environment(), timeout=DEADLINE,
    )  # fmt: skip
    assert done.stdout == bytes(number & 0xFF | 0x80 for number in range(70000, 0, -1))


END = "xorb %al, %al ; outb %al, $0xf4 ; hlt"


def test_a_reader_that_goes_away_ends_the_run_without_a_word(image: Callable[..., str], tmp_path: Path) -> None:
    process = start("run", image(PRINT_FOR_EVER), *FLAT, "--json", str(tmp_path / "out.json"))
    assert process.stdout is not None
    process.stdout.read(2)
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == b""
    assert process.wait(DEADLINE) == 130
    assert json.loads((tmp_path / "out.json").read_text())["reason"] == "interrupted"


def test_a_full_disk_is_told_in_one_line(kvmpy: Kvmpy, image: Callable[..., str]) -> None:
    done = kvmpy("run", image(PRINT_FOR_EVER), *FLAT, "--debugcon", "file:/dev/full")
    assert (done.returncode, done.stderr) == (196, "kvmpy: --debugcon file:/dev/full: No space left on device\n")


def test_a_reader_that_sleeps_stops_neither_limit_nor_signal(image: Callable[..., str]) -> None:
    """The pipe is full before the guest prints: its first byte waits."""
    read_fd, write_fd = os.pipe()
    os.write(write_fd, bytes(fcntl.fcntl(write_fd, fcntl.F_SETPIPE_SZ, PAGE_SIZE)))
    guest = image(PRINT_FOR_EVER)
    process = start("run", guest, *FLAT, "--timeout", "0.3", stdout=write_fd)
    assert process.wait(DEADLINE) == 200
    process = start("run", guest, *FLAT, "-v", stdout=write_fd)
    assert process.stderr is not None
    assert process.stderr.read(1) == b"k"  # what was loaded: from here on, signals are ours
    process.send_signal(signal.SIGTERM)
    assert process.wait(DEADLINE) == 130
    os.close(read_fd)
    os.close(write_fd)


@pytest.mark.parametrize("closed", [0, 1, 2])
def test_a_closed_descriptor_is_not_taken_for_a_port(image: Callable[..., str], closed: int) -> None:
    """Descriptor 0 would be the next to be given away, to /dev/kvm."""
    process = start("run", image(HELLO), *FLAT, before=lambda: os.close(closed))
    output, errors = process.communicate(timeout=DEADLINE)
    assert (process.returncode, errors) == (7, b"")
    assert output == (b"" if closed == 1 else b"Hi\n")


# --- what is shown ----------------------------------------------------------------------------------------------


def test_trace_shows_each_exit_in_a_line(kvmpy: Kvmpy, hello: str) -> None:
    lines = kvmpy("run", hello, *FLAT, "--trace").stderr.splitlines()
    assert len(lines) == 4
    assert re.fullmatch(r"#1 vcpu0 rip 0x100\d IoOut port=0xe9 size=1 data=0x48 'H' debugcon", lines[0])
    assert re.fullmatch(r"#3 vcpu0 rip 0x10\w\w IoOut port=0xe9 size=1 data=0xa '\\n' debugcon", lines[2])
    assert re.fullmatch(r"#4 vcpu0 rip 0x10\w\w IoOut port=0xf4 size=1 data=0x7 exit", lines[3])


def test_trace_shows_what_a_read_was_answered(kvmpy: Kvmpy, image: Callable[..., str]) -> None:
    guest = image("inb $0xe9, %al ; movw $0x700, %dx ; inw %dx, %ax\n" + END)
    lines = kvmpy("run", guest, *FLAT, "--trace").stderr.splitlines()
    assert lines[0].endswith("IoIn port=0xe9 size=1 data=0xe9 debugcon")
    assert lines[1].endswith("IoIn port=0x700 size=2 data=0xffff nobody")


def test_a_device_in_mode_trace_shows_its_accesses_alone(kvmpy: Kvmpy, image: Callable[..., str]) -> None:
    done = kvmpy("run", image(SERIAL_HELLO), *FLAT, "--device-mode", "serial=trace")
    assert sorted(done.stdout) == ["d", "s"]
    assert re.fullmatch(r"#1 vcpu0 rip 0x10\w\w IoOut port=0x3f8 size=1 data=0x73 's' serial\n", done.stderr)


def test_stats_count_by_reason_and_device(kvmpy: Kvmpy, image: Callable[..., str]) -> None:
    done = kvmpy("run", image("inb $0xe9, %al ; movw $0x700, %dx ; inb %dx, %al\n" + HELLO), *FLAT, "--stats")
    assert re.search(r"^  IO +6$", done.stderr, re.MULTILINE)
    assert re.search(r"^  total +6$", done.stderr, re.MULTILINE)
    assert re.search(r"^  debugcon +0xe9 +1 +3$", done.stderr, re.MULTILINE)
    assert re.search(r"^  exit +0xf4-0xf7 +0 +1$", done.stderr, re.MULTILINE)
    assert re.search(r"^  nobody +1 +0$", done.stderr, re.MULTILINE)
    assert re.search(r"^  in the guest +0\.\d*[1-9]\d*$", done.stderr, re.MULTILINE)


def test_verbose_tells_what_was_loaded_how_and_what_nobody_answered(kvmpy: Kvmpy, image: Callable[..., str]) -> None:
    done = kvmpy("run", image("movw $0x700, %dx ; inb %dx, %al\n" + END), *FLAT, "-v", "--mem", "3.5G")
    assert "flat, starts in real mode at 0x1000" in done.stderr
    assert "memory: 3.5 GiB at 0x0-0xbfffffff, 0x100000000-0x11fffffff, backed by memfd" in done.stderr
    assert "nobody answered 1 reads (all ones) and 0 writes" in done.stderr


def test_hugepages_and_their_backing_are_told(kvmpy: Kvmpy, hello: str) -> None:
    assert "2 MiB pages" in kvmpy("run", hello, *FLAT, "-v", "--hugepages").stderr


def test_more_cores_than_the_host_has_are_warned_of(kvmpy: Kvmpy, hello: str) -> None:
    host_cpus = len(os.sched_getaffinity(0))
    done = kvmpy("run", hello, *FLAT, "--cores", str(host_cpus + 1))
    assert done.returncode == 7
    assert done.stderr == f"kvmpy: warning: {host_cpus + 1} cores take turns on {host_cpus} host CPUs\n"
    assert kvmpy("run", hello, *FLAT, "--cores", str(host_cpus)).stderr == ""


# --- files ------------------------------------------------------------------------------------------------------


def test_json_has_the_whole_result(kvmpy: Kvmpy, hello: str, tmp_path: Path) -> None:
    kvmpy("run", hello, *FLAT, "--json", "out.json")
    result = json.loads((tmp_path / "out.json").read_text())
    assert (result["kvmpy"], result["status"], result["reason"]) == (package.__version__, 7, "exit port")
    assert (result["exits"], result["exits_total"], result["unmapped"]) == ({"IO": 4}, 4, {"reads": 0, "writes": 0})
    console = next(use for use in result["ranges"] if use["name"] == "debugcon")
    assert console == {"name": "debugcon", "base": 0xE9, "size": 1, "reads": 0, "writes": 3}
    assert 0 < result["seconds_in_guest"] <= result["seconds"]
    assert result["registers"]["0"]["rax"] & 0xFF == 7
    assert os.uname().release in result["host"]


def test_json_goes_to_standard_output_when_asked(kvmpy: Kvmpy, hello: str) -> None:
    done = kvmpy("run", hello, *FLAT, "--json", "-", "--debugcon", "none", "--serial", "none")
    assert json.loads(done.stdout)["status"] == done.returncode == 7


def test_json_tells_why_there_was_no_run(kvmpy: Kvmpy, tmp_path: Path) -> None:
    assert kvmpy("run", "missing", "--json", "out.json").returncode == 194
    result = json.loads((tmp_path / "out.json").read_text())
    assert (result["status"], result["reason"]) == (194, "error")
    assert "missing" in result["message"]


def test_a_core_is_written_whatever_the_end(kvmpy: Kvmpy, image: Callable[..., str], tmp_path: Path) -> None:
    assert kvmpy("run", image(SPIN), *FLAT, "--timeout", "0.1", "--dump-core", "core").returncode == 200
    assert (tmp_path / "core").read_bytes()[:4] == b"\x7fELF"
    assert kvmpy("run", image("cli ; hlt"), *FLAT, "--dump-core", "core2").returncode == 198
    assert (tmp_path / "core2").exists()


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("missing/core", "No such file or directory"),
        ("/dev/full", "is no regular file, which a core would replace"),
        (".", "is no regular file, which a core would replace"),
    ],
)
def test_a_core_that_cannot_be_written_is_told_before_the_guest_runs(
    kvmpy: Kvmpy, hello: str, path: str, why: str
) -> None:
    done = kvmpy("run", hello, *FLAT, "--dump-core", path)
    assert (done.returncode, done.stdout, done.stderr) == (196, "", f"kvmpy: {path}: {why}\n")


# --- lessons ----------------------------------------------------------------------------------------------------


def test_a_lesson_runs_with_the_options_of_its_header(kvmpy: Kvmpy) -> None:
    done = kvmpy("run", "lesson:mp_table")
    assert done.returncode == 0
    assert done.stdout.count("processor") == 2


def test_what_is_said_goes_before_a_lessons_own_options(kvmpy: Kvmpy) -> None:
    assert kvmpy("run", "--cores", "1", "lesson:mp_table").stdout.count("processor") == 1
    assert kvmpy("run", "lesson:mp_table", "--cores", "3").stdout.count("processor") == 3


def test_a_machine_is_named_after_its_image(kvmpy: Kvmpy) -> None:
    assert "name: params\n" in kvmpy("run", "lesson:params").stdout
    assert "name: vm1\n" in kvmpy("run", "lesson:params", "--name", "vm1").stdout


# --- start-up ---------------------------------------------------------------------------------------------------


def test_a_run_loads_only_what_it_needs(hello: str) -> None:
    """Each of these costs a start milliseconds."""
    code = "import sys; from kvmpy.cli.main import main; main(sys.argv[1:]); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", code, "run", hello, *FLAT],
        stdin=subprocess.DEVNULL, capture_output=True, env=environment(), timeout=DEADLINE, text=True,
    )  # fmt: skip
    loaded = set(done.stderr.split())
    unwanted = {"json", "shutil", "traceback", "termios", "subprocess", "elftools", "uuid", "tempfile"}
    unwanted |= {"kvmpy.lessons", "kvmpy.cli.report", "kvmpy.cli.trace", "kvmpy.cli.monitor", "kvmpy.pc.core_dump"}
    assert "kvmpy.pc.pc" in loaded
    assert not loaded & unwanted
    assert [name for name in loaded if "virtio" in name or "storage" in name or name.startswith("kvmpy.pc.disk")] == []

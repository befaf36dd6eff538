"""``--on-reboot``: a guest that resets the machine ends the run, or boots again in the same streams."""

import json
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import DEADLINE, Terminal, start

pytestmark = pytest.mark.kvm

Kvmpy = Callable[..., "subprocess.CompletedProcess[str]"]
Image = Callable[..., str]
FLAT = ("--format", "flat")

RESET = "movb $0xfe, %al ; outb %al, $0x64 ; 9: jmp 9b\n"
OBEY = f"""
1:  movw $0x3fd, %dx ; inb %dx, %al ; testb $1, %al ; jz 1b
    movw $0x3f8, %dx ; inb %dx, %al ; outb %al, %dx
    cmpb $'q', %al ; jne 2f
    movb $7, %al ; outb %al, $0xf4
2:  cmpb $'r', %al ; jne 1b
    {RESET}
"""
"""Sends each key back; r resets the machine, q ends with status 7."""
RESET_FOR_EVER = "movw $0x3f8, %dx ; movb $'!', %al ; outb %al, %dx\n" + RESET


def test_exit_is_the_default(kvmpy: Kvmpy, image: Image) -> None:
    done = kvmpy("run", image(OBEY), *FLAT, input="abrcq")
    assert (done.returncode, done.stdout, done.stderr) == (202, "abr", "kvmpy: the guest reset the machine\n")


def test_restart_goes_on_in_the_same_streams_without_a_word(kvmpy: Kvmpy, image: Image) -> None:
    done = kvmpy("run", image(OBEY), *FLAT, "--on-reboot", "restart", input="abrcrq")
    assert (done.returncode, done.stdout, done.stderr) == (7, "abrcrq", "")


def test_what_is_typed_behind_a_restart_reaches_the_new_boot(image: Image) -> None:
    guest = "movw $0x3f8, %dx ; movb $'!', %al ; outb %al, %dx\n" + OBEY
    process = start("run", image(guest), *FLAT, "--on-reboot", "restart", stdin=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    for keys, shown in ((b"r", b"!r!"), (b"r", b"r!"), (b"q", b"q")):
        process.stdin.write(keys)
        seen = b""
        while len(seen) < len(shown):
            seen += process.stdout.read(1)
        assert seen == shown
    process.communicate(timeout=DEADLINE)
    assert process.returncode == 7


def test_verbose_says_each_restart_and_the_reports_are_of_the_last_boot(
    kvmpy: Kvmpy, image: Image, tmp_path: Path
) -> None:
    options = ("--on-reboot", "restart", "-v", "--stats", "--json", "out.json")
    done = kvmpy("run", image(OBEY), *FLAT, *options, input="rrq")
    assert [line for line in done.stderr.splitlines() if "restart " in line] == [
        "kvmpy: the guest reset the machine: restart 1",
        "kvmpy: the guest reset the machine: restart 2",
    ]
    assert "  restarts                           2\n" in done.stderr
    assert "\ntime in seconds of the last boot\n" in done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    assert (result["restarts"], result["status"], result["panic"]) == (2, 7, None)


def test_a_restart_behind_a_crash_is_said_in_any_case(kvmpy: Kvmpy) -> None:
    done = kvmpy("run", "lesson:triple_fault", "--on-reboot", "restart", "--max-exits", "40")
    first, *_ = done.stderr.splitlines()
    assert first.startswith("kvmpy: vCPU 0: triple fault, last known rip 0x")
    assert first.endswith(": restart 1")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_guest_that_reboots_for_ever_is_ended_by_a_signal(image: Image, signum: signal.Signals) -> None:
    process = start("run", image(RESET_FOR_EVER), *FLAT, "--on-reboot", "restart")
    assert process.stdout is not None
    assert process.stdout.read(1) == b"!"
    process.send_signal(signum)
    _, errors = process.communicate(timeout=DEADLINE)
    assert (process.returncode, errors) == (130, b"kvmpy: interrupted\n")


def test_the_time_limit_is_one_over_all_boots(kvmpy: Kvmpy, image: Image) -> None:
    done = kvmpy("run", image(RESET_FOR_EVER), *FLAT, "--on-reboot", "restart", "--timeout", "0.4")
    assert done.returncode == 200
    assert len(done.stdout) > 1


def test_traces_go_on(kvmpy: Kvmpy, image: Image) -> None:
    done = kvmpy("run", image(RESET_FOR_EVER), *FLAT, "--on-reboot", "restart", "--trace", "--max-exits", "6")
    lines = [line for line in done.stderr.splitlines() if "IoOut port=0x64" in line]
    assert len(lines) == 3
    assert all(line.endswith(" keyboard") for line in lines)


def test_a_terminal_stays_with_the_guest(terminal: Callable[..., Terminal], image: Image) -> None:
    started = terminal("run", image(OBEY), *FLAT, "-i", "--on-reboot", "restart")
    started.read_until(b"sends Ctrl-A\r\n")
    started.type(b"r")
    started.read_until(b"r")
    started.type(b"a")
    started.read_until(b"a")
    started.type(b"\x01c")
    started.read_until(b"(kvmpy) ")
    started.type(b"regs\r")
    assert b"rip " in started.read_until(b"(kvmpy) ")
    started.type(b"\x01c")
    started.read_until(b"back to the guest")
    started.type(b"q")
    assert started.wait() == 7

"""A kernel's panic, as a user is told of it."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import SPIN, Terminal

pytestmark = pytest.mark.kvm

Kvmpy = Callable[..., "subprocess.CompletedProcess[str]"]
Image = Callable[..., str]
FLAT = ("--format", "flat")

RESET = "movb $0xfe, %al ; outb %al, $0x64 ; 9: jmp 9b\n"
PANIC = "Kernel panic - not syncing: \x1b[2Jno init\r\n"


def say(text: str, then: str) -> str:
    letters = ", ".join(str(byte) for byte in text.encode())
    return f"""
        movw $text, %si ; movw $0x3f8, %dx
    1:  lodsb ; testb %al, %al ; jz 2f ; outb %al, %dx ; jmp 1b
    2:  {then}
    text: .byte {letters}, 0
    """


def test_a_panic_is_told_with_the_last_lines(kvmpy: Kvmpy, image: Image, tmp_path: Path) -> None:
    done = kvmpy("run", image(say("mounting\r\n" + PANIC + "trace", RESET)), *FLAT, "--json", "out.json")
    assert done.returncode == 198
    assert done.stderr.splitlines() == [
        "kvmpy: the guest's kernel panicked: ?[2Jno init",
        "  mounting",
        "  Kernel panic - not syncing: ?[2Jno init",
        "  trace",
    ]
    result = json.loads((tmp_path / "out.json").read_text())
    assert (result["status"], result["reason"], result["panic"]) == (198, "kernel panic", "?[2Jno init")
    assert result["last_words"][-1] == "trace"


def test_a_panic_that_another_end_follows_is_told_beside_it(kvmpy: Kvmpy, image: Image) -> None:
    done = kvmpy("run", image(say(PANIC, SPIN)), *FLAT, "--timeout", "0.3")
    assert done.returncode == 200
    assert done.stderr.splitlines()[:2] == ["kvmpy: timeout", "kvmpy: the guest's kernel panicked: ?[2Jno init"]


def test_on_a_terminal_the_last_lines_stand_there_already(terminal: Callable[..., Terminal], image: Image) -> None:
    started = terminal("run", image(say(PANIC.replace("\x1b", ""), RESET)), *FLAT)
    shown = started.read_until(b"panicked: [2Jno init\r\n")
    assert started.wait() == 198
    assert shown.count(b"not syncing") == 1


def test_a_restart_behind_a_panic_is_told(kvmpy: Kvmpy, image: Image) -> None:
    guest = image(say("Kernel panic - not syncing: no\n", RESET))
    done = kvmpy("run", guest, *FLAT, "--on-reboot", "restart", "--timeout", "0.5")
    assert done.stderr.startswith("kvmpy: the guest's kernel panicked: no: restart 1\n")

"""``kvmpy run -i`` in a real terminal: keys, the two commands of Ctrl-A, and a terminal that is always restored."""

import os
import signal
import termios
from collections.abc import Callable

import pytest
from command_line import DEADLINE, ECHO, SPIN, Terminal

from kvmpy.cli.terminal import RawTerminal

pytestmark = pytest.mark.kvm

READY = b"sends Ctrl-A\r\n"
"""The end of the line that tells the keys: what is typed from here on goes to the guest."""


@pytest.fixture
def echo(terminal: Callable[..., Terminal], image: Callable[..., str]) -> Terminal:
    """A guest that echoes, in a terminal, ready."""
    started = terminal("run", image(ECHO), "--format", "flat", "-i")
    started.read_until(READY)
    return started


def test_keys_reach_the_guest_and_its_output_the_screen(echo: Terminal) -> None:
    echo.type(b"hello")
    echo.read_until(b"hello")
    echo.type(b"\x04")
    assert echo.wait() == 4


def test_ctrl_c_is_a_key_of_the_guest(echo: Terminal) -> None:
    echo.type(b"\x03<")
    echo.read_until(b"\x03<")
    assert echo.process.poll() is None


def test_ctrl_a_x_ends_the_run_as_interrupted(echo: Terminal) -> None:
    echo.type(b"\x01x")
    assert echo.wait() == 130
    assert termios.tcgetattr(echo.slave) == echo.mode


def test_ctrl_a_twice_sends_one(echo: Terminal) -> None:
    echo.type(b"<\x01\x01>")
    echo.read_until(b"<\x01>")


def test_escape_and_its_command_may_arrive_apart(echo: Terminal) -> None:
    echo.type(b"a\x01")
    echo.read_until(b"a")
    echo.type(b"x")
    assert echo.wait() == 130


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_a_signal_ends_the_run_and_the_terminal_is_restored(echo: Terminal, signum: signal.Signals) -> None:
    assert termios.tcgetattr(echo.slave) != echo.mode
    echo.send_signal(signum)
    assert echo.wait() == 130
    assert termios.tcgetattr(echo.slave) == echo.mode


def test_the_guests_end_restores_the_terminal(echo: Terminal) -> None:
    echo.type(b"\x04")
    assert echo.wait() == 4
    assert termios.tcgetattr(echo.slave) == echo.mode


def test_the_time_limit_holds_and_restores_the_terminal(
    terminal: Callable[..., Terminal], image: Callable[..., str]
) -> None:
    started = terminal("run", image(SPIN), "--format", "flat", "-i", "--timeout", "0.2")
    started.read_until(b"timeout")
    assert started.wait() == 200
    assert termios.tcgetattr(started.slave) == started.mode


def test_a_terminal_that_hangs_up_ends_the_run(echo: Terminal) -> None:
    echo.type(b"a")
    echo.read_until(b"a")
    # The last descriptor of the terminal's other side: the line is dropped, and SIGHUP comes.
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, echo.master)
    os.close(null)
    assert echo.wait() == 130


def test_a_guest_that_halted_for_ever_is_left_to_the_one_who_watches(
    terminal: Callable[..., Terminal], image: Callable[..., str]
) -> None:
    """With -i nothing ends the run by itself but the guest, a limit or the user: here the limit."""
    started = terminal("run", image("cli ; hlt"), "--format", "flat", "-i", "--timeout", "0.8")
    assert started.wait() == 200


# --- the monitor ------------------------------------------------------------------------------------------------


@pytest.fixture
def monitor(echo: Terminal) -> Terminal:
    """The same, with the monitor open."""
    echo.type(b"\x01c")
    echo.read_until(b"(kvmpy) ")
    return echo


def test_the_monitor_shows_registers(monitor: Terminal) -> None:
    monitor.type(b"regs 0\r")
    shown = monitor.read_until(b"(kvmpy) ")
    assert b"rip    00000000000010" in shown
    assert b"cr0 " in shown


def test_the_monitor_names_the_vcpus_that_there_are(monitor: Terminal) -> None:
    monitor.type(b"regs 1\r")
    assert b"no vCPU 1: there are 0 to 0" in monitor.read_until(b"(kvmpy) ")


def test_the_monitor_shows_exits(monitor: Terminal) -> None:
    monitor.type(b"exits\r")
    shown = monitor.read_until(b"(kvmpy) ")
    assert b"total" in shown
    assert b"IO read port=0x3fd size=1" in shown


def test_keys_are_the_monitors_until_it_is_left(monitor: Terminal) -> None:
    monitor.type(b"nonsense\r")
    assert b"no command 'nonsense'" in monitor.read_until(b"(kvmpy) ")
    monitor.type(b"\x01c")
    monitor.read_until(b"back to the guest")
    monitor.type(b"<hello>")
    monitor.read_until(b"<hello>")


def test_the_monitor_asks_the_guest_to_stop(terminal: Callable[..., Terminal]) -> None:
    """The lesson waits for the mailbox of its parameter page, and then ends by itself."""
    started = terminal("run", "lesson:stop_request", "-i", "--timeout", "20")
    started.read_until(b"waiting")
    started.type(b"\x01c")
    started.read_until(b"(kvmpy) ")
    started.type(b"stop\r")
    assert started.wait() == 0


def test_a_paused_guest_stands_still_until_it_goes_on(monitor: Terminal) -> None:
    monitor.type(b"pause\r")
    monitor.read_until(b"paused\r\n(kvmpy) ")
    counts = []
    for _ in range(2):
        monitor.type(b"exits\r")
        counts.append(monitor.read_until(b"(kvmpy) "))  # a guest that runs asks for keys all the time
    assert counts[0] == counts[1]
    monitor.type(b"\x01c")
    monitor.read_until(b"back to the guest, which is paused\r\n")
    monitor.type(b"waiting\x01c")
    assert b"waiting" not in monitor.read_until(b"(kvmpy) ")
    monitor.type(b"cont\r")
    monitor.read_until(b"back to the guest")
    monitor.type(b"\x04")
    assert monitor.wait() == 4


def test_a_line_can_be_corrected(monitor: Terminal) -> None:
    monitor.type(b"regx\x7fs\r")
    assert b"rip " in monitor.read_until(b"(kvmpy) ")


def test_help_names_every_command(monitor: Terminal) -> None:
    monitor.type(b"help\r")
    shown = monitor.read_until(b"(kvmpy) ")
    for command in (b"regs", b"exits", b"pause", b"resume", b"cont", b"quit"):
        assert command in shown
    assert b"power button (ACPI)" in shown


def test_quit_ends_the_run(monitor: Terminal) -> None:
    monitor.type(b"quit\r")
    assert monitor.wait() == 130
    assert termios.tcgetattr(monitor.slave) == monitor.mode


# --- without -i -------------------------------------------------------------------------------------------------


def test_without_i_ctrl_c_ends_the_run(terminal: Callable[..., Terminal], image: Callable[..., str]) -> None:
    started = terminal("run", image("movb $'!', %al ; outb %al, $0xe9\n" + SPIN), "--format", "flat")
    started.read_until(b"!")
    started.type(b"\x03")
    assert started.wait() == 130


def test_without_i_the_terminal_is_left_alone(terminal: Callable[..., Terminal], image: Callable[..., str]) -> None:
    started = terminal("run", image("movb $'!', %al ; outb %al, $0xe9\n" + ECHO), "--format", "flat")
    started.read_until(b"!")
    assert termios.tcgetattr(started.slave) == started.mode
    started.type(b"\x04\n")  # what the guest would end by
    started.send_signal(signal.SIGTERM)
    assert started.wait() == 130


# --- in the background ------------------------------------------------------------------------------------------


def test_in_the_background_of_its_terminal_it_says_what_is_missing(image: Callable[..., str]) -> None:
    """timeout(1) makes a process group of its own; the shell stays in the foreground."""
    started = Terminal("run", image(ECHO), "--format", "flat", "-i", before=("timeout", str(DEADLINE)))
    try:
        started.read_until(b"kvmpy: -i: not in the foreground of its terminal (timeout needs --foreground)\r\n")
        assert started.wait() == 196
        assert termios.tcgetattr(started.slave) == started.mode
    finally:
        started.close()


# --- the terminal alone -----------------------------------------------------------------------------------------


def test_an_exception_restores_the_terminal() -> None:
    master, slave = os.openpty()
    before = termios.tcgetattr(slave)

    def fail() -> None:
        with RawTerminal(slave):
            assert termios.tcgetattr(slave) != before
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert termios.tcgetattr(slave) == before
    os.close(master)
    os.close(slave)

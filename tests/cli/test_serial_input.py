"""Standard input that is no terminal: fed to the serial port, to its end, at the guest's pace."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import DEADLINE, ECHO, HELLO, environment

from kvmpy.cli.serial_input import AHEAD, SerialInput
from kvmpy.devices.output import SerialOutput
from kvmpy.devices.serial import Uart16550
from kvmpy.pc.loop import EventLoop


def run(image: str, *options: str, **streams: object) -> "subprocess.CompletedProcess[bytes]":
    command = [sys.executable, "-m", "kvmpy", "run", image, "--format", "flat", *options]
    return subprocess.run(command, capture_output=True, env=environment(), timeout=DEADLINE, **streams)


@pytest.mark.kvm
def test_a_pipe_is_fed_to_its_end(image: Callable[..., str]) -> None:
    """Twice what may wait for the guest, and nothing lost or twice."""
    text = bytes(0x20 + i % 0x5F for i in range(2 * AHEAD))
    done = run(image(ECHO), input=text + b"\x04")
    assert (done.returncode, done.stderr) == (4, b"")
    assert done.stdout == text


@pytest.mark.kvm
def test_a_file_is_fed_to_its_end(image: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "input").write_bytes(b"abc" * 2000 + b"\x04")
    with (tmp_path / "input").open("rb") as file:
        done = run(image(ECHO), stdin=file)
    assert (done.returncode, done.stdout) == (4, b"abc" * 2000)


@pytest.mark.kvm
def test_input_reaches_a_port_whose_output_is_a_file(image: Callable[..., str], tmp_path: Path) -> None:
    assert run(image(ECHO), "--serial", f"file:{tmp_path / 'out'}", input=b"text\x04").returncode == 4
    assert (tmp_path / "out").read_bytes() == b"text"


@pytest.mark.kvm
def test_the_end_of_input_does_not_end_the_run(image: Callable[..., str]) -> None:
    """The guest is told nothing of it: here it waits on, until the time limit."""
    done = run(image(ECHO), "--timeout", "0.3", input=b"text")
    assert (done.returncode, done.stdout) == (200, b"text")


@pytest.mark.kvm
def test_a_guest_that_does_not_listen_is_not_disturbed(image: Callable[..., str]) -> None:
    done = run(image(HELLO), input=bytes(100 * AHEAD))
    assert (done.returncode, done.stdout, done.stderr) == (7, b"Hi\n", b"")


@pytest.mark.kvm
def test_input_by_interrupts(image: Callable[..., str]) -> None:
    command = [sys.executable, "-m", "kvmpy", "run", "lesson:serial_echo"]
    done = subprocess.run(
        command, input=b"one\ntwo\n" * 500 + b"\x04", capture_output=True, env=environment(), timeout=DEADLINE
    )
    assert (done.returncode, done.stdout) == (0, b"one\ntwo\n" * 500)


@pytest.fixture
def loop() -> EventLoop:
    return EventLoop()


def test_reading_stops_while_the_guest_does_not_read_and_goes_on_when_it_has(loop: EventLoop) -> None:
    read_fd, write_fd = os.pipe()
    with SerialOutput() as output:
        uart = Uart16550(output, lambda level: None)
        feeder = SerialInput(read_fd, lambda: uart, loop)
        os.write(write_fd, b"x" * (3 * AHEAD))
        for _ in range(5):
            loop.wait(0)
        assert AHEAD <= uart.pending < 2 * AHEAD
        assert read_everything(uart) == b"x" * AHEAD
        loop.wait(0)  # the guest has read all: on with it
        loop.wait(0)
        assert uart.pending == AHEAD
        feeder.close()
    os.close(read_fd)
    os.close(write_fd)
    loop.close()


def read_everything(uart: Uart16550) -> bytes:
    """Read RBR while LSR says that there is data, as a guest does."""
    data = b""
    while uart.read(5, 1)[0] & 1:
        data += uart.read(0, 1)
    return data


def test_a_standard_input_that_cannot_be_read_is_told_and_left_alone(
    loop: EventLoop, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with SerialOutput() as output, (tmp_path / "out").open("wb") as file:
        uart = Uart16550(output, lambda level: None)
        feeder = SerialInput(file.fileno(), lambda: uart, loop)
        for _ in range(3):
            loop.wait(0)
        feeder.close()
    assert capfd.readouterr().err == "kvmpy: standard input: Bad file descriptor\n"
    loop.close()

"""``--grace``: a guest is asked to stop before a signal ends it."""

import fcntl
import os
import signal
import threading
from collections.abc import Callable

import pytest
from command_line import DEADLINE, SPIN, start

from kvmpy.cli.grace import Grace
from kvmpy.cli.interruption import Interruption
from kvmpy.units import PAGE_SIZE

pytestmark = pytest.mark.kvm

Image = Callable[..., str]
FLAT = ("--format", "flat")

PRINT_FOR_EVER = "1: movb $'y', %al ; outb %al, $0xe9 ; jmp 1b"
WAITS = "movb $'!', %al ; outb %al, $0xe9\n" + SPIN


def test_a_guest_that_is_asked_may_stop_by_itself() -> None:
    """The lesson waits for the mailbox of its parameter page."""
    process = start("run", "lesson:stop_request", "--grace", "20")
    assert process.stdout is not None
    assert process.stdout.read(7) == b"waiting"
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=DEADLINE)
    assert (process.returncode, errors) == (0, b"")
    assert b"bye" in output


def test_a_guest_that_does_not_listen_is_ended_when_the_time_has_passed(image: Image) -> None:
    process = start("run", image(WAITS), *FLAT, "--grace", "0.2")
    assert process.stdout is not None
    assert process.stdout.read(1) == b"!"
    process.send_signal(signal.SIGHUP)
    _, errors = process.communicate(timeout=DEADLINE)
    assert (process.returncode, errors) == (130, b"kvmpy: interrupted\n")


@pytest.mark.parametrize("grace", [(), ("--grace", "20")], ids=["without", "with"])
def test_ctrl_c_waits_for_nobody(image: Image, grace: tuple[str, ...]) -> None:
    process = start("run", image(WAITS), *FLAT, *grace)
    assert process.stdout is not None
    assert process.stdout.read(1) == b"!"
    if grace:
        process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=DEADLINE)
    assert process.returncode == 130


def test_a_second_wish_ends_the_grace_but_not_the_same_wish_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """timeout(1) signals a process, and then its group."""
    with Interruption() as interruption, interruption.grace(3600.0, ask=lambda: None, stop=lambda: None):
        interruption.hold_back()
        for _ in range(3):
            signal.raise_signal(signal.SIGTERM)
        assert interruption.received == 0
        monkeypatch.setattr("kvmpy.cli.interruption.IMPATIENCE", -1.0)  # as if a second had passed
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        assert interruption.received == signal.SIGTERM


def test_a_guest_is_asked_again_until_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first time, its kernel may have had no button yet."""
    monkeypatch.setattr("kvmpy.cli.grace.ASK_AGAIN", 0.001)
    asked, third, stopped = [], threading.Event(), threading.Event()

    def ask() -> None:
        asked.append(None)
        if len(asked) == 3:
            third.set()

    grace = Grace(3600.0, ask=ask, stop=stopped.set)
    grace.begin()
    assert third.wait(DEADLINE)
    grace.close()
    assert not stopped.is_set()


def test_a_reader_that_sleeps_keeps_nothing_from_its_end(image: Image) -> None:
    """The pipe is full before the guest prints: its first byte waits. The lesson stops by itself all the same."""
    read_fd, write_fd = os.pipe()
    os.write(write_fd, bytes(fcntl.fcntl(write_fd, fcntl.F_SETPIPE_SZ, PAGE_SIZE)))
    for guest, grace, status in ((image(PRINT_FOR_EVER), "0.2", 130), ("lesson:stop_request", "20", 0)):
        options = FLAT if status else ()
        process = start("run", guest, *options, "-v", "--grace", grace, stdout=write_fd)
        assert process.stderr is not None
        assert process.stderr.read(1) == b"k"  # what was loaded: from here on, signals are ours
        process.send_signal(signal.SIGTERM)
        if not status:
            os.read(read_fd, PAGE_SIZE)  # all that the guest has to say has room now
        assert process.wait(DEADLINE) == status
        process.stderr.close()
    os.close(read_fd)
    os.close(write_fd)

"""The host's timer: due when it was said, never twice, and a thread only while there is something to wait for."""

import threading
import time

import pytest

from kvmpy.devices import host_timer
from kvmpy.devices.host_timer import HostTimer

LIMIT = 10.0
FAR = 3600 * 10**9


class Armed:
    """A timer, what it did, and what its thread raised."""

    def __init__(self):
        self.times, self.errors, self.starts = [], [], []
        self.came = threading.Condition()
        self.timer = HostTimer("tested", on_error=self.on_error, start=self.start)
        self.timer.on_due = self.on_due

    def start(self, thread):
        self.starts.append(thread)
        thread.start()

    def on_due(self):
        with self.came:
            self.times.append(time.monotonic_ns())
            self.came.notify_all()

    def on_error(self, error):
        with self.came:
            self.errors.append(error)
            self.came.notify_all()

    def wait_for(self, count):
        with self.came:
            assert self.came.wait_for(lambda: len(self.times) >= count, LIMIT)


@pytest.fixture
def armed():
    armed = Armed()
    yield armed
    armed.timer.close()


def test_timer_is_due_not_before_its_time(armed):
    before = time.monotonic_ns()
    armed.timer.arm(2_000_000)
    armed.wait_for(1)
    assert armed.times[0] - before >= 2_000_000


def test_timer_is_due_once(armed):
    """Armed again it is due again; in between nothing comes by itself."""
    for count in range(1, 4):
        armed.timer.arm(0)
        armed.wait_for(count)
    armed.timer.close()
    assert len(armed.times) == 3


def test_last_word_counts(armed):
    """Later, sooner, never: what was said before is forgotten."""
    armed.timer.arm(0)
    armed.wait_for(1)
    armed.timer.arm(FAR)
    armed.timer.arm(0)
    armed.wait_for(2)
    armed.timer.arm(0)
    armed.timer.arm(None)
    armed.timer.close()
    assert len(armed.times) in (2, 3), "it may have come before it was told not to"


def test_timer_may_be_armed_where_it_is_due(armed):
    """That is how something comes again and again."""

    def again():
        armed.on_due()
        if len(armed.times) < 5:
            armed.timer.arm(0)

    armed.timer.on_due = again
    armed.timer.arm(0)
    armed.wait_for(5)


def test_no_thread_without_need(armed, monkeypatch):
    """None at first, and none when nobody has armed it for a while; then another."""
    monkeypatch.setattr(host_timer, "LINGER", 0.0)
    threads = threading.active_count()
    armed.timer.arm(None)
    assert armed.starts == []
    for count in (1, 2):
        armed.timer.arm(0)
        armed.wait_for(count)
        armed.starts[-1].join(LIMIT)
        assert threading.active_count() == threads
    assert len(armed.starts) == 2


def test_one_thread_serves_a_timer_that_is_set_over_and_over(armed):
    for _ in range(1000):
        armed.timer.arm(FAR)
        armed.timer.arm(None)
    assert len(armed.starts) == 1


def test_closed_timer_is_never_due(armed):
    armed.timer.arm(FAR)
    armed.timer.close()
    armed.timer.arm(0)
    armed.timer.close()
    assert not armed.starts[0].is_alive()
    assert (armed.times, len(armed.starts)) == ([], 1)


def test_what_the_device_raises_is_reported(armed):
    """Nobody sees a thread of ours die in silence."""

    def fail():
        raise RuntimeError("a defect in a device")

    armed.timer.on_due = fail
    armed.timer.arm(0)
    with armed.came:
        assert armed.came.wait_for(lambda: armed.errors, LIMIT)
    assert str(armed.errors[0]) == "a defect in a device"

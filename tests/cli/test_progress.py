"""The progress bar: nothing where nobody looks or little is done, one line that fits, and gone at the end."""

import os
import pty
import select
from collections.abc import Callable, Iterator

import pytest

from kvmpy.cli import messages, progress
from kvmpy.cli.progress import ERASE, ProgressBar, duration, line
from kvmpy.units import GiB, MiB, TiB


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], str]]:
    """Standard error is a terminal; return a function that gives what has been shown since it was last asked."""
    master, slave = pty.openpty()
    for module in (messages, progress):
        monkeypatch.setattr(module, "STDERR", slave)

    def shown() -> str:
        data = b""
        while select.select([master], [], [], 0)[0]:
            data += os.read(master, 4096)
        return data.decode()

    yield shown
    os.close(slave)
    os.close(master)


def test_work_of_less_than_a_second_shows_nothing(screen: Callable[[], str], clock: Clock) -> None:
    with ProgressBar("importing", clock=clock) as bar:
        clock.now += 0.9
        bar(90, 100)
    assert screen() == ""


def test_longer_work_shows_how_far_it_is_how_fast_and_how_long_to_go(screen: Callable[[], str], clock: Clock) -> None:
    with ProgressBar("importing", clock=clock) as bar:
        clock.now += 2
        bar(256 * MiB, GiB)
        assert screen() == ERASE + "importing  [#####...............]   25% of 1 GiB  128.0 MiB/s  0:06 left"


def test_the_line_is_gone_at_the_end(screen: Callable[[], str], clock: Clock) -> None:
    with ProgressBar("importing", clock=clock) as bar:
        clock.now += 2
        bar(1, 2)
    assert screen().endswith("left" + ERASE)


def test_the_line_is_gone_when_the_work_fails(screen: Callable[[], str], clock: Clock) -> None:
    def fail() -> None:
        with ProgressBar("importing", clock=clock) as bar:
            clock.now += 2
            bar(1, 2)
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert screen().endswith(ERASE)


def test_it_is_drawn_at_most_ten_times_a_second(screen: Callable[[], str], clock: Clock) -> None:
    drawn = 0
    with ProgressBar("importing", clock=clock) as bar:
        clock.now += 1
        for _ in range(1000):
            clock.now += 0.001
            bar(1, 2)
            drawn += screen().count(ERASE)
    assert drawn in (10, 11)


def test_the_rate_is_that_of_the_recent_past(screen: Callable[[], str], clock: Clock) -> None:
    """A hole of a TiB that took no time must not promise that the rest takes none."""
    with ProgressBar("importing", clock=clock) as bar:
        bar(TiB, 2 * TiB)
        for second in range(100):
            clock.now += 1
            bar(TiB + second * MiB, 2 * TiB)
        assert "  1.0 MiB/s  " in screen().rsplit(ERASE)[-1]


def test_nothing_is_shown_where_standard_error_is_no_terminal(clock: Clock, capfd: pytest.CaptureFixture[str]) -> None:
    with ProgressBar("importing", clock=clock) as bar:
        clock.now += 10
        bar(1, 2)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("done", "total"), [(0, 0), (0, 1), (8 * TiB - 512, 8 * TiB), (3, 2)])
def test_the_line_fits_whatever_the_width(done: int, total: int) -> None:
    for columns in range(1, 120):
        for rate in (0.0, 1e-9, 1e12):
            assert len(line("importing", done, total, rate, columns)) <= columns


def test_a_usual_line_fits_into_80_columns_with_all_that_it_has() -> None:
    text = line("importing", TiB, 8 * TiB, 1234.5 * MiB, 79)
    assert text == "importing  [##..................]   12% of 8 TiB  1234.5 MiB/s  1:39:06 left"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (-1, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3661, "1:01:01")]
)
def test_durations_read_as_a_clock(seconds: float, text: str) -> None:
    assert duration(seconds) == text

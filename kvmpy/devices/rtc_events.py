"""When an MC146818 has something to say: its three events as arithmetic on the host's clock, without state.

::

    bit of register B (enable) and C (flag)    happens
    6  PERIODIC                                at each multiple of the rate that register A selects
    5  ALARM                                   when a second begins that reads as the three alarm bytes
    4  UPDATE                                  when any second begins

Nothing has to count while nobody looks: `happened` says what was between two looks, and `next_due` when to look again.
So a clock that interrupts nobody needs no timer.

Source: Motorola MC146818A datasheet, "Interrupts", "Periodic Interrupt Selection" (table 5), "Alarm Locations".
"""

from collections.abc import Sequence
from typing import NamedTuple

NANOSECONDS = 10**9
CRYSTAL_HZ = 32768
DAY, HOUR, MINUTE = 86400, 3600, 60

PERIODIC, ALARM, UPDATE = 1 << 6, 1 << 5, 1 << 4
EVENTS = PERIODIC | ALARM | UPDATE

SHORTEST_WAIT = CRYSTAL_HZ // 1024
"""In ticks of the crystal: periodic interrupts come at 1024 Hz at most, as to a handler too slow for the rate that it
has chosen. The flag itself follows the rate."""


def period(rate: int) -> int:
    """Return the periodic rate of register A, bits 3 to 0, as ticks of the crystal from one event to the next.

    0 is none; 1 and 2 are 256 and 128 Hz, as 8 and 9 are: with this crystal the divider has no place for more.
    """
    if rate == 0:
        return 0
    return 1 << (rate + 6 if rate < 3 else rate - 1)


def tick(ns: int) -> int:
    """Return how many ticks of the crystal have gone by at ``ns``."""
    return ns * CRYSTAL_HZ // NANOSECONDS


class Alarm(NamedTuple):
    """The hours, minutes and seconds that fit the alarm bytes, each ascending; none at all where a byte is no time."""

    hours: Sequence[int]
    minutes: Sequence[int]
    seconds: Sequence[int]

    def after(self, time: int) -> int | None:
        """Return how many seconds after second ``time`` of a day the next one is that fits: 1 to a whole day."""
        if not (self.hours and self.minutes and self.seconds):
            return None
        hour, minute, second = time // HOUR, time // MINUTE % 60, time % 60
        hour_fits, minute_fits = hour in self.hours, minute in self.minutes
        if hour_fits and minute_fits and (later := _above(second, self.seconds)) is not None:
            found = hour, minute, later
        elif hour_fits and (later := _above(minute, self.minutes)) is not None:
            found = hour, later, self.seconds[0]
        elif (later := _above(hour, self.hours)) is not None:
            found = later, self.minutes[0], self.seconds[0]
        else:
            found = self.hours[0], self.minutes[0], self.seconds[0]
        return (found[0] * HOUR + found[1] * MINUTE + found[2] - time - 1) % DAY + 1


def _above(value: int, values: Sequence[int]) -> int | None:
    return next((other for other in values if other > value), None)


class Events(NamedTuple):
    """What the registers say of events. Times are in nanoseconds of the host's clock."""

    period: int
    """In ticks of the crystal; 0: no periodic event."""
    alarm: Alarm
    runs: bool
    """Whether seconds begin at all: the guest is not setting the time."""
    ahead: int
    """Seconds by which the guest's time is ahead of the host's."""

    def happened(self, after_ns: int, until_ns: int) -> int:
        """Return the bits of what has happened after one time until another, which may be before it: then nothing."""
        if until_ns <= after_ns:
            return 0
        events = 0
        if self.period and tick(after_ns) // self.period != tick(until_ns) // self.period:
            events |= PERIODIC
        first, last = after_ns // NANOSECONDS, until_ns // NANOSECONDS
        if self.runs and first != last:
            alarm = self._alarm_after(first)
            events |= UPDATE | (ALARM if alarm is not None and alarm <= last else 0)
        return events

    def next_due(self, events: int, after_ns: int) -> int | None:
        """Return when the first of ``events`` shall interrupt after ``after_ns``; None: never."""
        second = after_ns // NANOSECONDS
        due = []
        if events & PERIODIC and self.period:
            wait = max(self.period, SHORTEST_WAIT)
            ticks = (tick(after_ns) // wait + 1) * wait
            due.append(-(-ticks * NANOSECONDS // CRYSTAL_HZ))
        if events & UPDATE and self.runs:
            due.append((second + 1) * NANOSECONDS)
        if events & ALARM and self.runs and (alarm := self._alarm_after(second)) is not None:
            due.append(alarm * NANOSECONDS)
        return min(due, default=None)

    def _alarm_after(self, second: int) -> int | None:
        wait = self.alarm.after((second + self.ahead) % DAY)
        return None if wait is None else second + wait

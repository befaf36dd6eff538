"""When the clock has something to say, against a clock that counts every tick and every second."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmpy.devices.rtc_events import (
    ALARM,
    CRYSTAL_HZ,
    DAY,
    EVENTS,
    NANOSECONDS,
    PERIODIC,
    SHORTEST_WAIT,
    UPDATE,
    Alarm,
    Events,
    period,
    tick,
)

NOBODY = Alarm((), (), ())
NOON = 12 * 3600


def fields(count):
    """Any one value, any value at all, or none that fits."""
    return st.integers(0, count - 1).map(lambda value: [value]) | st.just(list(range(count))) | st.just([])


alarms = st.builds(Alarm, fields(24), fields(60), fields(60))


@pytest.mark.parametrize(
    ("rate", "hz"),
    list(enumerate([256, 128, 8192, 4096, 2048, 1024, 512, 256, 128, 64, 32, 16, 8, 4, 2], 1)),
)
def test_periodic_rates(rate, hz):
    """MC146818A table 5, with a crystal of 32.768 kHz."""
    assert period(rate) * hz == CRYSTAL_HZ


def test_rate_0_is_none():
    assert period(0) == 0
    never = Events(0, NOBODY, True, 0)
    assert never.happened(0, 10 * NANOSECONDS) & PERIODIC == 0
    assert never.next_due(PERIODIC, 0) is None


@settings(deadline=None)
@given(alarms, st.integers(0, DAY - 1))
def test_alarm_is_the_first_second_that_fits(alarm, time):
    """Compared with looking at every second of a day and one more."""
    wait = alarm.after(time)
    fitting = (
        seconds
        for seconds in range(1, DAY + 1)
        if (at := (time + seconds) % DAY) // 3600 in alarm.hours
        and at // 60 % 60 in alarm.minutes
        and at % 60 in alarm.seconds
    )
    assert wait == (next(fitting, None) if all(alarm) else None)


def test_alarm_of_this_second_is_a_day_away():
    """MC146818A, "Alarm": it interrupts when the time becomes the alarm's, not while it is."""
    assert Alarm([12], [0], [0]).after(NOON) == DAY


@settings(deadline=None)
@given(
    st.sampled_from([0, *(period(rate) for rate in range(1, 16))]),
    alarms,
    st.booleans(),
    st.integers(-DAY, DAY),
    st.integers(0, 3 * NANOSECONDS),
    st.integers(0, 3 * NANOSECONDS),
)
def test_what_happened_is_what_a_clock_that_counts_has_seen(ticks, alarm, runs, ahead, after, ns):
    """Every tick of the crystal, and every second, between the two times."""
    events, until = Events(ticks, alarm, runs, ahead), after + ns
    seen = 0
    if ticks and any(count % ticks == 0 for count in range(tick(after) + 1, tick(until) + 1)):
        seen |= PERIODIC
    for second in range(after // NANOSECONDS + 1, until // NANOSECONDS + 1):
        time = (second + ahead) % DAY
        fits = time // 3600 in alarm.hours and time // 60 % 60 in alarm.minutes and time % 60 in alarm.seconds
        if runs:
            seen |= UPDATE | (ALARM if fits else 0)
    assert events.happened(after, until) == seen


@settings(deadline=None)
@given(
    st.sampled_from([0, *(period(rate) for rate in range(1, 16))]),
    alarms,
    st.booleans(),
    st.integers(-DAY, DAY),
    st.sampled_from([PERIODIC, ALARM, UPDATE, EVENTS, ALARM | UPDATE]),
    st.integers(0, 10**19),
)
def test_at_the_time_due_it_has_just_happened(ticks, alarm, runs, ahead, wanted, now):
    """Not a nanosecond before, but for a rate that is bounded."""
    events = Events(ticks, alarm, runs, ahead)
    due = events.next_due(wanted, now)
    if due is None:
        assert not events.happened(now, now + 2 * DAY * NANOSECONDS) & wanted
        return
    assert due > now
    assert events.happened(now, due) & wanted
    if ticks >= SHORTEST_WAIT or not wanted & PERIODIC:
        assert not events.happened(now, due - 1) & wanted


@pytest.mark.parametrize("rate", range(3, 7))
def test_interrupts_come_at_1024_hz_at_most(rate):
    """The flag follows the rate, up to 8192 Hz; the host is not woken for each."""
    events, now, looks = Events(period(rate), NOBODY, True, 0), 0, 0
    while now < NANOSECONDS:
        due = events.next_due(PERIODIC, now)
        assert due is not None
        now, looks = due, looks + 1
    assert looks == 1024


def test_host_clock_that_is_set_back_makes_nothing_happen():
    events = Events(period(6), Alarm(range(24), range(60), range(60)), True, 0)
    assert events.happened(10 * NANOSECONDS, 5 * NANOSECONDS) == 0

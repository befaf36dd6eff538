"""The clock's interrupts, as a driver meets them: enable, pin, register C; and what they cost the host."""

import calendar
import random

import pytest
from rtc_bench import AIE, BINARY, HOURS_24, NANOSECONDS, PIE, SET, UIE, A, B, C, RtcBench

IRQF, PF, AF, UF = 0x80, 0x40, 0x20, 0x10
SECONDS_ALARM, MINUTES_ALARM, HOURS_ALARM = 1, 3, 5
START = calendar.timegm((2024, 2, 29, 22, 59, 58))
MS = NANOSECONDS // 1000
LONGEST_SLEEP = 60 * NANOSECONDS


@pytest.fixture
def rtc():
    return RtcBench(START * NANOSECONDS)


def set_alarm(rtc, hour, minute, second, b=HOURS_24 | AIE):
    for register, value in ((HOURS_ALARM, hour), (MINUTES_ALARM, minute), (SECONDS_ALARM, second)):
        rtc.put(register, value)
    rtc.put(B, b)


# --- one interrupt ----------------------------------------------------------------------------------------------


def test_periodic_interrupt_comes_at_the_rate_of_register_a(rtc):
    """MC146818A register A, RS: the default of a PC, 6, is 976.5625 us."""
    rtc.put(B, HOURS_24 | PIE)
    assert rtc.sleep_until_interrupt() == pytest.approx(976_563, abs=1)
    assert rtc.get(C) == IRQF | PF
    rtc.put(A, 0x2F)
    assert rtc.sleep_until_interrupt() == pytest.approx(500 * MS - 976_563, abs=2)


def test_update_interrupt_comes_when_a_second_begins(rtc):
    rtc.now_ns += 300 * MS
    rtc.put(B, HOURS_24 | UIE)
    assert rtc.sleep_until_interrupt() == 700 * MS
    assert rtc.get(C) & (IRQF | UF) == IRQF | UF
    assert rtc.get(0) == 0x59


@pytest.mark.parametrize("b", [HOURS_24, HOURS_24 | BINARY, 0, BINARY])
def test_alarm_interrupts_at_its_time_in_every_format(rtc, b):
    """MC146818A: the alarm bytes are compared with the time bytes, as they stand."""
    hour = {HOURS_24: 0x23, HOURS_24 | BINARY: 23, 0: 0x91, BINARY: 0x8B}[b]
    set_alarm(rtc, hour, 0, 1, b | AIE)
    assert rtc.sleep_until_interrupt() == 3 * NANOSECONDS
    assert rtc.get(C) & (IRQF | AF) == IRQF | AF
    rtc.now_ns += 4 * NANOSECONDS
    assert rtc.get(C) & AF == 0


@pytest.mark.parametrize(
    ("alarm", "seconds"),
    [((0xFF, 0xFF, 0xFF), 1), ((0xFF, 0xFF, 0x00), 2), ((0xFF, 0x00, 0x30), 32), ((0xC0, 0x58, 0x00), 3482)],
)
def test_alarm_bytes_with_two_high_bits_fit_all(rtc, alarm, seconds):
    """MC146818A: "don't care" codes, any byte from C0 to FF: every hour, minute or second."""
    set_alarm(rtc, *alarm)
    assert rtc.sleep_until_interrupt() == seconds * NANOSECONDS


@pytest.mark.parametrize("alarm", [(0x24, 0, 0), (0x23, 0x60, 0), (0x23, 0, 0x3A), (0xBF, 0xFF, 0xFF)])
def test_alarm_at_no_time_never_comes(rtc, alarm):
    set_alarm(rtc, *alarm)
    assert rtc.sleep() is None
    rtc.now_ns += 2 * 86400 * NANOSECONDS
    assert rtc.get(C) & AF == 0


def test_alarm_is_of_the_time_that_the_guest_has_set(rtc):
    rtc.put(4, 0x07)
    set_alarm(rtc, 0x08, 0x00, 0x00)
    assert rtc.sleep_until_interrupt() == 2 * NANOSECONDS


# --- flags and pin ----------------------------------------------------------------------------------------------


def test_flags_are_set_without_being_enabled(rtc):
    """MC146818A register C: PF, AF and UF do not depend on the enable bits; IRQF does."""
    set_alarm(rtc, 0x22, 0x59, 0x59, HOURS_24)
    assert rtc.get(C) == 0
    rtc.now_ns += NANOSECONDS
    assert rtc.get(C) == PF | AF | UF
    assert rtc.get(C) == 0
    assert (rtc.pin, rtc.timer.armed) == ([], 0)


def test_pin_is_high_until_register_c_is_read(rtc):
    """MC146818A register C: reading it clears all flags and IRQF, and so the pin."""
    rtc.put(B, HOURS_24 | UIE)
    rtc.sleep_until_interrupt()
    assert rtc.pin == [True]
    rtc.get(B, 0, 0xD)
    assert rtc.pin == [True]
    rtc.get(C)
    assert rtc.pin == [True, False]


def test_flag_that_waits_interrupts_when_it_is_enabled(rtc):
    rtc.now_ns += NANOSECONDS
    rtc.put(B, HOURS_24 | UIE)
    assert rtc.pin == [True]
    rtc.put(B, HOURS_24)
    assert rtc.pin == [True, False]
    assert rtc.get(C) & UF


def test_setting_the_time_stops_alarm_and_update_and_clears_uie(rtc):
    """MC146818A register B: SET stops the update cycle, and going high it clears UIE. The divider goes on."""
    set_alarm(rtc, 0xFF, 0xFF, 0xFF, HOURS_24 | AIE | UIE)
    rtc.put(B, HOURS_24 | SET | AIE | UIE)
    assert rtc.get(B) == HOURS_24 | SET | AIE
    assert rtc.sleep() is None
    rtc.now_ns += 5 * NANOSECONDS
    assert rtc.get(C) == PF
    rtc.put(B, HOURS_24 | AIE)
    assert rtc.sleep_until_interrupt() == NANOSECONDS


def test_flags_cannot_be_written(rtc):
    rtc.put(B, HOURS_24 | PIE)
    rtc.put(C, 0xFF)
    assert (rtc.get(C), rtc.pin) == (0, [])


# --- what it costs the host -------------------------------------------------------------------------------------


def test_clock_that_interrupts_nobody_needs_no_timer(rtc):
    for register in range(64):
        rtc.get(register)
    rtc.put(A, 0x23)
    assert rtc.timer.armed == 0


def test_guest_that_does_not_read_c_costs_nothing(rtc):
    """The pin is high: nothing can happen that anybody would see."""
    rtc.put(A, 0x23)
    rtc.put(B, HOURS_24 | PIE | UIE | AIE)
    rtc.sleep_until_interrupt()
    assert rtc.sleep() is None


def test_fastest_rate_wakes_the_host_1024_times_a_second(rtc):
    """With 8192 Hz chosen, and a guest that reads C at once."""
    rtc.put(A, 0x23)
    rtc.put(B, HOURS_24 | PIE)
    interrupts = 0
    while rtc.now_ns < (START + 1) * NANOSECONDS:
        rtc.sleep_until_interrupt()
        rtc.get(C)
        interrupts += 1
    assert interrupts == 1024


def test_flag_follows_the_rate_that_the_guest_has_chosen(rtc):
    """Who polls sees 8192 Hz."""
    rtc.put(A, 0x23)
    seen = 0
    for _ in range(10_000):
        rtc.now_ns += NANOSECONDS // 10_000
        seen += bool(rtc.get(C) & PF)
    assert seen == 8192


def test_timer_that_is_early_comes_again_a_little_later(rtc):
    """The host's two clocks differ: no busy loop until the time has come."""
    rtc.put(B, HOURS_24 | UIE)
    rtc.now_ns += NANOSECONDS - 1
    rtc.timer.on_due()
    assert rtc.pin == []
    assert rtc.timer.delay_ns >= 50_000
    rtc.sleep_until_interrupt()


def test_alarm_far_away_is_looked_for_every_minute(rtc):
    """The host's clock may be set meanwhile, and the timer would not know."""
    set_alarm(rtc, 0x21, 0x00, 0x00)
    assert rtc.sleep() == LONGEST_SLEEP
    rtc.now_ns += 22 * 3600 * NANOSECONDS
    rtc.sleep()
    assert rtc.pin == [True]


def test_host_clock_that_is_set_back_does_not_stop_the_interrupts(rtc):
    rtc.put(B, HOURS_24 | UIE)
    rtc.sleep_until_interrupt()
    rtc.now_ns -= 3600 * NANOSECONDS
    rtc.get(C)
    assert rtc.sleep_until_interrupt() <= 2 * NANOSECONDS


def test_no_sequence_of_writes_makes_the_timer_spin(rtc):
    """Any registers, any values, at any pace: each wake-up is at least 50 us behind the one before."""
    rng = random.Random(146818)
    for _ in range(20_000):
        rtc.put(rng.choice([0, 1, 3, 4, 5, A, A, B, B, B, C, 0x32]), rng.randrange(256))
        if rng.randrange(4) == 0:
            rtc.get(C)
        if rng.randrange(3) == 0 and (slept := rtc.sleep()) is not None:
            assert slept >= 50_000


def test_pin_changes_each_time_that_it_is_driven(rtc):
    """An interrupt line is told of changes only, whatever a guest does."""
    rng = random.Random(6818)
    for _ in range(5_000):
        rtc.put(rng.choice([A, B, C]), rng.randrange(256))
        rtc.now_ns += rng.randrange(NANOSECONDS)
        if rng.randrange(2):
            rtc.get(C)
        rtc.sleep()
    assert len(rtc.pin) > 100
    assert all(level == (at % 2 == 0) for at, level in enumerate(rtc.pin))

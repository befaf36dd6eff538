"""The MC146818: time, formats, and the memory sizes."""

import calendar
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rtc_bench import BINARY, HOURS_24, NANOSECONDS, SET, A, B, C, D, RtcBench

from kvmpy.devices.rtc import UPDATE_NS, days_since_1970
from kvmpy.units import GiB, KiB, MiB, TiB

NOON = calendar.timegm((2024, 2, 29, 13, 5, 59))
SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY = 0, 2, 4, 6, 7, 8, 9, 0x32
UPDATE_TIME = UPDATE_NS / NANOSECONDS


@pytest.fixture
def rtc():
    return RtcBench(NOON * NANOSECONDS)


def number(rtc, *registers):
    return int.from_bytes(bytes(rtc.get(*registers)), "little")


def test_time_is_bcd_and_24_hours_at_first(rtc):
    """MC146818 register B: DM 0 is BCD, 24/12 1 is 24 hours: as a PC's firmware leaves it."""
    assert rtc.get(B) == HOURS_24
    assert rtc.get(HOURS, MINUTES, SECONDS) == [0x13, 0x05, 0x59]
    assert rtc.get(CENTURY, YEAR, MONTH, DAY) == [0x20, 0x24, 0x02, 0x29]
    assert rtc.get(WEEKDAY) == 5  # Thursday; 1 is Sunday


def test_time_in_binary(rtc):
    """MC146818 register B: DM 1 is binary."""
    rtc.put(B, HOURS_24 | BINARY)
    assert rtc.get(HOURS, MINUTES, SECONDS, YEAR, CENTURY) == [13, 5, 59, 24, 20]


@pytest.mark.parametrize(("hour", "bcd"), [(0, 0x12), (1, 0x01), (11, 0x11), (12, 0x92), (13, 0x81), (23, 0x91)])
def test_twelve_hours_have_pm_in_bit_7(rtc, hour, bcd):
    """MC146818: "the high-order bit of the hours byte represents PM when it is a 1"; midnight is 12."""
    rtc.put(B, 0)
    rtc.now = calendar.timegm((2024, 1, 1, hour, 0, 0))
    assert rtc.get(HOURS) == bcd


def test_clock_runs(rtc):
    """One second later it is one second later, across a minute, an hour and a leap day."""
    rtc.now += 1
    assert rtc.get(MINUTES, SECONDS) == [0x06, 0x00]
    rtc.now += 12 * 3600
    assert rtc.get(MONTH, DAY) == [0x03, 0x01]


def test_update_in_progress_warns_before_a_second_turns(rtc):
    """MC146818 register A: while UIP is 0, the time does not change for at least 244 us."""
    rtc.now = NOON + 1 - UPDATE_TIME - 0.001
    assert rtc.get(A) == 0x26
    before = rtc.get(SECONDS)
    rtc.now += 0.000244
    assert rtc.get(SECONDS) == before
    rtc.now = NOON + 1 - UPDATE_TIME / 2
    assert rtc.get(A) == 0xA6
    rtc.now = NOON + 1
    assert rtc.get(A) == 0x26


def test_setting_the_time_moves_the_guests_clock_only(rtc):
    """MC146818 register B: with SET the update stops; the time written goes on from where SET is cleared."""
    rtc.put(B, SET | HOURS_24)
    for register, value in ((SECONDS, 0x58), (MINUTES, 0x59), (HOURS, 0x23), (DAY, 0x31), (MONTH, 0x12), (YEAR, 0x99)):
        rtc.put(register, value)
    rtc.put(CENTURY, 0x19)
    rtc.now += 100
    assert rtc.get(A) & 0x80 == 0
    assert rtc.get(MINUTES, SECONDS) == [0x59, 0x58]
    rtc.put(B, HOURS_24)
    assert rtc.get(CENTURY, YEAR, MONTH, DAY, HOURS, MINUTES, SECONDS) == [0x19, 0x99, 0x12, 0x31, 0x23, 0x59, 0x58]
    rtc.now += 2
    assert rtc.get(CENTURY, YEAR, MONTH, DAY, HOURS, MINUTES, SECONDS) == [0x20, 0x00, 1, 1, 0, 0, 0]


def test_clock_stands_while_set(rtc):
    """MC146818 register B: SET stops the updates, and clears UIP."""
    rtc.put(B, SET | HOURS_24)
    rtc.now += 1 - UPDATE_TIME / 2
    assert rtc.get(A) == 0x26
    rtc.now += 3600
    assert rtc.get(HOURS, MINUTES, SECONDS) == [0x13, 0x05, 0x59]


def test_impossible_dates_are_days_and_months_further_on(rtc):
    """The chip checks nothing; neither do we, and each register still reads as a byte."""
    rtc.put(B, HOURS_24 | BINARY | SET)
    for register in (SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY):
        rtc.put(register, 0xFF)
    rtc.put(B, HOURS_24 | BINARY)
    century, year, month, day = rtc.get(CENTURY, YEAR, MONTH, DAY)
    assert century < 100
    assert year < 100
    assert 1 <= month <= 12
    assert 1 <= day <= 31


def test_setting_one_register_without_set(rtc):
    """A write without SET takes effect at once and leaves the other registers."""
    rtc.put(HOURS, 0x20)
    assert rtc.get(HOURS, MINUTES, SECONDS) == [0x20, 0x05, 0x59]
    rtc.now += 1
    assert rtc.get(HOURS, MINUTES, SECONDS) == [0x20, 0x06, 0x00]


def test_setting_in_twelve_hours(rtc):
    """12 PM is noon, 12 AM is midnight."""
    rtc.put(B, 0)
    rtc.put(HOURS, 0x92)
    rtc.put(B, HOURS_24)
    assert rtc.get(HOURS) == 0x12
    rtc.put(B, 0)
    rtc.put(HOURS, 0x12)
    rtc.put(B, HOURS_24)
    assert rtc.get(HOURS) == 0x00


def test_register_d_says_valid_and_c_that_nothing_happened(rtc):
    """MC146818: VRT 1, the memory kept its power; no interrupt flags. Both are read-only."""
    rtc.put(D, 0)
    rtc.put(C, 0xFF)
    assert rtc.get(D, C) == [0x80, 0]


def test_alarms_and_memory_are_stored(rtc):
    """Alarm bytes and the general bytes keep what was written."""
    for register, value in ((1, 0xC0), (3, 0x30), (5, 0x07), (0x0F, 0x0A), (0x7F, 0x55)):
        rtc.put(register, value)
        assert rtc.get(register) == value


def test_16_bit_out_brings_index_and_data(rtc):
    """An OUT of AX to 0x70 writes AL to the index and AH to the data port."""
    rtc.cmos.write(0, b"\x0f\x42")
    assert rtc.get(0x0F) == 0x42


def test_nmi_mask_is_not_part_of_the_index(rtc):
    """Bit 7 of port 0x70 masks NMI."""
    assert rtc.get(0x80 | D) == 0x80


def test_index_port_cannot_be_read(rtc):
    """Port 0x70 is write-only: all ones."""
    assert rtc.cmos.read(0, 1) == b"\xff"


@pytest.mark.parametrize(
    ("size", "above_1m", "above_16m", "above_4g"),
    [
        (1 * MiB, 0, 0, 0),
        (2 * MiB, 1024, 0, 0),
        (128 * MiB, 65535, 112 * 16, 0),
        (3 * GiB, 65535, (3 * GiB - 16 * MiB) // (64 * KiB), 0),
        (3 * GiB + 512 * MiB, 65535, (3 * GiB - 16 * MiB) // (64 * KiB), 512 * 16),
        (2 * TiB, 65535, (3 * GiB - 16 * MiB) // (64 * KiB), 0xFFFFFF),
    ],
)
def test_memory_sizes(size, above_1m, above_16m, above_4g):
    """640 KiB; KiB above 1 MiB, twice; 64 KiB units up to the hole, and above 4 GiB."""
    rtc = RtcBench(0, size)
    assert number(rtc, 0x15, 0x16) == 640
    assert number(rtc, 0x17, 0x18) == above_1m
    assert number(rtc, 0x30, 0x31) == above_1m
    assert number(rtc, 0x34, 0x35) == above_16m
    assert number(rtc, 0x5B, 0x5C, 0x5D) == above_4g


@given(st.integers(-60_000_000_000, 250_000_000_000))
def test_days_since_1970_is_the_inverse_of_gmtime(seconds):
    """Gregorian, in both directions from 1970."""
    t = time.gmtime(seconds)
    assert days_since_1970(t.tm_year, t.tm_mon, t.tm_mday) == seconds // 86400


def test_months_outside_the_year_count_on():
    """Month 0 is the December before, month 13 the January after."""
    assert days_since_1970(2024, 0, 1) == days_since_1970(2023, 12, 1)
    assert days_since_1970(2024, 13, 1) == days_since_1970(2025, 1, 1)


@settings(deadline=None)
@given(
    st.integers(0, 4_000_000_000),
    st.sampled_from([0, BINARY, HOURS_24, BINARY | HOURS_24]),
    st.integers(0, 4_000_000_000),
)
def test_a_time_that_is_set_is_the_time_that_is_read(then, formats, now):
    """In all four formats, any time of a valid calendar survives being set and read."""
    source, target = RtcBench(then * NANOSECONDS), RtcBench(now * NANOSECONDS)
    registers = (SECONDS, MINUTES, HOURS, DAY, MONTH, YEAR, CENTURY)
    source.put(B, formats)
    target.put(B, SET | formats)
    for register in registers:
        target.put(register, source.get(register))
    target.put(B, formats)
    assert target.get(*registers, WEEKDAY) == source.get(*registers, WEEKDAY)

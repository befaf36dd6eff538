"""The clock and the 128 bytes of CMOS memory of a PC: an MC146818 behind two ports.

::

    0x70  w: index of a register (bit 7 masks NMI: ignored)   r: all ones
    0x71  the register

    0x00 seconds    0x04 hours       0x08 month     0x0a register A: UIP, rate     0x15/16 KiB of base memory
    0x02 minutes    0x06 day of week 0x09 year      0x0b register B: SET, formats  0x17/18, 0x30/31 KiB above 1 MiB
    0x01, 0x03, 0x05 alarm           0x32 century   0x0c register C: 0             0x34/35 64 KiB above 16 MiB
    0x07 day of month                               0x0d register D: power good    0x5b-5d 64 KiB above 4 GiB

The time is UTC. A guest that sets it moves its own clock, not the host's. The day of the week follows from the date.
Not here: interrupts (alarms are stored and never ring).

Source: Motorola MC146818A datasheet, "Time, Calendar, and Alarm Locations" and "Register A" to "D".
"""

import time
from collections.abc import Callable

from kvmpy.machine import layout
from kvmpy.units import KiB, MiB

CMOS_PORT = 0x70
CMOS_SIZE = 2

SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY = 0x00, 0x02, 0x04, 0x06, 0x07, 0x08, 0x09, 0x32
TIME = (SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY)
A, B, C, D = 0x0A, 0x0B, 0x0C, 0x0D

UPDATE_IN_PROGRESS = 1 << 7  # A
RATE = 0x26  # A: 32768 Hz crystal, 1024 Hz periodic rate, as a PC's firmware leaves it
SET = 1 << 7  # B: the guest is setting the time; the clock stands
BINARY = 1 << 2  # B: else BCD
HOURS_24 = 1 << 1  # B: else 1 to 12 with PM in bit 7
VALID = 1 << 7  # D
PM = 1 << 7

UPDATE_TIME = 0.000244 + 0.001984
"""Seconds before each new second in which UIP is set (table "Update Cycle Times": t_BUC + t_UC)."""

EXTENDED_FROM = 16 * MiB
UNIT = 64 * KiB


class Cmos:
    """The two ports 0x70 and 0x71. ``now`` is the host's clock in seconds since 1970, with its fraction."""

    def __init__(self, memory_size: int, now: Callable[[], float] = time.time) -> None:
        """Start with the host's time, and with the sizes of a machine with ``memory_size`` bytes of RAM."""
        self._now = now
        self._ahead = 0  # seconds
        self._index = 0
        self._bytes = bytearray(128)
        self._bytes[A] = RATE
        self._bytes[B] = HOURS_24
        self._bytes[D] = VALID
        self._describe(memory_size)

    def _describe(self, memory_size: int) -> None:
        low, *high = (size for _, size in layout.ram_ranges(memory_size))
        above_1m = min(max(low - MiB, 0) // KiB, 0xFFFF)
        above_16m = min(max(low - EXTENDED_FROM, 0) // UNIT, 0xFFFF)
        above_4g = min(sum(high) // UNIT, 0xFFFFFF)
        for at, size, value in (
            (0x15, 2, 640),
            (0x17, 2, above_1m),
            (0x30, 2, above_1m),
            (0x34, 2, above_16m),
            (0x5B, 3, above_4g),
        ):
            self._bytes[at : at + size] = value.to_bytes(size, "little")

    def read(self, offset: int, size: int) -> bytes:
        """Return the register that the index names; the index port itself cannot be read."""
        return bytes(self._read_register(self._index) if (offset + i) % CMOS_SIZE else 0xFF for i in range(size))

    def write(self, offset: int, data: bytes) -> None:
        """Take an index, or a register's value. A 16-bit OUT to 0x70 brings both."""
        for at, byte in enumerate(data, offset):
            if at % CMOS_SIZE:
                self._write_register(self._index, byte)
            else:
                self._index = byte & 0x7F

    def _read_register(self, register: int) -> int:
        if register == A:
            return self._bytes[A] | (UPDATE_IN_PROGRESS if self._updating() else 0)
        if register in TIME and not self._bytes[B] & SET:
            return self._clock()[register]
        return self._bytes[register]

    def _write_register(self, register: int, value: int) -> None:
        if register in (C, D):
            return
        if register in TIME:
            if not self._bytes[B] & SET:
                self._latch()
            self._bytes[register] = value
            if not self._bytes[B] & SET:
                self._adopt()
        elif register == A:
            self._bytes[A] = value & ~UPDATE_IN_PROGRESS
        elif register == B:
            before = self._bytes[B]
            if value & ~before & SET:
                self._latch()
            self._bytes[B] = value
            if before & ~value & SET:
                self._adopt()
        else:
            self._bytes[register] = value

    def _updating(self) -> bool:
        return not self._bytes[B] & SET and self._now() % 1 >= 1 - UPDATE_TIME

    def _latch(self) -> None:
        """Stop the clock: the bytes hold the time from here."""
        for register, value in self._clock().items():
            self._bytes[register] = value

    def _clock(self) -> dict[int, int]:
        """Return the time registers as the guest reads them, in the formats that register B says."""
        now = time.gmtime(int(self._now()) + self._ahead)
        hour, pm = now.tm_hour, 0
        if not self._bytes[B] & HOURS_24:
            hour, pm = (hour - 1) % 12 + 1, PM if hour >= 12 else 0
        fields = {
            SECONDS: now.tm_sec,
            MINUTES: now.tm_min,
            HOURS: hour,
            WEEKDAY: (now.tm_wday + 1) % 7 + 1,  # 1 is Sunday
            DAY: now.tm_mday,
            MONTH: now.tm_mon,
            YEAR: now.tm_year % 100,
            CENTURY: now.tm_year // 100 % 100,
        }
        if not self._bytes[B] & BINARY:
            fields = {register: value // 10 << 4 | value % 10 for register, value in fields.items()}
        fields[HOURS] |= pm
        return fields

    def _adopt(self) -> None:
        """Start the clock from the time in the bytes. What is no date is taken as so many days, hours or seconds."""
        hour, pm = self._bytes[HOURS], 0
        if not self._bytes[B] & HOURS_24:
            pm = 12 if hour & PM else 0
            hour &= ~PM
        hour = self._decode(hour)
        if not self._bytes[B] & HOURS_24:
            hour = hour % 12 + pm
        second, minute, day, month, year, century = (
            self._decode(self._bytes[register]) for register in (SECONDS, MINUTES, DAY, MONTH, YEAR, CENTURY)
        )
        days = days_since_1970(100 * century + year, month, day)
        self._ahead = ((days * 24 + hour) * 60 + minute) * 60 + second - int(self._now())

    def _decode(self, byte: int) -> int:
        return byte if self._bytes[B] & BINARY else (byte >> 4) * 10 + (byte & 0xF)


def days_since_1970(year: int, month: int, day: int) -> int:
    """Return the days from 1 January 1970 to a Gregorian date; ``month`` 0 is the December before, ``day`` any number.

    `time` has no inverse of gmtime, and `calendar` costs the start of each run more than these lines.
    """
    # Years that begin in March have their odd day last, and their months repeat 31, 30, 31, 30, 31: 153 days in five.
    year, month = (year, month - 3) if month > 2 else (year - 1, month + 9)
    return 365 * year + year // 4 - year // 100 + year // 400 + (153 * month + 2) // 5 + day - 719469

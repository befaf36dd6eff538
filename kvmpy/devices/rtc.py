"""The clock and the 128 bytes of CMOS memory of a PC: an MC146818 behind two ports.

::

    0x70  w: index of a register (bit 7 masks NMI: ignored)   r: all ones
    0x71  the register

    0x00 seconds    0x04 hours       0x08 month     0x0a register A: UIP, rate       0x15/16 KiB of base memory
    0x02 minutes    0x06 day of week 0x09 year      0x0b register B: SET, enables,   0x17/18, 0x30/31 KiB above 1 MiB
    0x01, 0x03, 0x05 alarm           0x32 century                    formats         0x34/35 64 KiB above 16 MiB
    0x07 day of month                               0x0c register C: events          0x5b-5d 64 KiB above 4 GiB
                                                    0x0d register D: power good

    interrupt (IRQ 8)  ____/''''''''\\____   high while C has an event that B enables; reading C clears it

The time is UTC. A guest that sets it moves its own clock, not the host's. The day of the week follows from the date.
The divider bits of register A are stored: the crystal always runs.

What is due when is arithmetic (`kvmpy.devices.rtc_events`): events are found out at the next look, and only a clock
that interrupts has a timer. While the pin is high there is nothing to wait for; so a guest that does not read C costs
nothing, and one that does is interrupted 1024 times a second at most.

Source: Motorola MC146818A datasheet, "Time, Calendar, and Alarm Locations", "Interrupts" and "Register A" to "D".
"""

import time
from collections.abc import Callable
from threading import Lock

from kvmpy.devices.host_timer import Timer
from kvmpy.devices.rtc_events import EVENTS, NANOSECONDS, UPDATE, Alarm, Events, period
from kvmpy.machine import layout
from kvmpy.machine.bus import InterruptLine
from kvmpy.units import KiB, MiB

CMOS_SIZE = 2

SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR = 0x00, 0x02, 0x04, 0x06, 0x07, 0x08, 0x09
CENTURY = layout.CMOS_CENTURY
TIME = (SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY)
SECONDS_ALARM, MINUTES_ALARM, HOURS_ALARM = 0x01, 0x03, 0x05
ANY = 0xC0
"""An alarm byte with both of these bits fits each hour, minute or second."""
A, B, C, D = 0x0A, 0x0B, 0x0C, 0x0D

UPDATE_IN_PROGRESS = 1 << 7  # A
RATE = 0x26  # A: 32768 Hz crystal, 1024 Hz periodic rate, as a PC's firmware leaves it
RATE_BITS = 0x0F
SET = 1 << 7  # B: the guest is setting the time; the clock stands
BINARY = 1 << 2  # B: else BCD
HOURS_24 = 1 << 1  # B: else 1 to 12 with PM in bit 7
INTERRUPTS = 1 << 7  # C: one of the others is enabled
VALID = 1 << 7  # D
PM = 1 << 7

UPDATE_NS = 244_000 + 1_984_000
"""Before each new second, while UIP is set (table "Update Cycle Times": t_BUC + t_UC)."""
SHORTEST_DELAY_NS, LONGEST_DELAY_NS = 50_000, 60 * NANOSECONDS
"""Of the timer. The host's clock is not the timer's: it may be a little behind, or be set."""

EXTENDED_FROM = 16 * MiB
UNIT = 64 * KiB


class Cmos:
    """The two ports 0x70 and 0x71; for any thread.

    ``interrupt`` is called on changes of the pin only. ``now_ns`` is the host's clock, in nanoseconds since 1970.
    """

    def __init__(
        self,
        memory_size: int,
        interrupt: InterruptLine,
        timer: Timer,
        *,
        now_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        """Start with the host's time, and with the sizes of a machine with ``memory_size`` bytes of RAM."""
        self._interrupt, self._timer, self._now_ns = interrupt, timer, now_ns
        self._lock = Lock()
        self._ahead = 0  # seconds
        self._index = 0
        self._bytes = bytearray(128)
        self._bytes[A] = RATE
        self._bytes[B] = HOURS_24
        self._bytes[D] = VALID
        self._describe(memory_size)
        self._looked_ns = now_ns()
        self._events: Events | None = None  # what the registers say; made anew behind a write
        self._raised = False
        self._due_ns: int | None = None
        timer.on_due = self._on_due

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
        with self._lock:
            self._look()
            data = bytes(self._read_register(self._index) if (offset + i) % CMOS_SIZE else 0xFF for i in range(size))
            self._settle()
        return data

    def write(self, offset: int, data: bytes) -> None:
        """Take an index, or a register's value. A 16-bit OUT to 0x70 brings both."""
        with self._lock:
            self._look()
            for at, byte in enumerate(data, offset):
                if at % CMOS_SIZE:
                    self._write_register(self._index, byte)
                    self._events = None
                else:
                    self._index = byte & 0x7F
            self._settle()

    def _read_register(self, register: int) -> int:
        if register == A:
            return self._bytes[A] | (UPDATE_IN_PROGRESS if self._updating() else 0)
        if register == C:
            flags, self._bytes[C] = self._bytes[C], 0
            return flags | (INTERRUPTS if flags & self._bytes[B] else 0)
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
            self._write_b(value)
        else:
            self._bytes[register] = value

    def _write_b(self, value: int) -> None:
        before = self._bytes[B]
        if value & ~before & SET:
            self._latch()
            value &= ~UPDATE  # "the SET bit going high clears the UIE bit" (register B)
        self._bytes[B] = value
        if before & ~value & SET:
            self._adopt()

    # --- interrupts ---------------------------------------------------------------------------------------------

    def _on_due(self) -> None:
        with self._lock:
            self._due_ns = None
            self._look()
            self._settle()

    def _look(self) -> None:
        """Find out what has happened since the last look."""
        now_ns = self._now_ns()
        if self._events is None:
            self._events = self._read_events()
        self._bytes[C] |= self._events.happened(self._looked_ns, now_ns)
        self._looked_ns = now_ns

    def _settle(self) -> None:
        """Bring the pin up to date, and have the timer wake us when it may change."""
        enabled = self._bytes[B] & EVENTS
        level = bool(self._bytes[C] & enabled)
        if level != self._raised:
            self._raised = level
            self._interrupt(level)
        due_ns = None
        if enabled and not level:
            if self._events is None:
                self._events = self._read_events()
            due_ns = self._events.next_due(enabled, self._looked_ns)
        if due_ns != self._due_ns:
            self._due_ns = due_ns
            self._timer.arm(None if due_ns is None else self._delay(due_ns))

    def _delay(self, due_ns: int) -> int:
        return min(max(due_ns - self._looked_ns, SHORTEST_DELAY_NS), LONGEST_DELAY_NS)

    def _read_events(self) -> Events:
        alarm = Alarm(
            self._fitting(HOURS_ALARM, 24, self._encode_hour),
            self._fitting(MINUTES_ALARM, 60, self._encode),
            self._fitting(SECONDS_ALARM, 60, self._encode),
        )
        return Events(period(self._bytes[A] & RATE_BITS), alarm, not self._bytes[B] & SET, self._ahead)

    def _fitting(self, register: int, count: int, encode: Callable[[int], int]) -> list[int]:
        """Return the values below ``count`` whose byte is the alarm byte in ``register``."""
        byte = self._bytes[register]
        return [value for value in range(count) if byte & ANY == ANY or encode(value) == byte]

    # --- time ---------------------------------------------------------------------------------------------------

    def _updating(self) -> bool:
        return not self._bytes[B] & SET and self._looked_ns % NANOSECONDS >= NANOSECONDS - UPDATE_NS

    def _latch(self) -> None:
        """Stop the clock: the bytes hold the time from here."""
        for register, value in self._clock().items():
            self._bytes[register] = value

    def _clock(self) -> dict[int, int]:
        """Return the time registers as the guest reads them, in the formats that register B says."""
        now = time.gmtime(self._looked_ns // NANOSECONDS + self._ahead)
        fields = {
            SECONDS: now.tm_sec,
            MINUTES: now.tm_min,
            WEEKDAY: (now.tm_wday + 1) % 7 + 1,  # 1 is Sunday
            DAY: now.tm_mday,
            MONTH: now.tm_mon,
            YEAR: now.tm_year % 100,
            CENTURY: now.tm_year // 100 % 100,
        }
        return {register: self._encode(value) for register, value in fields.items()} | {
            HOURS: self._encode_hour(now.tm_hour)
        }

    def _encode_hour(self, hour: int) -> int:
        if self._bytes[B] & HOURS_24:
            return self._encode(hour)
        return self._encode((hour - 1) % 12 + 1) | (PM if hour >= 12 else 0)

    def _encode(self, value: int) -> int:
        return value if self._bytes[B] & BINARY else value // 10 << 4 | value % 10

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
        self._ahead = ((days * 24 + hour) * 60 + minute) * 60 + second - self._looked_ns // NANOSECONDS

    def _decode(self, byte: int) -> int:
        return byte if self._bytes[B] & BINARY else (byte >> 4) * 10 + (byte & 0xF)


def days_since_1970(year: int, month: int, day: int) -> int:
    """Return the days from 1 January 1970 to a Gregorian date; ``month`` 0 is the December before, ``day`` any number.

    `time` has no inverse of gmtime, and `calendar` costs the start of each run more than these lines.
    """
    # Years that begin in March have their odd day last, and their months repeat 31, 30, 31, 30, 31: 153 days in five.
    year, month = (year, month - 3) if month > 2 else (year - 1, month + 9)
    return 365 * year + year // 4 - year // 100 + year // 400 + (153 * month + 2) // 5 + day - 719469

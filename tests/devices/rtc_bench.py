"""An RTC between a clock, a timer and a pin that the test holds in its hands: nothing here takes time."""

from kvmpy.devices.rtc import Cmos
from kvmpy.units import MiB

NANOSECONDS = 10**9
A, B, C, D = 10, 11, 12, 13
SET, PIE, AIE, UIE, BINARY, HOURS_24 = 0x80, 0x40, 0x20, 0x10, 0x04, 0x02


class HeldTimer:
    """A timer that is due when the bench says so; ``armed`` counts how often it was set."""

    def __init__(self):
        self.on_due = lambda: None
        self.delay_ns = None
        self.armed = 0

    def arm(self, delay_ns):
        self.delay_ns = delay_ns
        self.armed += 1


class RtcBench:
    """``cmos`` at ``now_ns``; ``pin`` is every change of its interrupt."""

    def __init__(self, now_ns=0, memory_size=128 * MiB):
        self.now_ns = now_ns
        self.pin = []
        self.timer = HeldTimer()
        self.cmos = Cmos(memory_size, self.pin.append, self.timer, now_ns=lambda: self.now_ns)

    @property
    def now(self):
        """The host's clock in seconds."""
        return self.now_ns / NANOSECONDS

    @now.setter
    def now(self, seconds):
        self.now_ns = round(seconds * NANOSECONDS)

    def get(self, *registers):
        """Read registers: one value, or a list."""
        values = []
        for register in registers:
            self.cmos.write(0, bytes([register]))
            values.append(self.cmos.read(1, 1)[0])
        return values if len(values) > 1 else values[0]

    def put(self, register, value):
        self.cmos.write(0, bytes([register]))
        self.cmos.write(1, bytes([value]))

    def sleep(self):
        """Let the time come for which the timer is set; return how many nanoseconds that took, None: it is not set."""
        delay_ns, self.timer.delay_ns = self.timer.delay_ns, None
        if delay_ns is not None:
            self.now_ns += delay_ns
            self.timer.on_due()
        return delay_ns

    def sleep_until_interrupt(self, looks=10_000):
        """As `sleep`, as often as it takes; return the nanoseconds in all."""
        began_ns, rises = self.now_ns, self.pin.count(True)
        for _ in range(looks):
            if self.sleep() is None or self.pin.count(True) > rises:
                break
        assert self.pin.count(True) > rises, "no interrupt"
        return self.now_ns - began_ns


def cmos_at(seconds):
    """Return an RTC whose clock stands still."""
    return RtcBench(round(seconds * NANOSECONDS)).cmos

"""Seeing that a Linux kernel has panicked: by its words on a console, and by what it does then.

::

    Kernel panic - not syncing: <why>                   then a trace, and with the parameter panic=N:
        N < 0   it resets the machine at once
        N > 0   it says "Rebooting in N seconds..", and then resets
        N = 0   ---[ end Kernel panic - not syncing: <why> ]---    and one processor spins in ring 0 for ever

Words alone prove nothing: a user may print them. So they are believed of a guest that then resets, triple-faults or
halts without the "reboot: " that a living kernel says first, or that hangs: silent for HANG_SECONDS behind the last
line above, without an access to a device, and each vCPU in ring 0 at every look, or halted with interrupts off.

That word stands on a serial port alone. Of hvc0 Linux shuts the virtio device down before it says it
(device_shutdown): there a program that prints a panic's words and then reboots is taken for a panic.

The guest says what it likes, as long as it likes: what is kept of it, and the work for a line, is bounded.

Source: Linux, kernel/panic.c (panic), kernel/reboot.c; Documentation/admin-guide/kernel-parameters.txt (panic=).
"""

import time
from collections.abc import Sequence

from kvmpy._shim import lib
from kvmpy.kvm import Vcpu
from kvmpy.machine.machine import End, EndReason, Machine
from kvmpy.pc.halt import cannot_wake

PANIC = b"Kernel panic - not syncing: "
PANIC_END = b"---[ end Kernel panic - not syncing"
ORDERLY = b"reboot: "
"""What a kernel says when it reboots, halts or powers off because it was told to."""

LONGEST_LINE = 512
LONGEST_TRACE = 1000
"""Lines behind the panic: whoever says more is no kernel that panicked."""
LAST_WORDS = 12
LAST_BYTES = 4096

HANG_SECONDS = 3.0
LOOK_SECONDS = 0.1
NEVER = 3600.0


class PanicWatch:
    """Hears what a guest prints on one console, in pieces of any size.

    ``message`` is why the kernel panicked, as far as that stands. ``ended`` tells that it has said the last line that
    a hanging kernel says, and ``heard`` counts bytes.
    """

    def __init__(self) -> None:
        self.heard = 0
        self._line = b""
        self.reset()

    def reset(self) -> None:
        """Forget: another boot begins."""
        self.message: str | None = None
        self.ended = False
        self._lines = 0

    def hear(self, data: bytes) -> None:
        """Take what was printed."""
        self.heard += len(data)
        *lines, rest = (self._line + data).split(b"\n") if self._matters(data) else self._skip(data)
        for line in lines:
            self._judge(line)
        self._line = _shortened(rest)

    def finish(self) -> None:
        """Take a last line that nobody ended."""
        self._judge(self._line)
        self._line = b""

    def _matters(self, data: bytes) -> bool:
        return self.message is not None or PANIC in self._line + data

    def _skip(self, data: bytes) -> list[bytes]:
        """Return the line that has begun: nearly always this is all."""
        _, newline, rest = data.rpartition(b"\n")
        return [rest if newline else self._line + data]

    def _judge(self, line: bytes) -> None:
        _, mark, why = line.partition(PANIC)
        if mark:  # the last one counts: before it, others may have said so
            self.message, self.ended, self._lines = clean(why).removesuffix(" ]---"), PANIC_END in line, 0
            return
        self._lines += 1
        if ORDERLY in line or self._lines > LONGEST_TRACE:
            self.reset()


def _shortened(line: bytes) -> bytes:
    """Return what is worth keeping of a line that goes on: its end, or what is said of a panic."""
    if len(line) <= LONGEST_LINE:
        return line
    at = line.find(PANIC)
    return line[at : at + LONGEST_LINE] if at >= 0 else line[-LONGEST_LINE:]


class HungPanic:
    """Ends the run of a kernel that has panicked and hangs; see the head of this module."""

    def __init__(self, machine: Machine, consoles: Sequence[PanicWatch]) -> None:
        self._machine, self._consoles = machine, consoles
        self._seen: tuple[int, ...] = ()
        self._since = self._next = 0.0

    @property
    def interval(self) -> float:
        """How long not to look: for ever, before the last line."""
        return LOOK_SECONDS if any(console.ended for console in self._consoles) else NEVER

    def look(self) -> None:
        """End the run if the guest has stood still for long enough."""
        now = time.monotonic()
        if now < self._next or not any(console.ended for console in self._consoles):
            return
        self._next = now + LOOK_SECONDS / 2
        seen = (self._accesses(), *(console.heard for console in self._consoles))
        if seen != self._seen or not self._stands_still():
            self._seen, self._since = seen, now
        elif now - self._since >= HANG_SECONDS:
            self._machine.finish(End(EndReason.PANIC))

    def _accesses(self) -> int:
        """Return how often the guest has accessed a device. Other exits may be the timer's, which still interrupts."""
        counts = [vcpu.exits_by_reason() for vcpu in self._machine.vcpus()]
        return sum(count.get(reason, 0) for count in counts for reason in ("IO", "MMIO"))

    def _stands_still(self) -> bool:
        try:
            return all(thread.call(_is_stuck) for thread in self._machine.threads)
        except RuntimeError:  # a thread ended meanwhile: so did the run
            return False


def _is_stuck(vcpu: Vcpu) -> bool:
    """Tell whether a vCPU runs in ring 0, or never will run."""
    if vcpu.get_mp_state() == lib.KVM_MP_STATE_RUNNABLE:
        sregs = vcpu.get_sregs()
        return bool(sregs.ss.dpl == 0)
    return cannot_wake(vcpu)


def clean(line: bytes) -> str:
    """Return a line of the guest's for people: without what could play with a terminal, and not too long."""
    text = line[:LONGEST_LINE].decode(errors="replace").expandtabs().strip()
    return "".join(c if c.isprintable() else "?" for c in text)


def last_words(printed: bytes) -> tuple[str, ...]:
    """Return the last lines of what was printed that are not empty, clean."""
    lines = [clean(line) for line in printed[-LAST_BYTES:].split(b"\n")]
    return tuple([line for line in lines if line][-LAST_WORDS:])

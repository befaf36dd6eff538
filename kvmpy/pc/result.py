"""How a run ended: the typed result and the exit status that stands for it."""

from collections.abc import Mapping
from enum import IntEnum
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from kvmpy.machine.machine import End, EndReason

if TYPE_CHECKING:
    from kvmpy.devices.block import BlockCounters


class ExitStatus(IntEnum):
    """The statuses of kvmpy's own: even and above 127, so that no exit-port convention returns them."""

    INTERRUPTED = 130
    USAGE = 192
    IMAGE = 194
    """image or disk"""
    HOST = 196
    CRASH = 198
    """guest crash or panic"""
    LIMIT = 200
    """timeout or budget"""
    RESET = 202


STATUS_OF = {
    EndReason.POWER_OFF: 0,
    EndReason.RESET: ExitStatus.RESET,
    EndReason.SHUTDOWN: ExitStatus.CRASH,
    EndReason.INTERNAL_ERROR: ExitStatus.CRASH,
    EndReason.UNHANDLED: ExitStatus.CRASH,
    EndReason.HALTED: ExitStatus.CRASH,
    EndReason.PANIC: ExitStatus.CRASH,
    EndReason.BUDGET: ExitStatus.LIMIT,
    EndReason.TIMEOUT: ExitStatus.LIMIT,
    EndReason.INTERRUPTED: ExitStatus.INTERRUPTED,
    EndReason.ERROR: ExitStatus.HOST,
}
"""The status of each end but EXIT_PORT, whose status is the guest's."""


REBOOTS = frozenset({EndReason.RESET, EndReason.SHUTDOWN})
"""The ends at which a PC boots again: a processor that shuts down, by a triple fault, makes its board reset it."""


class RangeUse(NamedTuple):
    """How often the guest accessed one device: answered in C and in Python together. String I/O counts elements."""

    name: str
    base: int
    size: int
    reads: int
    writes: int


class DiskUse(NamedTuple):
    """What the guest did with the disk at ``path``: requests and bytes, since the PC was made."""

    path: str
    counters: "BlockCounters"


class RunResult(NamedTuple):
    """What came of a run.

    ``status`` is the exit status, ``message`` one line on why (empty when the guest ended by its own will).
    ``exits`` counts by reason over all vCPUs; ``ranges`` by device. ``seconds`` is wall time from the first
    instruction to the end, ``seconds_in_guest`` the sum over vCPUs of the time inside KVM_RUN (0.0 unless
    measured). ``serial_bytes`` and ``debugcon_bytes`` are what the guest printed, at most the last MiB of each.
    """

    end: End
    status: int
    message: str
    exits: dict[str, int]
    ranges: list[RangeUse]
    unmapped_reads: int
    unmapped_writes: int
    seconds: float
    seconds_in_guest: float
    serial_bytes: bytes
    debugcon_bytes: bytes
    registers: dict[int, dict[str, int]]
    """The general registers of each vCPU at the end, by vcpu_id."""
    disks: tuple[DiskUse, ...] = ()
    panic: str | None = None
    """What a Linux kernel said when it panicked."""
    last_words: tuple[str, ...] = ()
    """The last lines that such a kernel printed."""
    assists: Mapping[str, int] = MappingProxyType({})
    """How often each kind of instruction was completed for the host's KVM."""
    restarts: int = 0
    """How many boots there were before: counts, times and registers are those of the last."""

    @property
    def reason(self) -> EndReason:
        """Why the run ended."""
        return self.end.reason

    @property
    def serial(self) -> str:
        """What the guest printed on COM1, as text."""
        return self.serial_bytes.decode(errors="replace")

    @property
    def debugcon(self) -> str:
        """What the guest printed on port 0xe9, as text."""
        return self.debugcon_bytes.decode(errors="replace")

    @property
    def exits_total(self) -> int:
        """The exits of all vCPUs."""
        return sum(self.exits.values())

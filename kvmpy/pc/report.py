"""From a PC that has stopped to its `RunResult`: counts summed up, and one line that says why."""

from collections import Counter
from typing import TYPE_CHECKING

from kvmpy.devices.debug import exit_status, qemu_exit_status
from kvmpy.errors import KvmError
from kvmpy.kvm import FailEntry, InternalError, Vcpu
from kvmpy.kvm.state import GENERAL_REGISTERS
from kvmpy.machine.bus import Bus
from kvmpy.machine.machine import End, EndReason
from kvmpy.pc.panic import last_words
from kvmpy.pc.result import STATUS_OF, DiskUse, RangeUse, RunResult
from kvmpy.pc.spec import DebugExit

if TYPE_CHECKING:
    from kvmpy.pc.pc import Pc


def result_of(pc: "Pc") -> RunResult:
    """Sum up a PC whose machine has ended and whose vCPUs are out of the guest."""
    machine = pc.machine
    end = machine.end
    assert end is not None
    panic, words = panic_of(pc, end)
    end = cause_of(end, panic)
    exits: Counter[str] = Counter()
    registers = {}
    for vcpu in machine.vcpus():
        exits.update(vcpu.exits_by_reason())
        regs = vcpu.get_regs()
        registers[vcpu.vcpu_id] = {name: int(getattr(regs, name)) for name in GENERAL_REGISTERS}
    return RunResult(
        end=end,
        status=status_of(end, pc.spec.debug_exit),
        message=message_of(end, registers, panic, machine.completer.refusal(end.vcpu_id)),
        exits=dict(exits),
        ranges=[*_use(machine.pio, pc), *_use(machine.mmio, pc)],
        unmapped_reads=machine.pio.unmapped_reads + machine.mmio.unmapped_reads,
        unmapped_writes=machine.pio.unmapped_writes + machine.mmio.unmapped_writes,
        seconds=pc.ended_at - pc.started_at,
        seconds_in_guest=_seconds_in_guest(pc),
        serial_bytes=pc.serial_capture.data,
        debugcon_bytes=pc.debugcon_capture.data,
        registers=registers,
        disks=tuple(DiskUse(disk.path, disk.counters()) for disk in pc.disks),
        panic=panic,
        last_words=words,
        assists=dict(machine.assists()),
        restarts=pc.restarts,
    )


def panic_of(pc: "Pc", end: End) -> tuple[str | None, tuple[str, ...]]:
    """Return why the guest's kernel panicked, if it did, and its last lines."""
    if end.reason in (EndReason.EXIT_PORT, EndReason.POWER_OFF):  # a kernel that panicked does neither
        return None, ()
    for capture in pc.captures:
        if capture.panic is not None and capture.panic.message is not None:
            return capture.panic.message, last_words(capture.data)
    return None, ()


def cause_of(end: End, panic: str | None) -> End:
    """Return ``end``, or the panic that it followed from."""
    follows = end.reason in (EndReason.RESET, EndReason.SHUTDOWN, EndReason.HALTED)
    return end._replace(reason=EndReason.PANIC) if follows and panic is not None else end


def status_of(end: End, debug_exit: DebugExit) -> int:
    """Return the exit status that stands for ``end``."""
    if end.reason is not EndReason.EXIT_PORT:
        return int(STATUS_OF[end.reason])
    return qemu_exit_status(end.value) if debug_exit is DebugExit.QEMU else exit_status(end.value)


def message_of(end: End, registers: dict[int, dict[str, int]], panic: str | None = None, refusal: str = "") -> str:
    """Return one line on why the run ended; empty when the guest ended it in an orderly way.

    ``refusal``: why an instruction that KVM could not emulate was not completed either.
    """
    if end.reason in (EndReason.EXIT_PORT, EndReason.POWER_OFF):
        return ""
    if end.reason is EndReason.PANIC:
        return f"the guest's kernel panicked: {panic}"
    if end.reason is EndReason.RESET:
        return "the guest reset the machine"
    if end.error is not None:
        return str(end.error) if isinstance(end.error, KvmError) else repr(end.error)
    who = f"vCPU {end.vcpu_id}"
    rip = registers.get(end.vcpu_id or 0, {}).get("rip", 0)
    match end.exit, end.reason:
        case InternalError(suberror=1, instruction=code), _:
            what = f"KVM cannot emulate the instruction {code.hex(' ')}" if code else "KVM cannot fetch an instruction"
            why = f"; nor does kvmpy: {refusal}" if refusal else ""
            return f"{who}: {what} at rip 0x{rip:x} (KVM_EXIT_INTERNAL_ERROR, suberror 1){why}"
        case InternalError(suberror=suberror, data=data), _:
            words = " ".join(f"0x{word:x}" for word in data)
            return f"{who}: KVM_EXIT_INTERNAL_ERROR, suberror {suberror} at rip 0x{rip:x} (data: {words})"
        case FailEntry(hardware_entry_failure_reason=why), _:
            return f"{who}: the processor refused to enter the guest, reason 0x{why:x} (KVM_EXIT_FAIL_ENTRY)"
        case _, EndReason.SHUTDOWN:
            return f"{who}: triple fault, last known rip 0x{rip:x}"
        case _, EndReason.HALTED:
            return f"halted for ever: HLT with interrupts off before rip 0x{rip:x}, and nothing can wake it"
        case _, EndReason.UNHANDLED:
            return f"{who}: nobody handles {end.exit} at rip 0x{rip:x}"
    return str(end.reason)


def _use(bus: Bus, pc: "Pc") -> list[RangeUse]:
    """Add what C answered to what the bus counted."""
    uses = []
    for owner in bus:
        reads, writes = pc.machine.fast_use(owner)
        uses.append(RangeUse(owner.name, owner.base, owner.size, owner.reads + reads, owner.writes + writes))
    return uses


def _seconds_in_guest(pc: "Pc") -> float:
    vcpus: list[Vcpu] = list(pc.machine.vcpus())
    cycles = sum(vcpu.cycles_in_run for vcpu in vcpus)
    if not cycles:
        return 0.0
    khz = pc.machine.threads[0].call(lambda vcpu: vcpu.get_tsc_khz())
    return cycles / (khz * 1000)

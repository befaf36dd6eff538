"""Probes of guest debug: does a step, a breakpoint or a watchpoint come to us as the exit Debug?

Source: KVM API §4.87, KVM_SET_GUEST_DEBUG; Intel SDM vol. 3 §18.2 (DR7).
"""

from collections.abc import Callable

from kvmpy._shim import lib
from kvmpy.kvm import Debug, InternalError
from kvmpy.machine.probe import tables
from kvmpy.machine.probe.bench import Bench, Done, Ended, Mode, Trap, describe, finish
from kvmpy.machine.probe.finding import Ability, Verdict
from kvmpy.machine.probe.instructions import INT3
from kvmpy.machine.probe.judge import Judgement, Probe

NOPS = bytes.fromhex(
    "90"  # nop
    "90"  # nop
)
STORE = bytes.fromhex(
    "c706 5a000000"  # movl $0x5a, (%rsi)
    "90"  # nop
)
STORE_SIZE = len(STORE) - 1

# DR7: breakpoint 0 enabled for all tasks; on execution, or on a write of 4 bytes.
DR7_EXECUTE = 1 << 10 | 1 << 1
DR7_WRITE_4 = DR7_EXECUTE | 0b1101 << 16


def debugged(
    code: bytes, mode: Mode, control: int, *, stops_at: int, address: int = 0, dr7: int = 0
) -> Callable[[Bench], Judgement]:
    """Return the judge of a guest that shall end in the exit Debug with RIP ``stops_at``."""

    def judge(bench: Bench) -> Judgement:
        with bench.start(code, mode) as vcpu:
            registers = [address, 0, 0, 0, 0, 0, 0, dr7]
            vcpu.set_guest_debug(lib.KVM_GUESTDBG_ENABLE | control, registers)
            outcome = finish(vcpu)
        match outcome:
            case Ended(exit=Debug(pc=pc)) if pc == stops_at:
                return Verdict.OK, ""
            case Ended(exit=Debug(pc=pc)):
                where = "in the guest's handler" if pc >= tables.HANDLERS else f"at 0x{pc:x}, not at 0x{stops_at:x}"
                return Verdict.BROKEN, f"the exit Debug comes {where}"
            case Done():
                return Verdict.MISSING, "never fires"
            case Trap():
                return Verdict.BROKEN, f"{describe(outcome)} in the guest instead of the exit Debug"
            case Ended(exit=InternalError()):
                return Verdict.BROKEN, "KVM_EXIT_INTERNAL_ERROR with RIP at it, instead of the exit Debug"
        return Verdict.BROKEN, describe(outcome)

    return judge


def step(mode: Mode) -> Callable[[Bench], Judgement]:
    """Return the judge of a single step over one instruction."""
    return debugged(NOPS, mode, lib.KVM_GUESTDBG_SINGLESTEP, stops_at=tables.CODE + 1)


def software_breakpoint(mode: Mode) -> Callable[[Bench], Judgement]:
    """Return the judge of INT3 while KVM_GUESTDBG_USE_SW_BP is on."""
    return debugged(INT3, mode, lib.KVM_GUESTDBG_USE_SW_BP, stops_at=tables.CODE)


def hardware_breakpoint(mode: Mode) -> Callable[[Bench], Judgement]:
    """Return the judge of a breakpoint on the second instruction."""
    at = tables.CODE + 1
    return debugged(NOPS, mode, lib.KVM_GUESTDBG_USE_HW_BP, stops_at=at, address=at, dr7=DR7_EXECUTE)


def watchpoint(mode: Mode) -> Callable[[Bench], Judgement]:
    """Return the judge of a watchpoint on a word that the guest writes."""
    # A data breakpoint is a trap: RIP is behind the store (Intel SDM vol. 3 §18.3.1.2).
    after = tables.CODE + STORE_SIZE
    return debugged(STORE, mode, lib.KVM_GUESTDBG_USE_HW_BP, stops_at=after, address=tables.DATA, dr7=DR7_WRITE_4)


_AT_CPL0 = "debug at CPL0, or print from the guest (port 0xe9)"
_BY_STEPS = "single-step, and compare the word after each step"

PROBES = (
    Probe(Ability.SINGLE_STEP_CPL0, step(Mode.CPL0), "use breakpoints, or print from the guest (port 0xe9)"),
    Probe(
        Ability.SW_BREAKPOINT_CPL0,
        software_breakpoint(Mode.CPL0),
        "take that exit at a known breakpoint, with byte 0xcc, for the breakpoint",
    ),
    Probe(Ability.HW_BREAKPOINT_CPL0, hardware_breakpoint(Mode.CPL0), "use software breakpoints"),
    Probe(Ability.WATCHPOINT_CPL0, watchpoint(Mode.CPL0), _BY_STEPS),
    Probe(Ability.SINGLE_STEP_CPL3, step(Mode.CPL3), _AT_CPL0),
    Probe(Ability.SW_BREAKPOINT_CPL3, software_breakpoint(Mode.CPL3), _AT_CPL0),
    Probe(Ability.HW_BREAKPOINT_CPL3, hardware_breakpoint(Mode.CPL3), _AT_CPL0),
    Probe(Ability.WATCHPOINT_CPL3, watchpoint(Mode.CPL3), _AT_CPL0),
)

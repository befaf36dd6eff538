"""INT3, INT n, INTO and INT1: the guest enters a handler of its own IDT by an instruction.

The gate is checked here, as the processor does for a software interrupt; entering the handler (stack, frame, CS, IF)
is KVM's, which has to do it for every exception. A gate, in 8 or, in IA-32e mode, 16 bytes::

     63          48 47 46 45 44   40 39   35 34  32 31             16 15              0
    +--------------+--+-----+-------+-------+------+-----------------+-----------------+
    | offset 31:16 |P | DPL | type  |       | IST  |  code selector  |   offset 15:0   |
    +--------------+--+-----+-------+-------+------+-----------------+-----------------+
                                            |            offset 63:32 (IA-32e)         |
                                            +------------------------------------------+

Not here: real mode, whose interrupts KVM knows, virtual-8086 mode, task gates.

Floor: machine.

Source: Intel SDM vol. 2, INT n/INTO/INT3/INT1; vol. 3 §6.11 to §6.14.
"""

from collections.abc import Callable
from typing import Any

from kvmpy._shim import lib
from kvmpy.machine import x86
from kvmpy.machine.assist.context import BP, DB, GP, NP, Completion, Context, Fault, Refused, without_lock
from kvmpy.machine.assist.instruction import Instruction, OpcodeMap

OF = 4  # the vector of INTO (Intel SDM vol. 3, table 6-1)

EFLAGS_OF, EFLAGS_VM = 1 << 11, 1 << 17

# Type and S flag of a gate, five bits (Intel SDM vol. 3, table 3-2)
TASK_GATE = 0x05
GATES_64 = frozenset({0x0E, 0x0F})
GATES_32 = frozenset({TASK_GATE, 0x06, 0x07, 0x0E, 0x0F})

# Error code of a fault on the way into a handler (Intel SDM vol. 3, figure 6-7)
EXT, IN_IDT = 1, 2


def find(instruction: Instruction) -> Completion | None:
    """Return what completes ``instruction``, or None: it is not one of these."""
    if instruction.map is not OpcodeMap.ONE:
        return None
    return without_lock(_COMPLETIONS.get(instruction.opcode), instruction)


def _int3(context: Context) -> None:
    _check_gate(context, BP)
    _inject_exception(context, BP)


def _int_n(context: Context) -> None:
    vector = context.instruction.immediate[0]
    _check_gate(context, vector)
    events = _events(context)
    events.interrupt.injected, events.interrupt.nr, events.interrupt.soft = 1, vector, 1
    context.vcpu.set_state("VCPU_EVENTS", events)


def _into(context: Context) -> None:
    if context.rflags & EFLAGS_OF:
        _check_gate(context, OF)
        _inject_exception(context, OF)


def _int1(context: Context) -> None:
    """No software interrupt to the processor, but the event #DB: the DPL of its gate does not count."""
    _check_gate(context, DB, by_software=False)
    _inject_exception(context, DB)


def _check_gate(context: Context, vector: int, *, by_software: bool = True) -> None:
    """Raise what the processor raises before it looks at the handler.

    Raises:
        Fault: #GP: no gate there, of another type, or not for this CPL. #NP: it is not present.
    """
    sregs = context.sregs
    if not sregs.cr0 & lib.X86_CR0_PE or context.rflags & EFLAGS_VM:
        raise Refused("an interrupt instruction in real or virtual-8086 mode")
    long = bool(sregs.efer & x86.EFER_LMA)
    size, types = (16, GATES_64) if long else (8, GATES_32)
    error_code = vector * 8 | IN_IDT | (0 if by_software else EXT)
    if vector * size + size - 1 > sregs.idt.limit:
        raise Fault(GP, error_code)
    gate = context.read((int(sregs.idt.base) + vector * size) % (1 << 64), size, system=True)
    access = gate[5]
    if access & 0x1F not in types or (by_software and access >> 5 & 3 < context.cpl):
        raise Fault(GP, error_code)
    if not access & 0x80:
        raise Fault(NP, error_code)
    if access & 0x1F == TASK_GATE:
        raise Refused(f"the task gate of vector 0x{vector:x}")


def _inject_exception(context: Context, vector: int) -> None:
    events = _events(context)
    events.exception.injected, events.exception.nr, events.exception.has_error_code = 1, vector, 0
    context.vcpu.set_state("VCPU_EVENTS", events)


def _events(context: Context) -> Any:
    """Return the ``struct kvm_vcpu_events`` of the vCPU, to be changed and set.

    Raises:
        Refused: one is being delivered already; the instruction was not reached.
    """
    events = context.vcpu.get_state("VCPU_EVENTS")
    if events.exception.injected or events.interrupt.injected or events.nmi.injected:
        raise Refused("another event is being delivered")
    # Nothing but what is injected is set: an NMI that another thread has queued meanwhile stays.
    events.flags = 0
    return events


_RUN: dict[int, tuple[str, Callable[[Context], None]]] = {
    0xCC: ("int3", _int3),
    0xCD: ("int n", _int_n),
    0xCE: ("into", _into),
    0xF1: ("int1", _int1),
}
_COMPLETIONS = {opcode: Completion(name, run) for opcode, (name, run) in _RUN.items()}

"""Run one completion and see which fault it raises; a fault has changed nothing."""

from collections.abc import Callable

from native_state import MEMORY, Guest, State

from kvmpy.machine.assist import find
from kvmpy.machine.assist.context import Context, Fault

MXCSR = slice(24, 28)


def unchanged(context: Context) -> None:
    """Leave the context as it is."""


def run(guest: Guest, state: State, change: Callable[[Context], None] = unchanged) -> Context:
    """Run the completion of ``state`` in a context that ``change`` has changed, and return the context."""
    context = guest.context(state)
    change(context)
    completion = find(context.instruction)
    assert completion is not None
    before = _all_of(guest, context)
    try:
        completion.run(context)
    except Fault:
        assert _all_of(guest, context) == before
        raise
    return context


def fault(guest: Guest, state: State, change: Callable[[Context], None] = unchanged) -> Fault | None:
    """Return the fault that the instruction raises, or None."""
    try:
        run(guest, state, change)
    except Fault as raised:
        return raised
    return None


def vector(guest: Guest, state: State, change: Callable[[Context], None] = unchanged) -> int | None:
    """Return the vector of the fault that the instruction raises, or None."""
    raised = fault(guest, state, change)
    return raised.vector if raised else None


def mxcsr(guest: Guest) -> int:
    """Return the guest's MXCSR."""
    return int.from_bytes(guest.xsave()[MXCSR], "little")


def of(text: str, memory: bytes = bytes(256), **changes: bytes) -> State:
    """Return the state before the code ``text``, in which every register points at the memory."""
    return State(bytes.fromhex(text), (MEMORY,) * 16, memory=memory.ljust(256, b"\0"), **changes)


def _all_of(guest: Guest, context: Context) -> tuple[object, ...]:
    """Return what a fault leaves: all but MXCSR, whose flags tell of it."""
    fpu = guest.xsave()
    return list(context.registers), context.rflags, context.rip, guest.memory.read(MEMORY, 256), fpu[:24], fpu[28:512]

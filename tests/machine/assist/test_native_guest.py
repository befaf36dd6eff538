"""The same bytes at CPL 3, where every host runs them natively, and at CPL 0, where some hosts need us: no difference.

Whole guests: KVM runs them, `Assist` completes what it does not emulate. What KVM does itself at CPL 0 is KVM's.
``KVMPY_CAMPAIGN=1`` tries fifty times as many states; ``KVMPY_SEED`` repeats a run.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from random import Random

import pytest
from native_state import CAMPAIGN, COMPONENTS, MEMORY, MEMORY_SIZE, XSAVE_SIZE, State, seeded
from random_instructions import RSP, STATUS_FLAGS, Encoder
from test_assist_x87 import states as x87_states

from kvmpy import Kvm
from kvmpy._shim import ffi
from kvmpy.kvm import InternalError, IoOut, Vcpu
from kvmpy.machine.assist import Assist, integer, vector
from kvmpy.machine.assist.context import REGISTERS
from kvmpy.machine.assist.fpu import CR4_OSXSAVE
from kvmpy.machine.memory import GuestMemory
from kvmpy.machine.probe import has, tables
from kvmpy.machine.probe.bench import EFLAGS_IOPL_3, FINISH, Bench, Mode

pytestmark = pytest.mark.kvm

CODE = 0x12_0000
OTHER_EACH_TIME = ("rdrand", "rdseed")
FARTHEST = 0xA000
"""How far from the memory a base register may be: an index of 4096, eight times, and a displacement."""


@dataclass
class Runner:
    """A vCPU that runs one instruction after the other, each from a state that is set anew."""

    vcpu: Vcpu
    memory: GuestMemory
    user: bool

    def __post_init__(self) -> None:
        self._sregs = self.vcpu.get_sregs()
        self._sregs.cr4 |= CR4_OSXSAVE
        self._assist = Assist(self.memory)
        self.completed: list[str] = []
        xcrs = self.vcpu.get_state("XCRS")
        self.vcpu.set_sregs(self._sregs)
        xcrs.xcrs[0].value = COMPONENTS
        self.vcpu.set_state("XCRS", xcrs)

    def run(self, state: State) -> tuple[State, int | None]:
        """Return what ``state`` becomes, and the vector of the exception that it raises, or None."""
        vcpu = self.vcpu
        vcpu.complete()
        self.memory.write(CODE, state.code + FINISH)
        self.memory.write(MEMORY, state.memory)
        vcpu.set_sregs(self._sregs)
        xsave = vcpu.get_state("XSAVE")
        ffi.buffer(xsave)[:XSAVE_SIZE] = state.xsave
        vcpu.set_state("XSAVE", xsave)
        with vcpu.edit_regs() as regs:
            for name, value in zip(REGISTERS, state.registers, strict=True):
                setattr(regs, name, value)
            regs.rip, regs.rflags = CODE, 2 | state.rflags | (EFLAGS_IOPL_3 if self.user else 0)
        return self._finish(state)

    def _finish(self, state: State) -> tuple[State, int | None]:
        vcpu = self.vcpu
        while True:
            match vcpu.next_exit():
                case IoOut(port=port, data=data):
                    break
                case InternalError() as exit:
                    name = self._assist.complete(vcpu, exit)
                    assert name is not None, f"{state.code.hex()}: {exit} {self._assist.refusal(vcpu.vcpu_id)}"
                    self.completed.append(name)
                case other:
                    raise AssertionError(f"{state.code.hex()} ends in {other}")
        regs = vcpu.get_regs()
        registers = tuple(getattr(regs, name) for name in REGISTERS)
        if port == tables.TRAP_PORT:
            return replace(state, memory=self.memory.read(MEMORY, MEMORY_SIZE)), data[0]
        found = replace(
            state,
            registers=registers,
            rflags=regs.rflags & STATUS_FLAGS,
            xsave=bytes(ffi.buffer(vcpu.get_state("XSAVE")))[:XSAVE_SIZE],
            memory=self.memory.read(MEMORY, MEMORY_SIZE),
        )
        return found, None


@pytest.fixture
def runners() -> Iterator[tuple[Runner, Runner]]:
    """A vCPU at CPL 3 and one at CPL 0, each in a VM of its own."""
    with ExitStack() as stack:
        kvm = stack.enter_context(Kvm())
        benches = [stack.enter_context(Bench(kvm)) for _ in range(2)]
        vcpus = [bench.start(b"", mode) for bench, mode in zip(benches, (Mode.CPL3, Mode.CPL0), strict=True)]
        user, kernel = (Runner(*row) for row in zip(vcpus, (b.memory for b in benches), (True, False), strict=True))
        yield user, kernel


def states(random: Random) -> Iterator[State]:
    """Yield a random state before each instruction of all tables, with a stack for what it may raise."""
    for table in (integer.TABLE, vector.TABLE):
        encoder = Encoder(random, table)
        yield from (encoder.encode(*row) for row in encoder.rows if row[-1].name not in OTHER_EACH_TIME)
    yield from x87_states(random)


def with_stack(state: State) -> State | None:
    """Return ``state`` with a stack, unless its operand is found by way of rsp."""
    if abs((state.registers[RSP] & 0xFFFFFFFF) - MEMORY) < FARTHEST:
        return None
    return replace(state, registers=(*state.registers[:RSP], tables.KERNEL_STACK, *state.registers[RSP + 1 :]))


def test_no_difference_between_cpl_3_and_cpl_0(runners: tuple[Runner, Runner]) -> None:
    user, kernel = runners
    wrong, compared, random = [], 0, seeded()
    for state in (state for _ in range(CAMPAIGN) for state in map(with_stack, states(random)) if state):
        kernel.completed.clear()
        ours, our_vector = kernel.run(state)
        if not kernel.completed:
            continue
        expected, their_vector = user.run(state)
        compared += 1
        differences = ours.differences(expected)
        # At CPL 3 some hosts make #UD of a #GP: their KVM tries to emulate what raised it, and cannot.
        if (our_vector is None) != (their_vector is None) or differences:
            wrong.append(f"{state.code.hex()} {kernel.completed} {our_vector} {their_vector} {differences}")
    assert not wrong, "\n".join(wrong[:10])
    assert compared > 400 or has("native-cpl0")

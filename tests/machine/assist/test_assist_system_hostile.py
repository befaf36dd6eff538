"""A guest that means harm: any registers, any tables, any memory. Each instruction of these ends in a known way."""

import random
from collections.abc import Iterator
from contextlib import suppress

import pytest
from assist_guest import AssistedBench, assemble, complete, enable

from kvmpy import Kvm
from kvmpy.kvm import Vcpu
from kvmpy.machine.assist import interrupts, system, xsave
from kvmpy.machine.assist.context import REGISTERS, Completion, Context, Refused
from kvmpy.machine.assist.instruction import Instruction
from kvmpy.machine.probe import tables
from kvmpy.units import PAGE_SIZE, MiB

pytestmark = pytest.mark.kvm

ROUNDS = 150
XSAVES = ("xsave", "xsave64", "xsaveopt", "xsavec64", "xsaves", "xrstor", "xrstor64", "xrstors64")
CODES = [
    *("int3", "int1", "int $0x80", "int $0xff", "rdtscp", "rdpid %r15", "monitor", "gs monitor", "mwait"),
    *("xgetbv", "invpcid (%rsi), %rax", "invpcid %fs:-16(%rcx), %rbx", "enter $65535, $31", "enter $0, $1"),
    *("data16 enter $7, $30", "verr %ax", "verw (%rdi)", "lar %rcx, %rsp", "lar (%rdx), %ax", "lsl %gs:(%rbx), %r8"),
    *(f"{code} {operand}" for code in XSAVES for operand in ("(%rdi)", "%fs:(%rax,%rbx,8)", "-64(%rip)")),
]
MODULES = (interrupts, system, xsave)
VECTORS = {6, 7, 11, 12, 13, 14}


@pytest.fixture(scope="module")
def bench() -> Iterator[AssistedBench]:
    with Kvm() as kvm, AssistedBench(kvm) as made:
        yield made


@pytest.fixture
def vcpu(bench: AssistedBench) -> Iterator[Vcpu]:
    with bench.start(b"") as made:
        enable(made)
        yield made


def find(instruction: Instruction) -> Completion | None:
    return next(filter(None, (module.find(instruction) for module in MODULES)), None)


class Malice:
    """Addresses at edges, numbers of all sizes."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def word(self) -> int:
        edges = (0, tables.DATA, 2 * MiB, tables.MAPPED_64, 1 << 32, 1 << 47, 1 << 63, 1 << 64)
        match self.random.randrange(4):
            case 0:
                return self.random.getrandbits(64)
            case 1:
                return self.random.getrandbits(self.random.randrange(1, 64))
            case 2:
                return self.random.randrange(2 * MiB) & -64
        return (self.random.choice(edges) + self.random.randrange(-64, 65)) % (1 << 64)

    def spoil(self, context: Context) -> None:
        sregs = context.sregs
        for segment in (sregs.fs, sregs.gs, sregs.ldt, sregs.gdt, sregs.idt):
            segment.base = self.word()
            segment.limit = self.random.getrandbits(16)
        sregs.ldt.unusable = self.random.getrandbits(1)


class Unchanged:
    """A vCPU whose descriptor tables are not the spoilt ones."""

    def __init__(self, vcpu: Vcpu) -> None:
        self._vcpu = vcpu

    def __getattr__(self, name: str) -> object:
        return getattr(self._vcpu, name)

    def set_sregs(self, sregs: object) -> None:
        pass

    def set_state(self, name: str, state: object) -> None:
        if name != "VCPU_EVENTS":
            self._vcpu.set_state(name, state)


@pytest.mark.parametrize("code", CODES)
def test_it_is_done_or_faults_or_is_refused(bench: AssistedBench, vcpu: Vcpu, code: str) -> None:
    """And nothing else: no other exception, no byte outside RAM, no end that does not come."""
    malice, raw = Malice(CODES.index(code)), assemble(code)
    for _ in range(ROUNDS):
        bench.memory.write(tables.DATA, malice.random.randbytes(4 * PAGE_SIZE))
        rflags = 2 | malice.random.getrandbits(22)
        registers = {name: malice.word() for name in REGISTERS} | {"rip": tables.CODE}
        context = bench.context(vcpu, raw, cpl=malice.random.choice((0, 0, 3)), rflags=rflags, **registers)
        malice.spoil(context)
        context.vcpu = Unchanged(vcpu)
        with suppress(Refused):
            fault = complete(find, context)
            assert fault is None or fault.vector in VECTORS
            assert all(0 <= value < 1 << 64 for value in context.registers)
        bench.restore_tables()

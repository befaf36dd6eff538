"""INT3, INT n, INTO and INT1: through the guest's IDT, into its handler, and back."""

import struct
from typing import NamedTuple

import pytest
from assist_guest import AssistedBench, fault_of

from kvmpy._shim import lib
from kvmpy.kvm import Vcpu
from kvmpy.machine import x86
from kvmpy.machine.assist import interrupts
from kvmpy.machine.assist.context import GP, NP, PF, UD, Refused
from kvmpy.machine.probe import tables
from kvmpy.machine.probe.bench import FINISH, Done, Mode, Trap

pytestmark = pytest.mark.kvm

IF, RF, OF, VM = 1 << 9, 1 << 16, 1 << 11, 1 << 17
PRESENT, INTERRUPT_GATE, TRAP_GATE, CALL_GATE, TASK_GATE = 0x80, 0x0E, 0x0F, 0x0C, 0x05
HANDLER, IST_STACK = 0x15000, 0x17000
IRETQ = bytes.fromhex("48cf")

CASES = {"int3": ("int3", 3, 1), "int n": ("int $0x21", 0x21, 2), "int 3": (b"\xcd\x03", 3, 2), "int1": ("int1", 1, 1)}
"""Code, vector, length."""


class Frame(NamedTuple):
    """What the guest's handler of an interrupt without error code finds on its stack in 64-bit mode."""

    rip: int
    cs: int
    rflags: int
    rsp: int
    ss: int


def set_gate(bench: AssistedBench, vector: int, access: int, *, handler: int = HANDLER, ist: int = 0) -> None:
    low, selector = handler & 0xFFFF, x86.CODE_SELECTOR
    gate = struct.pack("<HHBBHII", low, selector, ist, access, handler >> 16 & 0xFFFF, handler >> 32, 0)
    bench.memory.write(tables.IDT_64 + 16 * vector, gate)


# --- delivered --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rflags", [2, 2 | IF, 2 | RF, 2 | IF | OF | 1])
@pytest.mark.parametrize(("code", "vector", "length"), CASES.values(), ids=CASES.keys())
def test_handler_finds_the_frame(
    bench: AssistedBench, code: bytes | str, vector: int, length: int, rflags: int
) -> None:
    """SDM vol. 3 §6.14.2: SS, RSP, RFLAGS, CS, RIP of the next instruction; an interrupt gate clears IF."""
    seen = []

    def inspect(vcpu: Vcpu) -> None:
        regs = vcpu.get_regs()
        seen.append(Frame(*struct.unpack("<5Q", bench.memory.read(regs.rsp, 40))))
        assert regs.rflags & (IF | RF) == 0

    assert bench.run(code, inspect=inspect, rflags=rflags) == Trap(vector)
    assert seen == [
        Frame(tables.CODE + length, x86.CODE_SELECTOR, rflags & ~RF, tables.KERNEL_STACK, x86.DATA_SELECTOR)
    ]


@pytest.mark.parametrize("code", ["int3", "int $0x21", "int1"])
def test_guest_goes_on_behind_it(bench: AssistedBench, code: str) -> None:
    """IRET returns to the next instruction, a hundred times in a row."""
    for vector in (1, 3, 0x21):
        set_gate(bench, vector, PRESENT | TRAP_GATE)
    bench.memory.write(HANDLER, bytes.fromhex("ffc0") + IRETQ)  # inc %eax
    loop = f"mov $100, %ecx; xor %eax, %eax; again: {code}; add $0x10000, %eax; dec %ecx; jnz again"
    assert bench.run(loop) == Done(100 * 0x10001)


def test_trap_gate_leaves_interrupts_enabled(bench: AssistedBench) -> None:
    """SDM vol. 3 §6.12.1.3."""
    set_gate(bench, 0x21, PRESENT | TRAP_GATE)
    bench.memory.write(HANDLER, bytes.fromhex("9c58") + FINISH)  # pushf; pop %rax
    assert bench.run("int $0x21", rflags=2 | IF) == Done(2 | IF)


@pytest.mark.parametrize("code", ["int3", "int $3", "int1"])
def test_ist_gives_the_stack(bench: AssistedBench, code: str) -> None:
    """SDM vol. 3 §6.14.5: the IST entry of the TSS, without a change of privilege."""
    bench.memory.write(tables.TSS + 0x24 + 8, struct.pack("<Q", IST_STACK))
    for vector in (1, 3):
        set_gate(bench, vector, PRESENT | INTERRUPT_GATE, ist=2)
    bench.memory.write(HANDLER, bytes.fromhex("89e0") + FINISH)  # mov %esp, %eax
    assert bench.run(code) == Done(IST_STACK - 40)


@pytest.mark.parametrize(("code", "vector"), [("int3", 3), ("int $0x21", 0x21), ("int1", 1)])
def test_delivered_in_32_bit_code(bench: AssistedBench, code: str, vector: int) -> None:
    """SDM vol. 3 §6.12.1: gates of 8 bytes."""
    assert bench.run(code, Mode.PROTECTED) == Trap(vector)


def test_into_interrupts_on_overflow_alone(bench: AssistedBench) -> None:
    """SDM vol. 2, INTO: vector 4 if OF is set, else nothing."""
    assert bench.run("into", Mode.PROTECTED, rflags=2 | OF) == Trap(4)
    assert bench.run("into; mov $7, %eax", Mode.PROTECTED) == Done(7)


@pytest.mark.parametrize("code", [b"\xf0\xcc", b"\xf0\xcd\x21", b"\xf0\xf1"])
def test_lock_is_undefined(bench: AssistedBench, vcpu: Vcpu, code: bytes) -> None:
    """SDM vol. 2, LOCK: #UD with any other instruction than those that it lists."""
    assert fault_of(interrupts.find, bench.context(vcpu, code)) == (UD, None)


@pytest.mark.parametrize(("access", "vector"), [(INTERRUPT_GATE, NP), (PRESENT | CALL_GATE, GP)])
@pytest.mark.parametrize("code", ["int3", "int $3"])
def test_bad_gate_faults_at_the_instruction(bench: AssistedBench, code: str, access: int, vector: int) -> None:
    """SDM vol. 3 §6.13: the error code names the gate in the IDT, and RIP is the instruction's."""
    set_gate(bench, 3, access)
    seen = []

    def inspect(vcpu: Vcpu) -> None:
        seen.append(struct.unpack("<2Q", bench.memory.read(vcpu.get_regs().rsp, 16)))

    assert bench.run(code, inspect=inspect) == Trap(vector)
    assert seen == [(3 * 8 + 2, tables.CODE)]


# --- the gate ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", range(32))
@pytest.mark.parametrize("long", [True, False])
def test_type_of_the_gate(bench: AssistedBench, vcpu: Vcpu, kind: int, long: bool) -> None:
    """SDM vol. 2, INT n, pseudocode; vol. 3, table 3-2: interrupt and trap gates, and outside IA-32e mode more."""
    context = bench.context(vcpu, "int $0x21")
    if not long:
        context.sregs.cr0 &= ~lib.X86_CR0_PG
        context.sregs.efer, context.sregs.idt.base = 0, tables.IDT_32
        bench.memory.write(tables.IDT_32 + 8 * 0x21 + 5, bytes([PRESENT | kind]))
    else:
        set_gate(bench, 0x21, PRESENT | kind)
    if kind == TASK_GATE and not long:
        with pytest.raises(Refused, match="task gate"):
            fault_of(interrupts.find, context)
        return
    allowed = {0x0E, 0x0F} if long else {0x06, 0x07, 0x0E, 0x0F}
    assert fault_of(interrupts.find, context) == (None if kind in allowed else (GP, 0x21 * 8 + 2))


@pytest.mark.parametrize("cpl", [0, 3])
@pytest.mark.parametrize("dpl", range(4))
@pytest.mark.parametrize("name", ["int3", "int n", "int1"])
def test_privilege_of_the_gate(bench: AssistedBench, vcpu: Vcpu, name: str, dpl: int, cpl: int) -> None:
    """SDM vol. 3 §6.12.1.2: INT n, INT3 and INTO need CPL <= DPL; INT1 is no software interrupt."""
    code, vector, _ = CASES[name]
    set_gate(bench, vector, PRESENT | INTERRUPT_GATE | dpl << 5)
    fault = fault_of(interrupts.find, bench.context(vcpu, code, cpl=cpl))
    assert fault == ((GP, vector * 8 + 2) if cpl > dpl and name != "int1" else None)


def test_into_needs_the_privilege_too(bench: AssistedBench) -> None:
    with bench.start(b"", Mode.PROTECTED) as vcpu:
        bench.memory.write(tables.IDT_32 + 8 * 4 + 5, bytes([PRESENT | INTERRUPT_GATE]))
        context = bench.context(vcpu, b"\xce", cpl=3, rflags=2 | OF)
        assert fault_of(interrupts.find, context) == (GP, 4 * 8 + 2)
        assert fault_of(interrupts.find, bench.context(vcpu, b"\xce", cpl=3)) is None


@pytest.mark.parametrize(("limit", "fault"), [(0x21F, None), (0x21E, (GP, 0x10A)), (0, (GP, 0x10A))])
def test_limit_of_the_idt(bench: AssistedBench, vcpu: Vcpu, limit: int, fault: tuple[int, int] | None) -> None:
    """SDM vol. 2, INT n: all 16 bytes of the gate have to be within the limit."""
    context = bench.context(vcpu, "int $0x21")
    context.sregs.idt.limit = limit
    assert fault_of(interrupts.find, context) == fault


def test_error_code_of_int1_says_external(bench: AssistedBench, vcpu: Vcpu) -> None:
    """SDM vol. 3 §6.13: EXT is clear for INT n, INT3 and INTO alone."""
    set_gate(bench, 1, INTERRUPT_GATE)
    assert fault_of(interrupts.find, bench.context(vcpu, "int1")) == (NP, 1 * 8 + 3)


def test_idt_that_is_not_mapped_is_a_page_fault_of_the_system(bench: AssistedBench, vcpu: Vcpu) -> None:
    """SDM vol. 3 §4.6.1: the processor reads the IDT as a supervisor, at any CPL."""
    context = bench.context(vcpu, "int3", cpl=3)
    context.sregs.idt.base = tables.MAPPED_64
    assert fault_of(interrupts.find, context) == (PF, 0)
    assert bench.memory.read(tables.CODE, 1) == b"\xe7"


# --- not ours ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["real", "virtual-8086"])
def test_real_and_virtual_8086_mode_are_refused(bench: AssistedBench, vcpu: Vcpu, mode: str) -> None:
    context = bench.context(vcpu, "int3", rflags=2 | (VM if mode == "virtual-8086" else 0))
    if mode == "real":
        context.sregs.cr0 &= ~lib.X86_CR0_PE
    with pytest.raises(Refused):
        fault_of(interrupts.find, context)


def test_event_that_is_being_delivered_is_not_lost(bench: AssistedBench, vcpu: Vcpu) -> None:
    events = vcpu.get_state("VCPU_EVENTS")
    events.exception.injected, events.exception.nr = 1, 6
    vcpu.set_state("VCPU_EVENTS", events)
    with pytest.raises(Refused, match="another event"):
        fault_of(interrupts.find, bench.context(vcpu, "int $0x21"))
    assert vcpu.get_state("VCPU_EVENTS").exception.nr == 6


def test_nmi_that_another_thread_queues_meanwhile_is_not_lost(
    bench: AssistedBench, vcpu: Vcpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between KVM_GET_VCPU_EVENTS and KVM_SET_VCPU_EVENTS."""
    get_state = vcpu.get_state

    def and_then_an_nmi(name: str) -> object:
        state = get_state(name)
        vcpu.nmi()
        return state

    monkeypatch.setattr(vcpu, "get_state", and_then_an_nmi)
    assert fault_of(interrupts.find, bench.context(vcpu, "int3")) is None
    assert get_state("VCPU_EVENTS").nmi.pending == 1

"""VERR, VERW, LAR and LSL, against what the manual's pages say of each descriptor."""

import struct
from collections.abc import Iterator

import pytest
from assist_guest import NUMBERS, AssistedBench, complete, fault_of

from kvmpy import Kvm
from kvmpy._shim import lib
from kvmpy.kvm import Vcpu
from kvmpy.machine.assist import system
from kvmpy.machine.assist.context import PF, UD, Context
from kvmpy.machine.probe import tables
from kvmpy.machine.probe.bench import Done

pytestmark = pytest.mark.kvm

ZF, OTHER_FLAGS, VM = 1 << 6, 0x895, 1 << 17
GDT = 0x15000
SELECTOR = 0x28
ALL_ONES = 2**64 - 1

# S flag and type of a descriptor, five bits (SDM vol. 3, tables 3-1 and 3-2)
SEGMENTS = range(0x10, 0x20)
CODE = range(0x18, 0x20)
CONFORMING = {0x1C, 0x1D, 0x1E, 0x1F}
READABLE = {*range(0x10, 0x18), 0x1A, 0x1B, 0x1E, 0x1F}
WRITABLE = {0x12, 0x13, 0x16, 0x17}
# Vol. 2, LAR and LSL, tables of segment and gate types (protected mode, IA-32e mode)
LAR = {False: {0x1, 0x2, 0x3, 0x4, 0x5, 0x9, 0xB, 0xC, *SEGMENTS}, True: {0x2, 0x9, 0xB, 0xC, *SEGMENTS}}
LSL = {False: {0x1, 0x2, 0x3, 0x9, 0xB, *SEGMENTS}, True: {0x2, 0x9, 0xB, *SEGMENTS}}

INSTRUCTIONS = {"verr": "verr %cx", "verw": "verw %cx", "lar": "lar %ecx, %eax", "lsl": "lsl %ecx, %eax"}


@pytest.fixture(scope="module")
def bench() -> Iterator[AssistedBench]:
    with Kvm() as kvm, AssistedBench(kvm) as made:
        yield made


@pytest.fixture(scope="module")
def vcpu(bench: AssistedBench) -> Iterator[Vcpu]:
    with bench.start(b"") as made:
        yield made


def descriptor(kind: int, *, dpl: int = 0, present: int = 1, limit: int = 0xFFFFF, granular: int = 1) -> bytes:
    """Of base 0x12345678; ``limit`` in its own units."""
    access = present << 7 | dpl << 5 | kind
    flags = granular << 3 | 0b011
    return struct.pack("<HHBBBB", limit & 0xFFFF, 0x5678, 0x34, access, flags << 4 | limit >> 16, 0x12)


def with_gdt(context: Context, bench: AssistedBench, data: bytes, limit: int = SELECTOR + 7) -> Context:
    bench.memory.write(GDT, bytes(64))
    bench.memory.write(GDT + SELECTOR, data)
    context.sregs.gdt.base, context.sregs.gdt.limit = GDT, limit
    return context


def zf_of(context: Context) -> bool:
    flags = context.rflags
    assert complete(system.find, context) is None
    assert context.rflags & ~ZF == flags & ~ZF
    return bool(context.rflags & ZF)


def is_fine(name: str, kind: int, long: bool, dpl: int, rpl: int, cpl: int) -> bool:
    """Say what the manual says."""
    if kind not in CONFORMING and (cpl > dpl or rpl > dpl):
        return False
    return kind in {"verr": READABLE, "verw": WRITABLE, "lar": LAR[long], "lsl": LSL[long]}[name]


@pytest.mark.parametrize("kind", range(32))
@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_every_descriptor_at_every_privilege(bench: AssistedBench, vcpu: Vcpu, name: str, kind: int) -> None:
    """SDM vol. 2, pseudocode of each: type, and CPL and RPL against DPL; present or not does not count."""
    for case in range(1 << 8):
        dpl, rpl, cpl, present, long = case & 3, case >> 2 & 3, case >> 4 & 3, case >> 6 & 1, bool(case >> 7)
        code = INSTRUCTIONS[name]
        context = bench.context(vcpu, code, cpl=cpl, rcx=SELECTOR | rpl, rflags=2 | (ZF if case & 1 else OTHER_FLAGS))
        with_gdt(context, bench, descriptor(kind, dpl=dpl, present=present))
        if not long:
            context.sregs.cr0 &= ~lib.X86_CR0_PG
            context.sregs.efer = 0
        assert zf_of(context) == is_fine(name, kind, long, dpl, rpl, cpl), (dpl, rpl, cpl, present, long)


@pytest.mark.parametrize("name", INSTRUCTIONS)
@pytest.mark.parametrize(
    ("selector", "limit", "fine"),
    [
        *((null, 0xFFFF, False) for null in range(4)),
        (SELECTOR, SELECTOR + 7, True),
        (SELECTOR, SELECTOR + 6, False),
        (SELECTOR, 0, False),
        (0xFFF8, SELECTOR + 7, False),
        (SELECTOR | 0xABCD_0000, SELECTOR + 7, True),  # the upper bits of the register do not count
    ],
)
def test_null_selector_and_limit(
    bench: AssistedBench, vcpu: Vcpu, name: str, selector: int, limit: int, fine: bool
) -> None:
    """SDM vol. 2: ZF is cleared if the selector is null, or the descriptor outside the table."""
    context = bench.context(vcpu, INSTRUCTIONS[name], rcx=selector, rax=ALL_ONES)
    with_gdt(context, bench, descriptor(0x13), limit)
    bench.memory.write(GDT, descriptor(0x13))
    assert zf_of(context) is fine
    assert fine or context.registers[NUMBERS["rax"]] == ALL_ONES


@pytest.mark.parametrize("name", INSTRUCTIONS)
@pytest.mark.parametrize(("unusable", "limit"), [(0, SELECTOR + 7), (0, SELECTOR + 6), (1, SELECTOR + 7)])
def test_local_descriptor_table(bench: AssistedBench, vcpu: Vcpu, name: str, unusable: int, limit: int) -> None:
    """SDM vol. 3 §3.5.1: a selector with TI looks into the LDT, if there is one; its first descriptor too."""
    context = bench.context(vcpu, INSTRUCTIONS[name], rcx=SELECTOR | 4)
    with_gdt(context, bench, descriptor(0x13), limit=0)
    ldt = context.sregs.ldt
    ldt.base, ldt.limit, ldt.unusable = GDT, limit, unusable
    assert zf_of(context) is (not unusable and limit == SELECTOR + 7)
    ldt.base = GDT + SELECTOR
    context.registers[NUMBERS["rcx"]] = 4
    assert zf_of(context) is (not unusable)


@pytest.mark.parametrize(
    ("code", "rax"),
    [
        ("lar %cx, %ax", ALL_ONES & ~0xFFFF | 0x9300),
        ("lar %ecx, %eax", 0x00B9_9300),
        ("lar %rcx, %rax", 0x00B9_9300),
        ("lsl %cx, %ax", ALL_ONES & ~0xFFFF | 0x6FFF),
        ("lsl %ecx, %eax", 0x9873_6FFF),
        ("lsl %rcx, %rax", 0x9873_6FFF),
    ],
)
def test_destination(bench: AssistedBench, vcpu: Vcpu, code: str, rax: int) -> None:
    """SDM vol. 2, LAR and LSL: masked by FF00H or 00FxFF00H; the limit in bytes; by operand size."""
    context = bench.context(vcpu, code, rcx=SELECTOR, rax=ALL_ONES)
    assert zf_of(with_gdt(context, bench, descriptor(0x13, limit=0x98736)))
    assert context.registers[NUMBERS["rax"]] == rax


def test_limit_in_bytes(bench: AssistedBench, vcpu: Vcpu) -> None:
    context = bench.context(vcpu, "lsl %ecx, %eax", rcx=SELECTOR, rax=ALL_ONES)
    assert zf_of(with_gdt(context, bench, descriptor(0x13, limit=0x98736, granular=0)))
    assert context.registers[NUMBERS["rax"]] == 0x98736


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_selector_in_memory_has_two_bytes(bench: AssistedBench, vcpu: Vcpu, name: str) -> None:
    """SDM vol. 2: a memory operand is 16 bits, whatever the operand size."""
    address = tables.MAPPED_64 - 2
    code = INSTRUCTIONS[name].replace("%ecx", "(%rsi)").replace("%cx", "(%rsi)")
    context = bench.context(vcpu, code, rsi=0x20_0000 - 2)
    bench.memory.write(0x20_0000 - 2, struct.pack("<H", SELECTOR))
    assert zf_of(with_gdt(context, bench, descriptor(0x13)))
    assert fault_of(system.find, bench.context(vcpu, code, rsi=address + 2)) == (PF, 0)


@pytest.mark.parametrize("name", INSTRUCTIONS)
@pytest.mark.parametrize("mode", ["real", "virtual-8086"])
def test_undefined_in_real_and_virtual_8086_mode(bench: AssistedBench, vcpu: Vcpu, name: str, mode: str) -> None:
    """SDM vol. 2: #UD."""
    context = bench.context(vcpu, INSTRUCTIONS[name], rflags=2 | (VM if mode == "virtual-8086" else 0))
    if mode == "real":
        context.sregs.cr0 &= ~lib.X86_CR0_PE
    assert fault_of(system.find, context) == (UD, None)


def test_table_is_read_as_the_system(bench: AssistedBench, vcpu: Vcpu) -> None:
    """SDM vol. 3 §4.6.1: implicit supervisor accesses, whose page fault is no user's."""
    context = bench.context(vcpu, "verr %cx", rcx=SELECTOR, cpl=3)
    context.sregs.gdt.base, context.sregs.gdt.limit = tables.MAPPED_64, 0xFF
    assert fault_of(system.find, context) == (PF, 0)


def test_guest_executes_them() -> None:
    """The bench's own GDT: code 0x10 is readable, data 0x18 writable too, 0x20 a busy TSS."""
    with Kvm() as kvm, AssistedBench(kvm) as bench:
        bits = "xor %ebx, %ebx; "
        for code in ("verr", "verw"):
            for selector in (0x10, 0x18, 0x20, 0x40):
                bits += f"mov ${selector}, %ecx; {code} %cx; setz %dl; movzbl %dl, %edx; lea (%rdx, %rbx, 2), %ebx; "
        assert bench.run(bits + "mov %ebx, %eax") == Done(0b1100_0100)
        assert bench.run("mov $0x18, %ecx; lar %ecx, %eax") == Done(0x00CF9300)
        assert bench.run("mov $0x20, %ecx; lsl %ecx, %eax") == Done(0x67)

"""RDTSCP, RDPID, INVPCID, MONITOR, MWAIT, ENTER: their checks from the manual's pages, their effects in guests."""

import random
import struct
from collections.abc import Iterator

import pytest
from assist_guest import NUMBERS, AssistedBench, assemble, complete, fault_of
from native_state import MEMORY, MEMORY_SIZE, Guest, Oracle, State

from kvmpy._shim import lib
from kvmpy.kvm import Vcpu
from kvmpy.machine.assist import enter, system
from kvmpy.machine.assist.context import GP, PF, SS, UD
from kvmpy.machine.assist.native import host_features
from kvmpy.machine.assist.system import CR4_PCIDE, CR4_TSD, IA32_TIME_STAMP_COUNTER, IA32_TSC_AUX
from kvmpy.machine.probe import tables
from kvmpy.machine.probe.bench import Done, Mode, Trap
from kvmpy.units import PAGE_SIZE, MiB

pytestmark = pytest.mark.kvm

PAGE, FIRST, SECOND = 8 * MiB, 0x15000, 0x16000
PRESENT, WRITABLE, USER = 1, 2, 4
NOT_CANONICAL = 1 << 47
UNMAPPED = tables.MAPPED_64


# --- RDTSCP, RDPID ----------------------------------------------------------------------------------------------


@pytest.mark.skipif("rdtscp" not in host_features(), reason="this processor has no RDTSCP")
def test_rdtscp_is_between_two_rdtsc(bench: AssistedBench) -> None:
    """SDM vol. 2, RDTSCP: EDX:EAX is the time-stamp counter."""
    read = "shl $32, %rdx; or %rdx, %rax; mov %rax, {}; "
    code = "rdtsc; " + read.format("%r8") + "rdtscp; " + read.format("%r9") + "rdtsc; " + read.format("%r10")
    code += "xor %eax, %eax; cmp %r8, %r9; seta %al; cmp %r9, %r10; seta %ah"
    assert bench.run(code) == Done(0x0101)


@pytest.mark.parametrize("code", ["rdtscp", "rdpid %rcx"])
def test_ecx_is_ia32_tsc_aux(bench: AssistedBench, vcpu: Vcpu, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """SDM vol. 2, RDTSCP and RDPID: 32 bits of the MSR; the upper halves of the registers are cleared."""
    msrs = {IA32_TIME_STAMP_COUNTER: 0x1122334455667788, IA32_TSC_AUX: 0x99AABBCC}
    monkeypatch.setattr(vcpu, "get_msrs", lambda indices: {index: msrs[index] for index in indices})
    context = bench.context(vcpu, code, rax=-1 % 2**64, rcx=-1 % 2**64, rdx=-1 % 2**64)
    assert complete(system.find, context) is None
    assert context.registers[NUMBERS["rcx"]] == 0x99AABBCC
    if code == "rdtscp":
        assert (context.registers[NUMBERS["rdx"]], context.registers[NUMBERS["rax"]]) == (0x11223344, 0x55667788)


@pytest.mark.parametrize("code", ["rdtscp", "rdpid %rcx"])
def test_an_msr_that_kvm_does_not_have_is_0(
    bench: AssistedBench, vcpu: Vcpu, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    monkeypatch.setattr(vcpu, "get_msrs", lambda indices: {IA32_TIME_STAMP_COUNTER: 1})
    context = bench.context(vcpu, code, rcx=5)
    assert complete(system.find, context) is None
    assert context.registers[NUMBERS["rcx"]] == 0


@pytest.mark.parametrize(
    ("cr4", "cpl", "pe", "fault"),
    [(0, 3, 1, None), (CR4_TSD, 0, 1, None), (CR4_TSD, 3, 1, (GP, 0)), (CR4_TSD, 1, 1, (GP, 0)), (CR4_TSD, 3, 0, None)],
)
def test_rdtscp_obeys_tsd(
    bench: AssistedBench, vcpu: Vcpu, cr4: int, cpl: int, pe: int, fault: tuple[int, int] | None
) -> None:
    """SDM vol. 2, RDTSCP: #GP(0) if CR4.TSD = 1 and CPL = 1, 2 or 3 and CR0.PE = 1."""
    context = bench.context(vcpu, "rdtscp", cpl=cpl)
    context.sregs.cr4 |= cr4
    context.sregs.cr0 &= -1 if pe else ~lib.X86_CR0_PE
    assert fault_of(system.find, context) == fault


# --- INVPCID ----------------------------------------------------------------------------------------------------

INVPCID = "invpcid (%rsi), %rax"
FAULT = (GP, 0)


@pytest.mark.parametrize(
    ("kind", "pcid", "linear", "pcide", "fault"),
    [
        *((kind, 0, 0, pcide, None) for kind in range(4) for pcide in (0, 1)),
        *((kind, 0, 0, 1, FAULT) for kind in (4, 5, 1 << 32, 1 << 63, -1 % 2**64)),
        *((kind, 1 << bit, 0, 1, FAULT) for kind in range(4) for bit in (12, 31, 32, 63)),
        *((kind, pcid, 0, 1, None) for kind in range(4) for pcid in (1, 0xFFF)),
        *((kind, pcid, 0, 0, FAULT) for kind in (0, 1) for pcid in (1, 0xFFF)),
        *((kind, pcid, 0, 0, None) for kind in (2, 3) for pcid in (1, 0xFFF)),
        *((0, 0, linear, 0, FAULT) for linear in (NOT_CANONICAL, 1 << 63, -1 % 2**64 - NOT_CANONICAL)),
        *((0, 0, linear, 0, None) for linear in (NOT_CANONICAL - 1, 2**64 - NOT_CANONICAL, -1 % 2**64)),
        *((kind, 0, NOT_CANONICAL, 0, None) for kind in (1, 2, 3)),
    ],
)
def test_invpcid_checks(
    bench: AssistedBench, vcpu: Vcpu, kind: int, pcid: int, linear: int, pcide: int, fault: tuple[int, int] | None
) -> None:
    """SDM vol. 2, INVPCID, 64-bit mode exceptions."""
    bench.memory.write(tables.DATA, struct.pack("<QQ", pcid, linear))
    context = bench.context(vcpu, INVPCID, rsi=tables.DATA, rax=kind)
    if pcide:
        context.sregs.cr4 |= CR4_PCIDE
        # The flush is not asked for: this vCPU's own CPUID may have no PCIDs.
        context.vcpu = _Recorder()
    assert fault_of(system.find, context) == fault


class _Recorder:
    """Takes what is set."""

    def set_sregs(self, sregs: object) -> None:
        pass


@pytest.mark.parametrize(
    ("cpl", "rsi", "fault"),
    [(3, tables.DATA, (GP, 0)), (1, tables.DATA, (GP, 0)), (0, UNMAPPED, (PF, 0)), (0, NOT_CANONICAL, (GP, 0))],
)
def test_invpcid_needs_cpl_0_and_a_descriptor(
    bench: AssistedBench, vcpu: Vcpu, cpl: int, rsi: int, fault: tuple[int, int]
) -> None:
    """SDM vol. 2, INVPCID."""
    assert fault_of(system.find, bench.context(vcpu, INVPCID, cpl=cpl, rsi=rsi)) == fault


def test_invpcid_does_not_know_a_register_as_descriptor(bench: AssistedBench, vcpu: Vcpu) -> None:
    context = bench.context(vcpu, bytes.fromhex("660f3882c1"))
    assert system.find(context.instruction) is None


STALE_CODE = (
    f"mov {PAGE}, %ebx; movl ${SECOND | 7}, (%rdi); mov {PAGE}, %ebx; "  # the entry changes behind the TLB
    "outb %al, $0x80; "
    f"mov {PAGE}, %eax"
)


def test_translation_is_fresh_after_invpcid(bench: AssistedBench) -> None:
    """SDM vol. 3 §4.10.4.1: what the guest has changed in its page tables, it sees after INVPCID.

    The stale one is a user's: KVM may keep none for CPL 0.
    """
    bench.memory.write(FIRST, struct.pack("<I", 0xAAAA))
    bench.memory.write(SECOND, struct.pack("<I", 0xBBBB))
    bench.map_page(PAGE, FIRST, PRESENT | WRITABLE | USER)
    with bench.start(assemble(STALE_CODE), Mode.CPL3, rdi=0x1F_F000) as vcpu:
        vcpu.next_exit()
        vcpu.complete()
        bench.memory.write(tables.DATA, bytes(16))
        context = bench.context(vcpu, INVPCID, rsi=tables.DATA, rax=2)
        before = context.sregs.cr4
        assert complete(system.find, context) is None
        assert vcpu.get_sregs().cr4 == before
        assert bench.finish(vcpu) == Done(0xBBBB)


@pytest.mark.skipif("invpcid" not in host_features(), reason="this processor has no INVPCID")
def test_guest_executes_invpcid(bench: AssistedBench) -> None:
    code = "movq $0, (%rsi); movq $0, 8(%rsi); mov $2, %eax; invpcid (%rsi), %rax; mov $7, %eax; "
    assert bench.run(code) == Done(7)
    assert bench.run("movq $0x1000, (%rsi); mov $2, %eax; invpcid (%rsi), %rax") == Trap(GP)


# --- MONITOR, MWAIT ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "cpl", "registers", "fault"),
    [
        ("monitor", 0, {"rax": tables.DATA, "rdx": -1 % 2**64}, None),
        ("monitor", 3, {"rax": tables.DATA}, (UD, None)),
        ("monitor", 0, {"rax": tables.DATA, "rcx": 1}, (GP, 0)),
        ("monitor", 0, {"rax": tables.DATA, "rcx": 1 << 32}, (GP, 0)),
        ("monitor", 0, {"rax": UNMAPPED}, (PF, 0)),
        ("monitor", 0, {"rax": NOT_CANONICAL}, (GP, 0)),
        ("addr32 monitor", 0, {"rax": tables.DATA | 1 << 40}, None),
        ("fs monitor", 0, {"rax": 0}, (PF, 0)),
        ("gs monitor", 0, {"rax": tables.DATA}, None),
        ("mwait", 0, {}, None),
        ("mwait", 0, {"rcx": 1, "rax": -1 % 2**64}, None),
        ("mwait", 0, {"rcx": 2}, (GP, 0)),
        ("mwait", 0, {"rcx": 1 << 32}, (GP, 0)),
        ("mwait", 3, {}, (UD, None)),
    ],
)
def test_monitor_and_mwait_checks(
    bench: AssistedBench,
    vcpu: Vcpu,
    code: str,
    cpl: int,
    registers: dict[str, int],
    fault: tuple[int, int | None] | None,
) -> None:
    """SDM vol. 2, MONITOR and MWAIT, 64-bit mode exceptions; the operand of MONITOR is a load of one byte."""
    context = bench.context(vcpu, code, cpl=cpl, **registers)
    context.sregs.fs.base = UNMAPPED
    assert fault_of(system.find, context) == fault


def test_guest_executes_monitor_and_mwait(bench: AssistedBench) -> None:
    """MWAIT may end for any reason: here at once."""
    assert bench.run("mov %rsi, %rax; xor %ecx, %ecx; monitor; xor %eax, %eax; mwait; mov $7, %eax") == Done(7)


@pytest.mark.parametrize("prefix", ["66", "f2", "f3"])
@pytest.mark.parametrize("code", ["0f01c8", "0f01c9"])
def test_mandatory_prefix_makes_it_another_instruction(
    bench: AssistedBench, vcpu: Vcpu, prefix: str, code: str
) -> None:
    """SDM vol. 2, MONITOR and MWAIT: no prefix."""
    context = bench.context(vcpu, bytes.fromhex(prefix + code))
    assert system.find(context.instruction) is None


@pytest.mark.parametrize("code", ["0f01f9", "0f01c8", "660f388206", "0f00e0", "0f02c0", "c8000001"])
def test_lock_is_undefined(bench: AssistedBench, vcpu: Vcpu, code: str) -> None:
    """SDM vol. 2, LOCK: #UD with any other instruction than those that it lists."""
    context = bench.context(vcpu, bytes.fromhex("f0" + code), rsi=tables.DATA)
    assert fault_of(system.find, context) == (UD, None)


# --- ENTER ------------------------------------------------------------------------------------------------------


def enter_states() -> Iterator[State]:
    """Stacks anywhere in 256 bytes, frames anywhere below 200 of them: also where they overlap."""
    draw = random.Random(4)
    for _ in range(400):
        level, size16 = draw.choice((0, 1, 2, 3, 5, 32, 35)), draw.random() < 0.3
        registers = [draw.getrandbits(64) for _ in range(16)]
        registers[NUMBERS["rsp"]] = MEMORY + draw.randrange(120, MEMORY_SIZE)
        if level % 32 > 1:
            registers[NUMBERS["rbp"]] = MEMORY + draw.randrange(60, MEMORY_SIZE)
        room = draw.randrange(20)
        code = (b"\x66" if size16 else b"") + b"\xc8" + room.to_bytes(2, "little") + bytes([level])
        yield State(code, tuple(registers), draw.getrandbits(12), memory=draw.randbytes(MEMORY_SIZE))


def test_enter_does_what_the_processor_does(guest: Guest, oracle: Oracle) -> None:
    """SDM vol. 2, ENTER, pseudocode."""
    guest.find = enter.find
    states = list(enter_states())
    for before, expected in zip(states, oracle.run(states), strict=True):
        assert guest.run(before).differences(expected) == [], before.code.hex()


@pytest.mark.parametrize(
    ("code", "rsp", "rbp", "fault"),
    [
        ("enter $0, $1", UNMAPPED + 4096, 0, (PF, 2)),
        ("enter $0x1800, $1", PAGE + 2 * PAGE_SIZE, 0, (PF, 2)),  # RSP points below the page
        ("enter $0xff8, $1", PAGE + 2 * PAGE_SIZE, 0, (PF, 2)),
        ("enter $0, $2", PAGE + 2 * PAGE_SIZE, UNMAPPED + 4096, (PF, 0)),
        ("enter $0, $1", NOT_CANONICAL + 64, 0, (SS, 0)),
        ("enter $0x100, $0", 2**64 - NOT_CANONICAL + 64, 0, (SS, 0)),
        ("enter $0, $2", PAGE + 2 * PAGE_SIZE, NOT_CANONICAL + 64, (SS, 0)),
        ("enter $0, $31", 8, 8, (PF, 0)),  # around the end of the address space
        ("enter $0, $1", 8, 0, (PF, 2)),
    ],
)
def test_enter_that_faults_changes_nothing(
    bench: AssistedBench, vcpu: Vcpu, code: str, rsp: int, rbp: int, fault: tuple[int, int]
) -> None:
    """SDM vol. 2, ENTER: #SS(0), and #PF also if a write at the final RSP would raise it."""
    bench.map_page(PAGE + PAGE_SIZE, FIRST, PRESENT | WRITABLE)
    bench.memory.write(FIRST, bytes(range(256)) * 16)
    assert fault_of(system.find, bench.context(vcpu, code, rsp=rsp, rbp=rbp)) == fault
    assert bench.memory.read(FIRST, PAGE_SIZE) == bytes(range(256)) * 16


def test_guest_executes_enter(bench: AssistedBench) -> None:
    """LEAVE takes it all back."""
    code = "mov %esp, %ebx; mov $0x1234, %ebp; enter $32, $1; leave; mov %ebp, %eax; sub %ebx, %esp; add %esp, %eax"
    assert bench.run(code) == Done(0x1234)

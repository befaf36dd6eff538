"""A guest that abuses the assists gets the fault that a processor raises, or ends with a diagnosis.

Whole machines. On an ordinary host the same guests run without any assist, and nothing here is different.
"""

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from abuse_guest import ABSENT, EDGE, FAR, FAR_ENTRY, READ_ONLY, guest
from guest_code import assemble

from kvmpy.machine.assist.context import GP, PF, SS
from kvmpy.machine.machine import EndReason
from kvmpy.machine.probe import has
from kvmpy.pc import ExitStatus, Pc, RunResult
from kvmpy.units import PAGE_SIZE

pytestmark = pytest.mark.kvm
MakePc = Callable[..., Pc]
Run = Callable[..., RunResult]

PRESENT, WRITE = 1, 2
"""Bits of a page fault's error code (Intel SDM vol. 3 §4.7)."""
HOLE = 1 << 47
SHORT = 0.3  # seconds that a guest without an end may run


class Case(NamedTuple):
    """What a guest does, and the exception that this is: vector, error code, CR2."""

    body: str
    vector: int
    error_code: int = 0
    address: int | None = None


OPERANDS = {
    "read of an absent page": Case(f"{ABSENT} popcntq {FAR}, %rax", PF, 0, FAR),
    "write to an absent page": Case(f"{ABSENT} stmxcsr {FAR + 16}", PF, WRITE, FAR + 16),
    "write to a read-only page": Case(f"{READ_ONLY} stmxcsr {FAR}", PF, WRITE | PRESENT, FAR),
    "compare of a read-only page": Case(f"{READ_ONLY} cmpxchg16b {FAR}", PF, WRITE | PRESENT, FAR),
    "read across into an absent page": Case(f"{ABSENT} popcntq {FAR - 4}, %rax", PF, 0, FAR),
    "write across into an absent page": Case(f"{ABSENT} stmxcsr {FAR - 2}", PF, WRITE, FAR),
    "write across into a read-only page": Case(f"{READ_ONLY} stmxcsr {FAR - 2}", PF, WRITE | PRESENT, FAR),
    "address in the hole": Case(f"movq ${HOLE}, %rcx ; popcntq (%rcx), %rax", GP),
    "address in the hole, by the stack": Case(f"movq ${HOLE}, %rbp ; popcntq (%rbp), %rax", SS),
    "address into the hole": Case(f"movq ${HOLE - 4}, %rcx ; popcntq (%rcx), %rax", GP),
    "misaligned": Case(f"cmpxchg16b {FAR + 8}", GP),
    "wrap of 64 bits": Case("movq $-4, %rcx ; popcntq (%rcx), %rax", PF, 0, (1 << 64) - 4),
}


@pytest.mark.parametrize("name", OPERANDS)
@pytest.mark.parametrize("traced", [False, True], ids=["c", "python"])
def test_operand_without_rights_is_the_processors_fault(make_pc: MakePc, name: str, traced: bool) -> None:
    """At the instruction, and nothing has been written."""
    case = OPERANDS[name]
    pc = make_pc(guest(case.body), "long", trace_exits=traced)
    pc.memory.write(FAR - PAGE_SIZE, b"\xaa" * 2 * PAGE_SIZE)
    result = pc.run(timeout=10)
    assert (result.reason, result.status) == (EndReason.EXIT_PORT, case.vector), result.message
    registers = result.registers[0]
    assert registers["rbx"] == case.error_code
    assert case.address is None or registers["rsi"] == case.address
    assert pc.memory.read(FAR - PAGE_SIZE, 2 * PAGE_SIZE) == b"\xaa" * 2 * PAGE_SIZE


@pytest.mark.parametrize("operand", [EDGE, EDGE - 4, 0xD000_0000])
def test_operand_that_is_no_ram_ends_with_a_diagnosis(run_guest: Run, operand: int) -> None:
    """KVM would emulate the access to a device, and knows no such instruction."""
    result = run_guest(guest(f"movl ${operand:#x}, %ecx ; popcntq (%rcx), %rax"), "long")
    assert (result.reason, result.status) == (EndReason.INTERNAL_ERROR, ExitStatus.CRASH)
    assert "is not RAM" in result.message


@pytest.mark.parametrize("entry", [0x8000_0003, 0xF_FFFF_F000_0003, EDGE | 3])
def test_page_table_that_is_no_ram_ends_the_guest_alone(run_guest: Run, entry: int) -> None:
    body = f"movq ${entry:#x}, %rax ; movq %rax, {FAR_ENTRY} ; movq %cr3, %rax ; movq %rax, %cr3"
    result = run_guest(guest(f"{body} ; popcntq {FAR}, %rax"), "long", timeout=SHORT)
    assert result.reason is not EndReason.ERROR
    if not has("popcnt-cpl0"):
        assert result.status in (PF, ExitStatus.CRASH)


# --- the edge of a page -----------------------------------------------------------------------------------------

POPCNT = "f3480fb8c1"  # popcnt %rcx, %rax
ACROSS = {"popcnt": POPCNT, "clac": "0f01ca", "stmxcsr": "0fae1c25" + "00003000", "int": "cd21", "vpxor": "c5f1efc1"}


def _at_the_edge(code: str, keep: int) -> tuple[str, int]:
    """Return a body that jumps to ``code``, ``keep`` bytes of which are before FAR, and where that is."""
    at = FAR - keep
    store = "\n".join(f"movb ${byte}, {at + i}" for i, byte in enumerate(bytes.fromhex(code)))
    return f"{store}\n movl ${at}, %eax\n", at


@pytest.mark.parametrize("name", ACROSS)
def test_instruction_across_into_an_absent_page_is_a_fault_of_the_fetch(run_guest: Run, name: str) -> None:
    for keep in range(1, len(ACROSS[name]) // 2):
        body, at = _at_the_edge(ACROSS[name], keep)
        result = run_guest(guest(f"{body} movl %eax, %edi ; {ABSENT} ; jmp *%rdi"), "long")
        assert (result.reason, result.status) == (EndReason.EXIT_PORT, PF), result.message
        registers = result.registers[0]
        assert (registers["rbx"], registers["rdx"], registers["rsi"]) == (0, at, FAR)


@pytest.mark.parametrize("keep", [1, 2, 3, 4])
def test_instruction_across_two_pages_is_done(run_guest: Run, keep: int) -> None:
    code = POPCNT + "48ffe7"  # jmp *%rdi
    body, _ = _at_the_edge(code, keep)
    result = run_guest(guest(f"{body} movl $0x00f7, %ecx ; movl $1f, %edi ; jmp *%rax ; 1: movl %eax, %ebp"), "long")
    assert (result.status, result.registers[0]["rbp"]) == (0, 7), result.message


# --- without an end ---------------------------------------------------------------------------------------------

RETURN = {3: "iretq", 14: "iretq"}
ENDLESS = {
    "int3": ("1: int3 ; jmp 1b", "int3-cpl0"),
    "popcnt": ("1: popcntq %rcx, %rax ; jmp 1b", "popcnt-cpl0"),
    "page fault": (f"{ABSENT} popcntq {FAR}, %rax", "popcnt-cpl0"),
}


def _endless(name: str) -> str:
    return guest(ENDLESS[name][0], handlers=RETURN)


@pytest.mark.parametrize("name", ENDLESS)
def test_failures_without_end_end_at_the_time_limit(run_guest: Run, name: str) -> None:
    result = run_guest(_endless(name), "long", timeout=SHORT)
    assert (result.reason, result.status) == (EndReason.TIMEOUT, ExitStatus.LIMIT)


@pytest.mark.parametrize("name", ENDLESS)
@pytest.mark.parametrize("traced", [False, True], ids=["c", "python"])
def test_failures_without_end_spend_the_budget(run_guest: Run, name: str, traced: bool) -> None:
    if has(ENDLESS[name][1]):
        pytest.skip("here the processor does it, without an exit")
    result = run_guest(_endless(name), "long", max_exits=500, trace_exits=traced)
    assert (result.reason, result.status) == (EndReason.BUDGET, ExitStatus.LIMIT)
    assert result.exits_total <= 501


@pytest.mark.parametrize("name", ENDLESS)
def test_failures_without_end_are_interrupted(tmp_path: Path, name: str) -> None:
    image = tmp_path / "guest.bin"
    image.write_bytes(assemble("movb $'!', %al ; outb %al, $0xe9\n" + _endless(name), "long"))
    command = [sys.executable, "-m", "kvmpy", "run", image, "--format", "flat", "--mode", "long", "--timeout", "60"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(1) == b"!"
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == ExitStatus.INTERRUPTED


def test_fault_without_a_handler_is_a_triple_fault(run_guest: Run) -> None:
    result = run_guest(f"{ABSENT} lidt 1f ; popcntq {FAR}, %rax ; hlt ; 1: .word 0 ; .quad 0", "long")
    assert (result.reason, result.status) == (EndReason.SHUTDOWN, ExitStatus.CRASH)

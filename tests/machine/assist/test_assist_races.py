"""Two processors: what one is about to have completed, the other changes meanwhile, bytes, page tables and all."""

import os
import random
from collections import Counter
from collections.abc import Callable

import pytest
from abuse_guest import FAR, FAR_ENTRY, guest

from kvmpy.machine.assist.context import PF
from kvmpy.machine.machine import EndReason
from kvmpy.pc import Pc, RunResult

pytestmark = pytest.mark.kvm
Run = Callable[..., RunResult]
MakePc = Callable[..., Pc]

TURNS = 1500
LONG = 60.0  # seconds: a bound for what hangs
SHORT = 0.3
GUESTS = 2000 if "KVMPY_CAMPAIGN" in os.environ else 40
TABLE = FAR + (1 << 20)
WILD = TABLE + 4096
START_OTHER = """
        call    prepare_trampoline
        movl    $ap_stack_end, ap_stack
        movl    $0xfee00000, %ebx
        movl    $0xc4500, 0x300(%rbx)           # INIT, then start-up at 0x8000, to all but myself
        movl    $0xc4608, 0x300(%rbx)
"""


def two(body: str, other: str, *, handlers: dict[int, str] | None = None, behind: str = "") -> str:
    """Return a guest whose first processor does ``body`` while the second does ``other`` for ever."""
    behind += f"\n#include <ap.inc>\n ap_main: lidt idt_pointer\n 8: {other} ; jmp 8b\n"
    return guest(START_OTHER + body, handlers=handlers or {}, behind=behind)


def test_instruction_is_one_of_those_that_were_there(run_guest: Run) -> None:
    """The other processor changes its destination to and fro; never is it half of each, and never is it skipped."""
    body = f"""
        movl    $1, %r15d
    1:  movq    %r15, %rcx ; movl $77, %eax ; movl %eax, %edx
        call    victim
        bsfq    %r15, %r14                      # R15 has one bit
        cmpl    $1, %eax ; je 2f
        xchgl   %eax, %edx
    2:  cmpl    $1, %eax ; jne 7f
        cmpl    $77, %edx ; jne 7f
        rolq    $1, %r15
        incl    %r13d ; cmpl ${TURNS}, %r13d ; jne 1b
        jmp     3f
    7:  movb $99, %al ; outb %al, $KVMPY_PORT_EXIT
    3:
    """
    victim = "victim: .byte 0xf3, 0x48, 0x0f, 0xb8, 0xc1 ; ret\n"  # popcnt %rcx, %rax; with 0xd1 %rdx
    result = run_guest(two(body, "xorb $0x10, victim + 4", behind=victim), "long", cores=2, timeout=LONG)
    assert (result.reason, result.status) == (EndReason.EXIT_PORT, 0), result.message


def test_operand_is_there_or_a_page_fault(run_guest: Run) -> None:
    """The other processor takes the page away and brings it back."""
    body = f"""
        movl    ${FAR}, %edi
    1:  xorl %eax, %eax ; xorl %edx, %edx ; xorl %ebx, %ebx ; xorl %ecx, %ecx
        lock cmpxchg16b (%rdi)
    2:  incl %r13d ; invlpg (%rdi) ; cmpl ${TURNS}, %r13d ; jne 1b
    """
    handlers = {PF: f"cmpl ${FAR}, %esi ; jne 7f ; cmpl $2, %ebx ; jne 7f ; movq $2b, (%rsp) ; iretq ; 7: hlt"}
    result = run_guest(two(body, f"xorb $1, {FAR_ENTRY}", handlers=handlers), "long", cores=2, timeout=LONG)
    assert (result.reason, result.status) == (EndReason.EXIT_PORT, 0), result.message


WHOLE = [
    *("cc", "cd21", "cd80", "f3480fb807", "f3480fb8c3", "f20f38f0c8", "f2480f38f107", "480fc70f", "f0480fc70f", "9b"),
    *("0fae1f", "0fae17", "0f01ca", "0f01cb", "0f01f9", "d9e8", "ddc0", "dfe0", "db07", "dbe2", "0f77", "0f02c1"),
    *("0f00e0", "0f03d1", "0f6fc1", "660fefc1", "660f6f07", "0f1007", "0f2907", "c5f1efc1", "c5fe6f07", "c4e270f2c1"),
]
"""Instructions that emulators do not know; some fault here."""
BEGINNINGS = [
    *("cc", "cd", "0f01", "0fc7", "f30fb8", "f20f38", "660f38", "f30fae", "0fae", "480fae", "480fc7", "9b", "d9", "db"),
    *("0f00", "0f02", "0f03", "660f", "0f6f", "0f10", "0f38f0", "c4e2", "c4e1", "c5f9", "c5fb", "62f1", "f0480fc7"),
]


def test_bytes_that_change_under_the_decoder_harm_the_guest_alone(make_pc: MakePc) -> None:
    """Instructions that need help are written over one another all the time, by both; in each second guest by halves,
    and with any operands, so that one without a meaning soon ends it.
    """
    body = f"""
    1:  movl $stack_end, %esp
        movl ${FAR}, %eax ; movl %eax, %ebx ; movl %eax, %ecx ; movl %eax, %edi ; movl %eax, %ebp
        movl turns, %esi ; andl $127, %esi ; movq {TABLE}(, %rsi, 8), %rsi ; movq %rsi, junk ; movl %eax, %esi
        call    junk
    2:  incl    turns ; cmpl ${TURNS}, turns ; jne 1b
    """
    other = f"""
        incl %ecx ; andl $127, %ecx ; movq {TABLE}(, %rcx, 8), %rax
        cmpb $0, {WILD} ; jne 3f
        movq %rax, junk ; jmp 8b
    3:  movl %eax, junk + 4
    """
    behind = ".balign 8\n junk: .fill 24, 1, 0x90\n ret\n .bss\n turns: .skip 8\n .text\n"
    code = two(body, other, handlers=dict.fromkeys(range(20), "jmp 2b"), behind=behind)
    seed = int(os.environ.get("KVMPY_SEED", random.randrange(1 << 32)))
    choose, used = random.Random(seed), Counter[str]()
    for number in range(GUESTS):
        pc = make_pc(code, "long", cores=2)
        wild = number % 2
        for at in range(TABLE, TABLE + 128 * 8, 8):
            code_of_row = bytes.fromhex(choose.choice(BEGINNINGS if wild else WHOLE))
            pc.memory.write(at, (code_of_row + (choose.randbytes(8) if wild else b"\x90" * 8))[:8])
        pc.memory.write(WILD, bytes([wild]))
        result = pc.run(timeout=SHORT)
        assert result.reason not in (EndReason.ERROR, EndReason.UNHANDLED), f"seed {seed}, guest {number}: {result}"
        used.update(result.assists)
        pc.close()
    print(f"seed {seed}: {GUESTS} guests, completed {dict(used)}")

"""Guests that flood their host, with exits, output, faults, interrupts and messages to other processors.

Each ends as it should or by its time limit; what it prints and what is logged stays bounded.
"""

import threading
from collections.abc import Callable

import pytest

from kvmpy import MiB
from kvmpy._shim import lib
from kvmpy.kvm import Rdmsr, Shutdown, Vcpu, Vm, Wrmsr
from kvmpy.machine.machine import EndReason
from kvmpy.pc import Pc, RunResult

pytestmark = pytest.mark.kvm
Run = Callable[..., RunResult]
Start = Callable[..., Vcpu]

SHORT = 0.2  # seconds: how long a guest that never ends may run
FINISH = "\n xorl %eax, %eax\n outb %al, $KVMPY_PORT_EXIT\n hlt\n"

GATE = """
        movl $handler, %eax                     # vector {vector}: a 64-bit interrupt gate
        movl $0x7000 + {vector} * 16, %edi
        movw %ax, (%rdi)
        shrl $16, %eax
        movl $0x8e000010, 2(%rdi)
        movw %ax, 6(%rdi)
        lidt idtr
        movl $0x80000, %esp
        jmp main
idtr:   .word 256 * 16 - 1
        .quad 0x7000
"""


@pytest.mark.parametrize("instruction", ["rdmsr", "wrmsr"])
def test_msr_storm_of_faults(make_pc: Callable[..., Pc], instruction: str) -> None:
    """MSRs that are not there: the guest gets its #GP each time, and ends in its own way."""
    code = GATE.format(vector=13) + (
        f"main: xorl %ebp, %ebp\n 1: movl $0x40001000, %ecx\n {instruction}\n incl %ebp\n cmpl $300, %ebp\n jb 1b\n"
        + FINISH
        + "handler: addq $8, %rsp\n addq $2, (%rsp)\n iretq"
    )
    pc = make_pc(code, "long")
    result = pc.run(timeout=10.0)
    assert result.reason is EndReason.EXIT_PORT
    assert result.registers[0]["rbp"] == 300


def test_msr_storm_of_exits(vm: Vm, start: Start) -> None:
    """KVM API §7.21, KVM_CAP_X86_USER_SPACE_MSR: unknown MSRs come to us; the answer, or #GP, goes back."""
    vm.enable_cap(lib.KVM_CAP_X86_USER_SPACE_MSR, lib.KVM_MSR_EXIT_REASON_UNKNOWN)
    vcpu = start("movl $0x40001000, %ecx\n 1: rdmsr\n incl %eax\n wrmsr\n jmp 1b", "protected")
    vcpu.set_budget(timeout=10.0)
    for number in range(200):
        exit = vcpu.next_exit()
        assert exit == Rdmsr(0x4000_1000, lib.KVM_MSR_EXIT_REASON_UNKNOWN)
        vcpu.reply_msr(number << 32 | number)
        exit = vcpu.next_exit()
        assert exit == Wrmsr(0x4000_1000, number << 32 | number + 1, lib.KVM_MSR_EXIT_REASON_UNKNOWN)
        vcpu.reply_msr(0)
    vcpu.next_exit()
    vcpu.reply_msr(None)
    assert vcpu.next_exit() == Shutdown()


@pytest.mark.parametrize(
    "code",
    [
        "1: outb %al, $0x99\n jmp 1b",
        "1: inb $0x99, %al\n jmp 1b",
        "1: movb 0xd0000000, %al\n jmp 1b",
        "1: outb %al, $0x64\n jmp 1b",
        "1: inb $0x71, %al\n incb %al\n outb %al, $0x70\n jmp 1b",
    ],
)
def test_exits_as_fast_as_they_come(run_guest: Run, code: str) -> None:
    result = run_guest(code, "protected", max_exits=10_000, timeout=SHORT)
    assert result.reason in (EndReason.BUDGET, EndReason.TIMEOUT)
    assert 0 < result.exits_total <= 10_000


def test_flood_of_the_debug_console(make_pc: Callable[..., Pc]) -> None:
    """It is heard, what is kept is at most a MiB, and nothing of it is logged."""
    result = make_pc("cld\n movw $0xe9, %dx\n 1: movw $0xffff, %cx\n rep outsb\n jmp 1b").run(timeout=SHORT)
    assert result.reason is EndReason.TIMEOUT
    assert 0 < len(result.debugcon_bytes) <= 1 * MiB


def test_flood_of_the_serial_port(make_pc: Callable[..., Pc]) -> None:
    result = make_pc("movw $0x3f8, %dx\n 1: outb %al, %dx\n jmp 1b").run(timeout=SHORT)
    assert result.reason is EndReason.TIMEOUT
    assert 0 < len(result.serial_bytes) <= 1 * MiB


def test_cpuid_loop(run_guest: Run) -> None:
    result = run_guest("xorl %esi, %esi\n 1: movl %esi, %eax\n cpuid\n incl %esi\n jmp 1b", "long", timeout=SHORT)
    assert result.reason is EndReason.TIMEOUT


# --- interrupts -------------------------------------------------------------------------------------------------


def test_pit_storm(run_guest: Run) -> None:
    """The shortest period that can be programmed, and every interrupt taken: the guest gets what KVM gives it."""
    code = """
        movw $0x2000, %sp
        movw $handler, 0x20
        movw $0, 0x22
        movb $0x11, %al
        outb %al, $0x20
        movb $0x08, %al
        outb %al, $0x21
        movb $0x04, %al
        outb %al, $0x21
        movb $0x01, %al
        outb %al, $0x21
        movb $0xfe, %al
        outb %al, $0x21
        movb $0x34, %al                         # channel 0, rate generator
        outb %al, $0x43
        movb $2, %al
        outb %al, $0x40
        xorb %al, %al
        outb %al, $0x40
        xorl %ebx, %ebx
1:      sti
        hlt
        jmp 1b
handler:
        incl %ebx
        movb $0x20, %al
        outb %al, $0x20
        iret
    """
    result = run_guest(code, timeout=SHORT)
    assert result.reason is EndReason.TIMEOUT
    assert result.registers[0]["rbx"] > 0


def test_local_apic_timer_storm(run_guest: Run) -> None:
    code = GATE.format(vector=64) + (
        """
main:   movl $0xfee00000, %ebx
        movl $0x1ff, 0xf0(%rbx)
        movl $0xb, 0x3e0(%rbx)                  # divide by 1
        movl $0x20040, 0x320(%rbx)              # periodic
        movl $1, 0x380(%rbx)
        xorl %ebp, %ebp
1:      sti
        hlt
        jmp 1b
handler:
        incl %ebp
        movl $0, 0xb0(%rbx)
        iretq
    """
    )
    result = run_guest(code, "long", timeout=SHORT)
    assert result.reason is EndReason.TIMEOUT
    assert result.registers[0]["rbp"] > 0


def test_interrupt_that_is_never_acknowledged(run_guest: Run) -> None:
    """One vector, no EOI: it comes once, or as often as the host's APIC lets it."""
    code = GATE.format(vector=64) + (
        "main: movl $0xfee00000, %ebx\n movl $0x1ff, 0xf0(%rbx)\n xorl %ebp, %ebp\n sti\n"
        "1: movl $0x44040, 0x300(%rbx)\n jmp 1b\n handler: incl %ebp\n iretq"
    )
    result = run_guest(code, "long", timeout=SHORT)
    assert result.reason is EndReason.TIMEOUT
    assert result.registers[0]["rbp"] >= 1


def test_nmi_flood_from_the_host(make_pc: Callable[..., Pc]) -> None:
    """Interrupts that are off hold no NMI back: the handler counts, and the guest goes on."""
    code = "main: xorl %ebp, %ebp\n outb %al, $0xe9\n cli\n 1: hlt\n jmp 1b\n handler: incl %ebp\n iretq"
    ready = threading.Event()
    pc = make_pc(GATE.format(vector=2) + code, "long", debugcon=lambda data: ready.set())

    def flood() -> None:
        ready.wait()
        while pc.machine.end is None:
            pc.machine.threads[0].call(lambda vcpu: vcpu.nmi())

    flooder = threading.Thread(target=flood)
    flooder.start()
    result = pc.run(timeout=SHORT, watch_halt=False)
    flooder.join()
    assert result.reason is EndReason.TIMEOUT
    assert result.registers[0]["rbp"] > 0


def test_nmi_without_a_handler(run_guest: Run) -> None:
    """By the guest's own APIC: an NMI to itself without a table shuts down."""
    code = "lidt 2f\n movl $0xfee00000, %ebx\n movl $0x1ff, 0xf0(%ebx)\n movl $0x44400, 0x300(%ebx)\n 1: jmp 1b\n"
    result = run_guest(code + "2: .word 0, 0, 0", "protected", timeout=SHORT)
    assert result.reason in (EndReason.SHUTDOWN, EndReason.INTERNAL_ERROR, EndReason.TIMEOUT)


# --- other processors -------------------------------------------------------------------------------------------

SEND = "movl $0xfee00000, %ebx\n movl $0xc4500, 0x300(%ebx)\n movl ${sipi}, 0x300(%ebx)\n"


def test_processors_that_are_never_started(run_guest: Run) -> None:
    result = run_guest(FINISH, cores=4)
    assert (result.reason, result.status) == (EndReason.EXIT_PORT, 0)


@pytest.mark.parametrize("vector", [0x00, 0xA0, 0xF0, 0xFF])
def test_processor_that_is_started_at_a_bad_vector(run_guest: Run, vector: int) -> None:
    """Page 0, video memory, our tables, the last page: it runs what lies there, or dies; the run ends in time."""
    result = run_guest(SEND.format(sipi=0xC4600 | vector) + "1: jmp 1b", "protected", cores=2, timeout=SHORT)
    assert result.reason in (EndReason.TIMEOUT, EndReason.SHUTDOWN, EndReason.INTERNAL_ERROR)


def test_init_and_sipi_flood(run_guest: Run) -> None:
    code = "1:\n" + SEND.format(sipi=0xC4608) + "jmp 1b"
    assert run_guest(code, "protected", cores=3, timeout=SHORT).reason is EndReason.TIMEOUT


def test_init_to_everybody_the_sender_included(run_guest: Run) -> None:
    """A processor may send INIT to itself: the bootstrap processor then starts at the reset vector, where no ROM is."""
    result = run_guest("movl $0xfee00000, %ebx\n 1: movl $0x84500, 0x300(%ebx)\n jmp 1b", "protected", timeout=SHORT)
    assert result.reason in (EndReason.TIMEOUT, EndReason.SHUTDOWN, EndReason.INTERNAL_ERROR)


def test_messages_to_processors_that_do_not_exist(run_guest: Run) -> None:
    code = """
        movl $0xfee00000, %ebx
        movl $0x1ff, 0xf0(%ebx)
        movl $200, %ecx
1:      movl %ecx, %eax
        shll $24, %eax
        movl %eax, 0x310(%ebx)
        movl $0x4640, 0x300(%ebx)               # SIPI without INIT
        movl $0x4500, 0x300(%ebx)
        decl %ecx
        cmpl $8, %ecx
        ja 1b
    """
    assert run_guest(code + FINISH, "protected", cores=2).reason is EndReason.EXIT_PORT


def test_everything_at_once_on_four_processors(run_guest: Run) -> None:
    """Floods of output, exits, IPIs and HLT side by side on fewer host cores; the limit ends them all."""
    code = """
        movl $text, %esi
        movl $0x8000, %edi
        movl $text_end - text, %ecx
        cld
        rep movsb
        movl $0xfee00000, %ebx
        movl $0x1ff, 0xf0(%ebx)
        movl $0xc4500, 0x300(%ebx)
        movl $0xc4608, 0x300(%ebx)
1:      movl $0xc4040, 0x300(%ebx)
        outb %al, $0xe9
        jmp 1b
        .code16
text:   outb %al, $0xe9
        outb %al, $0x99
        inb $0x71, %al
        pause
        jmp text
text_end:
    """
    result = run_guest(code, "protected", cores=4, timeout=SHORT)
    assert result.reason is EndReason.TIMEOUT
    assert result.exits_total > 0

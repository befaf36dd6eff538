"""Guests that want to hang, flood or crash their host: each ends as it should, and nothing else happens.

hostile-cases.md 70, without its parts for gdb and snapshots; tests/pc/test_pc_threads.py has 71. Every run has a time
limit; what a guest prints and what is logged stays bounded.
"""

import logging
import threading
from collections.abc import Callable, Iterator

import pytest

from kvmpy import GuestMemory, MiB
from kvmpy._shim import lib
from kvmpy.kvm import (
    BudgetSpent,
    DeadlinePassed,
    Hlt,
    InternalError,
    MmioWrite,
    Rdmsr,
    Shutdown,
    Vcpu,
    Vm,
    Wrmsr,
)
from kvmpy.machine import x86
from kvmpy.machine.layout import HOLE
from kvmpy.machine.machine import EndReason
from kvmpy.pc import Pc, RunResult

pytestmark = pytest.mark.kvm
Run = Callable[..., RunResult]
Start = Callable[..., Vcpu]

SHORT = 0.2  # seconds: how long a guest that never ends may run
NOWHERE = 0xD000_0000
FINISH = "\n xorl %eax, %eax\n outb %al, $KVMPY_PORT_EXIT\n hlt\n"


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Hold every guest to a log of a few lines."""
    with caplog.at_level(logging.DEBUG, logger="kvmpy"):
        yield
    assert len([record for record in caplog.records if record.name.startswith("kvmpy")]) < 20


# --- ends -------------------------------------------------------------------------------------------------------


def test_triple_fault(run_guest: Run) -> None:
    result = run_guest("lidt 1f\n ud2\n 1: .word 0, 0, 0", "protected")
    assert result.reason is EndReason.SHUTDOWN


def test_halt_for_ever(run_guest: Run) -> None:
    assert run_guest("1: cli\n hlt\n jmp 1b").reason is EndReason.HALTED


@pytest.mark.parametrize(
    ("code", "mode"),
    [("1: jmp 1b", "real"), ("1: jmp 1b", "protected"), ("1: jmp 1b", "long"), ("1: pause\n jmp 1b", "long")],
)
def test_infinite_loop(run_guest: Run, code: str, mode: str) -> None:
    result = run_guest(code, mode, timeout=SHORT)
    assert (result.reason, result.exits_total) == (EndReason.TIMEOUT, 0)


@pytest.mark.parametrize("code", ["int3", ".byte 0xf1", "int $0x80", "into"])
def test_software_interrupt_without_a_handler(run_guest: Run, code: str) -> None:
    """A triple fault where the processor runs it, an emulation failure where KVM must and cannot; not one silently."""
    result = run_guest(f"lidt 2f\n {code}\n 1: jmp 1b\n 2: .word 0, 0, 0", "protected", timeout=SHORT)
    allowed = {EndReason.SHUTDOWN, EndReason.INTERNAL_ERROR} | ({EndReason.TIMEOUT} if code == "into" else set())
    assert result.reason in allowed


def test_vmcall(run_guest: Run) -> None:
    """KVM answers it and the guest goes on, or refuses it, or hangs in KVM_RUN: then the time limit gets it out."""
    result = run_guest("vmcall" + FINISH, "protected", timeout=SHORT)
    assert result.reason in (
        EndReason.EXIT_PORT,
        EndReason.TIMEOUT,
        EndReason.SHUTDOWN,
        EndReason.INTERNAL_ERROR,
        EndReason.UNHANDLED,
    )


# --- I/O --------------------------------------------------------------------------------------------------------


def test_rep_outsb_to_the_serial_port(run_guest: Run) -> None:
    """Every byte: much more than any FIFO holds."""
    code = "cld\n xorw %si, %si\n movw $5000, %cx\n movw $0x3f8, %dx\n rep outsb" + FINISH
    result = run_guest(code)
    assert result.reason is EndReason.EXIT_PORT
    assert len(result.serial_bytes) == 5000


def test_rep_insb_from_the_serial_port(make_pc: Callable[..., Pc]) -> None:
    """What was fed comes first; then zeroes, for there is no more."""
    code = "cld\n movw $0x3000, %di\n movw $3000, %cx\n movw $0x3f8, %dx\n rep insb" + FINISH
    pc = make_pc(code)
    pc.serial.feed(b"typed")
    assert pc.run(timeout=5.0).reason is EndReason.EXIT_PORT
    assert pc.memory.read(0x3000, 3000) == b"typed" + bytes(2995)


@pytest.mark.parametrize(("suffix", "size"), [("b", 1), ("w", 2), ("l", 4)])
def test_string_io_to_nobody(make_pc: Callable[..., Pc], suffix: str, size: int) -> None:
    """All ones, each element counted."""
    code = f"""
        cld
        movw $0x3000, %di
        movw $1000, %cx
        movw $0x99c, %dx
        rep ins{suffix}
        movw $0x3000, %si
        movw $1000, %cx
        rep outs{suffix}
    """
    pc = make_pc(code + FINISH)
    result = pc.run(timeout=5.0)
    assert result.reason is EndReason.EXIT_PORT
    assert pc.memory.read(0x3000, 1000 * size) == b"\xff" * 1000 * size
    assert (result.unmapped_reads, result.unmapped_writes) == (1000, 1000)


def test_string_io_across_the_end_of_memory(run_guest: Run) -> None:
    """REP INSB into the hole: bytes from nobody to nobody. It ends, by the exit port or as KVM refuses it."""
    code = f"cld\n movl ${4 * MiB - 8}, %edi\n movl $16, %ecx\n movw $0x99, %dx\n rep insb"
    result = run_guest(code + FINISH, "protected", timeout=5.0)
    assert result.reason in (EndReason.EXIT_PORT, EndReason.INTERNAL_ERROR)


def test_every_port_is_survived(run_guest: Run) -> None:
    """A read of each port, and a write of ones to each that ends no run."""
    ends = (0x64, 0x92, 0xF4, 0xF5, 0xF6, 0xF7, 0xCF8, 0xCF9, 0xCFA, 0xCFB, 0x604, 0x605)
    compare = "".join(f"cmpw ${port}, %dx\n je 2f\n" for port in ends)
    code = f"xorw %dx, %dx\n 1: inb %dx, %al\n {compare} movb $0xff, %al\n outb %al, %dx\n 2: incw %dx\n"
    result = run_guest(code + "cmpw $0x1000, %dx\n jb 1b" + FINISH, timeout=20.0)
    assert result.reason is EndReason.EXIT_PORT
    assert result.unmapped_reads > 3000


def test_wide_access_to_a_port_at_the_end_of_the_space(run_guest: Run) -> None:
    result = run_guest("movw $0xffff, %dx\n inl %dx, %eax\n outl %eax, %dx" + FINISH)
    assert result.reason is EndReason.EXIT_PORT
    assert result.unmapped_reads >= 1


def test_mmio_of_eight_bytes(make_pc: Callable[..., Pc]) -> None:
    code = f"movl ${NOWHERE}, %edi\n movq (%rdi), %rax\n movq %rax, 0x3000\n movq %rax, 3(%rdi)"
    pc = make_pc(code + FINISH, "long")
    result = pc.run(timeout=5.0)
    assert result.reason is EndReason.EXIT_PORT
    assert pc.memory.read(0x3000, 8) == b"\xff" * 8
    assert (result.unmapped_reads, result.unmapped_writes) == (1, 1)


@pytest.mark.parametrize("target", [NOWHERE, 4 * MiB, HOLE, 0xFEE0_0000, 0xFFFF_FFF0])
def test_execution_where_no_ram_is(run_guest: Run, target: int) -> None:
    """Code on a device's page or on nobody's cannot be fetched: an internal error with its place."""
    result = run_guest(f"movl ${target}, %eax\n jmp *%eax", "protected", timeout=SHORT)
    assert result.reason in (EndReason.INTERNAL_ERROR, EndReason.SHUTDOWN)
    if result.reason is EndReason.INTERNAL_ERROR:
        assert f"at rip 0x{target:x}" in result.message


def test_execution_runs_off_the_end_of_ram(run_guest: Run) -> None:
    code = f"movl ${4 * MiB - 2}, %edi\n movw $0x9090, (%edi)\n jmp *%edi"
    assert run_guest(code, "protected", timeout=SHORT).reason in (EndReason.INTERNAL_ERROR, EndReason.SHUTDOWN)


def test_access_across_the_edge_of_ram(make_pc: Callable[..., Pc]) -> None:
    """Its part in RAM is written; its part beyond is nobody's: ones, counted."""
    code = f"movl ${4 * MiB - 3}, %edi\n movl $0x44332211, (%edi)\n movl (%edi), %eax\n movl %eax, 0x3000"
    pc = make_pc(code + FINISH, "protected")
    result = pc.run(timeout=5.0)
    assert result.reason is EndReason.EXIT_PORT
    assert pc.memory.read(4 * MiB - 3, 3) == b"\x11\x22\x33"
    assert pc.memory.read(0x3000, 4) == b"\x11\x22\x33\xff"
    assert (result.unmapped_reads, result.unmapped_writes) == (1, 1)


# --- memory -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["real", "protected", "long"])
def test_self_modifying_code(run_guest: Run, mode: str) -> None:
    """The instruction that was written is the one that runs, also right behind the write."""
    address = "%cs:1f + 1" if mode == "real" else "1f + 1"
    code = f"movb $5, {address}\n jmp 1f\n 1: movb $9, %al\n outb %al, $KVMPY_PORT_EXIT\n hlt"
    assert run_guest(code, mode).status == 5


@pytest.mark.parametrize("cr3", [0, 0xFFFF_F000, NOWHERE, 0x10_0000, 0x3F_F000, 0xF_FFFF_F000])
def test_cr3_is_set_to_junk(run_guest: Run, cr3: int) -> None:
    """Outside RAM, or at code that is no page table: what follows faults three times, or runs into its time."""
    result = run_guest(f"movq ${cr3}, %rax\n movq %rax, %cr3\n 1: jmp 1b", "long", timeout=SHORT)
    assert result.reason in (EndReason.SHUTDOWN, EndReason.INTERNAL_ERROR, EndReason.TIMEOUT)


def test_page_tables_that_point_everywhere(make_pc: Callable[..., Pc]) -> None:
    """Entries of ones, of nobody's memory, and of themselves."""
    for entry in ((1 << 64) - 1, NOWHERE | 3, 0xC_8003, 0x83):
        code = f"movq ${entry}, %rax\n movl $0xca000, %edi\n movl $512, %ecx\n cld\n rep stosq\n movq %cr3, %rax\n"
        pc = make_pc(code + "movq %rax, %cr3\n 1: jmp 1b", "long")
        result = pc.run(timeout=SHORT)
        assert result.reason in (EndReason.SHUTDOWN, EndReason.INTERNAL_ERROR, EndReason.TIMEOUT)


def test_page_tables_in_read_only_memory(vm: Vm, start: Start, memory: GuestMemory) -> None:
    """Accessed and dirty bits cannot be set there. Whatever KVM makes of it, the tables stay as they are."""
    with GuestMemory(1 * MiB) as rom:
        rom.write(0, x86.page_tables(0x20_0000))
        vcpu = start("movl $0x200000, %eax\n movq %rax, %cr3\n movl $5, 0x200000\n movl $6, 0x3000\n hlt", "long")
        vm.set_user_memory_region(slot=1, guest_phys_addr=0x20_0000, memory=rom.regions[0], flags=lib.KVM_MEM_READONLY)
        vcpu.set_budget(max_exits=50, timeout=SHORT)
        seen = []
        while not seen or isinstance(seen[-1], MmioWrite):
            seen.append(vcpu.next_exit())
        assert isinstance(seen[-1], Hlt | Shutdown | InternalError | DeadlinePassed | BudgetSpent)
        if isinstance(seen[-1], Hlt):
            assert MmioWrite(0x20_0000, b"\x05\0\0\0") in seen
        assert rom.read(0, 6 * 4096) == x86.page_tables(0x20_0000)
        vm.close()


# --- storms -----------------------------------------------------------------------------------------------------

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
    code = "movl $0xfee00000, %ebx\n movl $0x1ff, 0xf0(%ebx)\n movl $200, %ecx\n 1: movl %ecx, %eax\n shll $24, %eax\n"
    code += "movl %eax, 0x310(%ebx)\n movl $0x4640, 0x300(%ebx)\n movl $0x4500, 0x300(%ebx)\n decl %ecx\n cmpl $8, %ecx\n ja 1b"
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

"""Guests that want to hang, flood or crash their host: each ends as it should, and nothing else happens.

Single instructions, ports and memory; test_cpu_storms.py has the floods, tests/pc/test_pc_threads.py what other
threads do meanwhile. Every run has a time limit; what a guest prints and what is logged stays bounded.
"""

from collections.abc import Callable

import pytest

from kvmpy import GuestMemory, MiB
from kvmpy._shim import lib
from kvmpy.kvm import (
    BudgetSpent,
    DeadlinePassed,
    Hlt,
    InternalError,
    MmioWrite,
    Shutdown,
    Vcpu,
    Vm,
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

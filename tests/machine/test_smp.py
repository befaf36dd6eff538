"""Many vCPUs: woken by INIT and SIPI through both kinds of local APIC, each with an identity of its own."""

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from guest_code import assemble

from kvmpy.kvm import Vcpu
from kvmpy.machine.machine import EndReason
from kvmpy.pc import Pc, RunResult

pytestmark = pytest.mark.kvm

APIC = 0xFEE0_0000
X2APIC = "movl $0x1b, %ecx\n rdmsr\n orl $0xc00, %eax\n wrmsr\n"  # IA32_APIC_BASE: enable, in x2APIC mode

# What each core runs, in real mode at 0x8000: it leaves its ids in a table at 0x9000 and counts itself.
ANSWER = """
        xorw %ax, %ax
        movw %ax, %ds
        movl $1, %eax
        cpuid
        shrl $24, %ebx
        movl %ebx, %esi                         # the initial APIC id of leaf 1
        movl $0xb, %eax
        movl $1, %ecx
        cpuid
        movl %edx, %edi                         # the x2APIC id of leaf 0xb
        {own_id}
        movl %esi, %ebx
        shlw $2, %bx
        movb %al, 0x9000(%bx)                   # what the APIC itself says
        movw %di, %ax
        movb %al, 0x9001(%bx)
        movb $1, 0x9002(%bx)
        lock incl 0x7000
1:      cli
        hlt
        jmp 1b
"""
XAPIC_ID = "movw %si, %ax\n"  # real mode does not reach the register: leaf 1 is all it has
X2APIC_ID = X2APIC + "movl $0x802, %ecx\n rdmsr\n"

# The boot processor wakes the others, waits for them, writes the table to the debug console, and ends the run.
BOOT = """
        movl $0x80000, %esp
        {wake}
2:      pause
        cmpl ${others}, 0x7000
        jb 2b
        movl $0x9004, %esi
        movl ${others} * 4, %ecx
        movw $KVMPY_PORT_CONSOLE, %dx
        cld
        rep outsb
        xorl %eax, %eax
        outb %al, $KVMPY_PORT_EXIT
        hlt
"""
BY_XAPIC = f"movl ${APIC}, %ebx\n movl $0xc4500, 0x300(%rbx)\n movl $0xc4608, 0x300(%rbx)\n"
BY_X2APIC = X2APIC + "movl $0x830, %ecx\n xorl %edx, %edx\n movl $0xc4500, %eax\n wrmsr\n movl $0xc4608, %eax\n wrmsr\n"


def wake_all(make_pc: Callable[..., Pc], cores: int, wake: str, own_id: str) -> RunResult:
    pc = make_pc(BOOT.format(wake=wake, others=cores - 1), "long", cores=cores)
    pc.memory.write(0x8000, assemble(ANSWER.format(own_id=own_id)))
    return pc.run(timeout=60.0)


@pytest.mark.parametrize("cores", [2, 8])
@pytest.mark.parametrize(("wake", "own_id"), [(BY_XAPIC, XAPIC_ID), (BY_X2APIC, X2APIC_ID)], ids=["xapic", "x2apic"])
def test_every_core_wakes_with_an_id_of_its_own(make_pc: Callable[..., Pc], cores: int, wake: str, own_id: str) -> None:
    """Intel SDM vol. 3 §9.4.4: INIT, SIPI. CPUID leaves 1 and 0xb and the APIC agree; the id is the vCPU's."""
    result = wake_all(make_pc, cores, wake, own_id)
    assert (result.reason, result.status) == (EndReason.EXIT_PORT, 0)
    assert result.debugcon_bytes == b"".join(bytes([vcpu_id, vcpu_id, 1, 0]) for vcpu_id in range(1, cores))


def test_sixty_cores_can_be_made_and_woken(make_pc: Callable[..., Pc]) -> None:
    result = wake_all(make_pc, 60, BY_XAPIC, XAPIC_ID)
    assert (result.reason, result.status) == (EndReason.EXIT_PORT, 0)
    assert result.debugcon_bytes[2::4] == b"\1" * 59


def test_cores_share_memory_under_a_lock(run_guest: Callable[..., RunResult]) -> None:
    """XCHG is a lock by itself (Intel SDM vol. 3 §9.1.2.1): 8 cores, 100 turns each, on fewer host cores."""
    code = """
        movl $0x80000, %esp
        movl $text, %esi
        movl $0x8000, %edi
        movl $text_end - text, %ecx
        cld
        rep movsb
        movl $0xfee00000, %ebx
        movl $0xc4500, 0x300(%rbx)
        movl $0xc4608, 0x300(%rbx)
2:      pause
        cmpl $7, 0x7000
        jb 2b
        movl 0x7008, %eax
        subl $700, %eax
        outb %al, $KVMPY_PORT_EXIT
        hlt
        .code16
text:   xorw %ax, %ax
        movw %ax, %ds
        movw $100, %cx
3:      movl $1, %eax
4:      pause
        xchgl %eax, 0x7004
        testl %eax, %eax
        jnz 4b
        movl 0x7008, %eax
        incl %eax
        movl %eax, 0x7008
        movl $0, 0x7004
        loop 3b
        lock incl 0x7000
5:      cli
        hlt
        jmp 5b
text_end:
    """
    result = run_guest(code, "long", cores=8, timeout=60.0)
    assert (result.reason, result.status) == (EndReason.EXIT_PORT, 0)


def test_ap_may_end_the_run(run_guest: Callable[..., RunResult], make_pc: Callable[..., Pc]) -> None:
    pc = make_pc(BOOT.format(wake=BY_XAPIC, others=99), "long", cores=2)
    pc.memory.write(0x8000, assemble("movb $7, %al\n outb %al, $KVMPY_PORT_EXIT\n hlt"))
    result = pc.run(timeout=60.0)
    assert (result.status, result.end.vcpu_id) == (7, 1)


def test_each_vcpu_runs_on_the_host_cpu_that_it_was_pinned_to(make_pc: Callable[..., Pc]) -> None:
    """MachineSpec.pin: vCPU i on host CPU pin[i], as the kernel has it for each thread."""
    allowed = sorted(os.sched_getaffinity(0))
    pin = (allowed[-1], allowed[0])
    pc = make_pc("1: jmp 1b", cores=2, pin=pin)

    def where(vcpu: Vcpu) -> int:
        return threading.get_native_id()

    for thread, cpu in zip(pc.machine.threads, pin, strict=True):
        status = Path(f"/proc/self/task/{thread.call(where)}/status").read_text()
        assert f"\nCpus_allowed_list:\t{cpu}\n" in status
    assert sorted(os.sched_getaffinity(0)) == allowed

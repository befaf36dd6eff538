"""The way from an exit to the assists: refused MSRs, programs that may not end their machine, one `Assist` for all."""

import threading
from collections.abc import Callable

import pytest
from assist_guest import AssistedBench

from kvmpy import Kvm
from kvmpy._shim import lib
from kvmpy.kvm import Vcpu
from kvmpy.machine import paging
from kvmpy.machine.assist.context import Context, Fault
from kvmpy.machine.completer import Completer
from kvmpy.machine.machine import EndReason
from kvmpy.machine.memory import GuestMemory
from kvmpy.machine.probe import tables
from kvmpy.machine.probe.bench import Done, Mode, Trap
from kvmpy.pc import RunResult
from kvmpy.units import MiB

pytestmark = pytest.mark.kvm

NO_RAM = 8 * MiB
SMAP = 1 << 21
FINISH = "\n movb $3, %al\n outb %al, $0xf4\n cli\n hlt"


def write_lstar(high: int) -> str:
    return f"movl $0xc0000082, %ecx\n movl ${high}, %edx\n xorl %eax, %eax\n wrmsr" + FINISH


@pytest.mark.parametrize(("high", "reason"), [(0x8000_0000, EndReason.SHUTDOWN), (0, EndReason.EXIT_PORT)])
def test_entry_that_no_processor_takes_is_refused(
    run_guest: Callable[..., RunResult], high: int, reason: EndReason
) -> None:
    """An address that is not canonical: #GP, and without a handler a triple fault (Intel SDM vol. 2, WRMSR)."""
    assert run_guest(write_lstar(high), "long").reason is reason


@pytest.mark.parametrize(
    "code",
    [
        "f30fb807",  # popcnt (%rdi), %eax
        "660f38f607",  # adcx (%rdi), %eax
        "0fae2f",  # xrstor (%rdi)
        "62f17c481007",  # vmovups (%rdi), %zmm0, which nobody completes
    ],
)
def test_program_that_reads_a_device_so_does_not_end_its_machine(bench: AssistedBench, code: str) -> None:
    """It gets #UD, as from KVM where it is not asked to tell of emulation failures."""
    outcome = bench.run(bytes.fromhex(code), Mode.CPL3, rdi=NO_RAM)
    assert outcome in (Trap(6), Done(0)), outcome


def test_kernel_that_reads_a_device_so_ends_it(bench: AssistedBench) -> None:
    outcome = bench.run(bytes.fromhex("f30fb807"), Mode.CPL0, rdi=NO_RAM)
    assert not isinstance(outcome, Trap), outcome


def test_vcpus_share_one_assist(kvm: Kvm) -> None:
    with kvm.create_vm() as vm, GuestMemory(2 * MiB) as memory:
        completer = Completer(vm, memory)
        together, found = threading.Barrier(8), []

        def look() -> None:
            together.wait()
            found.append(completer.assist)

        threads = [threading.Thread(target=look) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len({id(assist) for assist in found}) == 1


@pytest.mark.parametrize("flags", [0, lib.X86_EFLAGS_AC])
def test_smap_does_not_ask_a_programs_own_flag(bench: AssistedBench, vcpu: Vcpu, flags: int) -> None:
    """A table that the processor reads for a program lies in a user's page: AC or not (Intel SDM vol. 3 §4.6)."""
    sregs = vcpu.get_sregs()
    sregs.cr4 |= SMAP
    sregs.ss.dpl = 3
    regs = vcpu.get_regs()
    regs.rflags = lib.X86_EFLAGS_FIXED | flags
    context = Context(vcpu, bench.memory, regs, sregs)
    with pytest.raises(Fault) as caught:
        context.read(tables.DATA, 8, system=True)
    assert caught.value.error_code == paging.FAULT_PROTECTION

"""Closing: from any thread, twice, under a running guest; and what is left of a vCPU afterwards."""

import gc
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest
from guest_code import assemble, set_up

from kvmpy import GuestMemory, Kvm
from kvmpy.errors import KvmError
from kvmpy.kvm import IoIn, IoOut, Vcpu, Vm

pytestmark = pytest.mark.kvm
Start = Callable[..., Vcpu]

SPIN = "1: jmp 1b"
OUTS = "1: outb %al, $1\n jmp 1b"
INS = "1: inb $1, %al\n jmp 1b"
LONG = 20.0  # seconds: a bound for what hangs, never waited for


def run_until_closed(vcpu: Vcpu, turns: int, inside: threading.Event, errors: list[BaseException]) -> None:
    """Run ``vcpu``; ``inside`` is set after ``turns`` exits, ``errors`` gets what ended it."""
    try:
        while True:
            if turns == 0:
                inside.set()
            turns -= 1
            exit = vcpu.next_exit()
            if isinstance(exit, IoIn):
                exit.reply(b"\0")
    except BaseException as error:
        errors.append(error)


@pytest.mark.parametrize("code", [SPIN, OUTS, INS])
@pytest.mark.parametrize("seed", range(10))
def test_close_from_another_thread_ends_next_exit_with_value_error(
    vm: Vm, memory: GuestMemory, code: str, seed: int
) -> None:
    """The number of the descriptor is free for others only after the thread inside has left."""
    vcpu = vm.create_vcpu(0)
    set_up(vcpu, memory, assemble(code), "real")
    turns = 0 if code == SPIN else random.Random(seed).randrange(40)
    inside = threading.Event()
    errors: list[BaseException] = []
    runner = threading.Thread(target=run_until_closed, args=(vcpu, turns, inside, errors))
    runner.start()
    assert inside.wait(LONG)
    vcpu.close()
    runner.join(LONG)
    assert not runner.is_alive()
    assert [str(error) for error in errors] == ["vCPU 0 is closed"]
    assert isinstance(errors[0], ValueError)


def test_close_twice_is_harmless(kvm: Kvm) -> None:
    vm = kvm.create_vm()
    vcpu = vm.create_vcpu(0)
    for _ in range(2):
        vcpu.close()
        vm.close()
    other = Kvm()
    other.close()
    other.close()


def test_closing_the_vm_closes_vcpus_that_nobody_holds(kvm: Kvm) -> None:
    gc.collect()  # what earlier tests dropped closes its descriptors now
    before = sorted(os.listdir("/proc/self/fd"))
    with kvm.create_vm() as vm:
        vm.create_vcpu(0)
        vm.create_vcpu(1)
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_kick_after_close_is_harmless(start: Start) -> None:
    vcpu = start("hlt")
    vcpu.close()
    vcpu.kick()


USE_AFTER_CLOSE = """
from kvmpy import Kvm, GuestMemory, MiB
from kvmpy._shim import ffi
kvm = Kvm()
vm = kvm.create_vm()
memory = GuestMemory(1 * MiB)
memory.map_into(vm)
vcpu = vm.create_vcpu(0)
regs, sregs, fpu = vcpu.get_regs(), vcpu.get_sregs(), vcpu.get_state("FPU")
{before}
kvm.close(); vm.close(); memory.close()
calls = [
    lambda: vcpu.next_exit(), lambda: next(vcpu.run()), lambda: next(vcpu.run(timeout=1.0)), lambda: vcpu.complete(),
    lambda: vcpu.get_regs(), lambda: vcpu.set_regs(regs), lambda: vcpu.get_sregs(), lambda: vcpu.set_sregs(sregs),
    lambda: vcpu.edit_regs().__enter__(), lambda: vcpu.edit_sregs().__enter__(),
    lambda: vcpu.get_state("FPU"), lambda: vcpu.set_state("FPU", fpu), lambda: vcpu.get_mp_state(),
    lambda: vcpu.set_mp_state(0), lambda: vcpu.get_msrs([0x10]), lambda: vcpu.set_msrs({{0x10: 1}}),
    lambda: vcpu.set_cpuid2([]), lambda: vcpu.set_guest_debug(0), lambda: vcpu.interrupt(3), lambda: vcpu.nmi(),
    lambda: vcpu.request_interrupt_window(True), lambda: vcpu.reply_msr(0), lambda: vcpu.translate(0),
    lambda: vcpu.get_tsc_khz(), lambda: vcpu.get_stats(),
    lambda: vm.create_vcpu(1), lambda: vm.create_irqchip(), lambda: vm.irq_line(1, True), lambda: vm.get_stats(),
    lambda: vm.set_user_memory_region(slot=0, guest_phys_addr=0, memory=memory.regions[0]),
    lambda: vm.delete_user_memory_region(0), lambda: vm.get_clock(), lambda: vm.signal_msi(0, 0),
    lambda: vm.check_extension(1), lambda: kvm.create_vm(), lambda: kvm.get_supported_cpuid(),
    lambda: kvm.get_msr_index_list(), lambda: memory.read(0, 1), lambda: memory.write(0, b"x"),
    lambda: memory.fill(0, 1), lambda: memory.populate(),
]
for number, call in enumerate(calls):
    try:
        call()
    except (ValueError, OSError):
        continue
    print("call", number, "did not fail")
for harmless in (vcpu.kick, vcpu.exits_by_reason, vcpu.last_exits, vcpu.range_counts, vcpu.close, vm.close):
    harmless()
vcpu.set_budget(max_exits=1, timeout=1.0); vcpu.trace_exits(True); vcpu.measure_time(True)
vcpu.exits_total, vcpu.cycles_in_run
print("done")
"""


@pytest.mark.parametrize("before", ["", "vcpu.complete()", "vcpu.set_budget(timeout=0.01); vcpu.next_exit()"])
def test_use_after_close_is_an_error_and_never_a_crash(before: str) -> None:
    """Each method, in a process of its own: ValueError or KvmError."""
    done = subprocess.run(
        [sys.executable, "-c", USE_AFTER_CLOSE.format(before=before)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_a_child_process_cannot_use_the_vcpu_and_does_the_parent_no_harm(start: Start) -> None:
    """Vm: never fork with an open Vm; KVM_RUN of another process is refused with EIO."""
    vcpu = start(OUTS)
    vcpu.next_exit()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            vcpu.next_exit()
        except KvmError:
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert vcpu.next_exit() == IoOut(1, 1, b"\0")

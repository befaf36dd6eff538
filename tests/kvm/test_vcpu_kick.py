"""Taking a vCPU out of the guest: kicks are never lost, signals reach Python, closing is safe from anywhere."""

import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import pytest
from guest_code import assemble, set_up

from kvmpy import GuestMemory, Kvm
from kvmpy._shim import lib
from kvmpy.errors import KvmError
from kvmpy.kvm import DeadlinePassed, Exit, Hlt, Intr, IoIn, IoOut, Vcpu, Vm

pytestmark = pytest.mark.kvm
Start = Callable[..., Vcpu]

SPIN = "1: jmp 1b"
OUTS = "1: outb %al, $1\n jmp 1b"
INS = "1: inb $1, %al\n jmp 1b"
LONG = 20.0  # seconds: a bound for what hangs, never waited for

APIC = 0xFEE0_0000
START_OTHERS = f"""
        movl $0x000c4500, {APIC + 0x300}        # INIT to all but myself
        movl $0x000c4603, {APIC + 0x300}        # SIPI, vector 3: 0x3000
"""


@contextmanager
def thread(target: Callable[[], object]) -> Iterator[threading.Thread]:
    """Run ``target`` in a thread, which has ended when the block is left."""
    running = threading.Thread(target=target)
    running.start()
    try:
        yield running
    finally:
        running.join(LONG)
        assert not running.is_alive()


def test_kick_from_another_thread_is_never_lost(start: Start) -> None:
    """design.md: the flag alone does not wake a vCPU in the guest, the signal alone loses the race. Each kick, once."""
    vcpu = start(SPIN)
    vcpu.set_budget(timeout=LONG)
    going = threading.Semaphore(0)

    def kicker() -> None:
        for _ in range(300):
            going.acquire()
            vcpu.kick()

    with thread(kicker):
        for _ in range(300):
            going.release()
            assert vcpu.next_exit() == Intr()


def test_kick_reaches_a_vcpu_that_exits_all_the_time(start: Start) -> None:
    """Whether it comes inside KVM_RUN, in C between two of them, or in Python."""
    vcpu = start(OUTS)
    vcpu.set_budget(timeout=LONG)
    going = threading.Semaphore(0)

    def kicker() -> None:
        for _ in range(300):
            going.acquire()
            vcpu.kick()

    with thread(kicker):
        for _ in range(300):
            going.release()
            while (exit := vcpu.next_exit()) != Intr():
                assert exit == IoOut(1, 1, b"\0")


def test_kick_before_entry_keeps_the_guest_from_running(start: Start) -> None:
    vcpu = start(OUTS)
    vcpu.kick()
    assert vcpu.next_exit() == Intr()
    assert (vcpu.exits_total, vcpu.get_regs().rip) == (0, 0x1000)
    assert vcpu.next_exit() == IoOut(1, 1, b"\0")


def test_two_kicks_before_entry_are_one(start: Start) -> None:
    vcpu = start(OUTS)
    vcpu.kick()
    vcpu.kick()
    assert vcpu.next_exit() == Intr()
    assert vcpu.next_exit() == IoOut(1, 1, b"\0")


def test_kick_survives_a_completion(start: Start) -> None:
    """`complete` enters KVM_RUN with the same flag as a kick does."""
    vcpu = start(OUTS)
    vcpu.next_exit()
    vcpu.kick()
    assert vcpu.complete() is False
    assert vcpu.next_exit() == Intr()


def test_kick_completes_the_exit_before_it(start: Start) -> None:
    vcpu = start("inb $0x60, %al\n outb %al, $1\n hlt")
    exit = vcpu.next_exit()
    assert isinstance(exit, IoIn)
    exit.reply(b"\x5a")
    vcpu.kick()
    assert vcpu.next_exit() == Intr()
    assert vcpu.get_regs().rax & 0xFF == 0x5A
    assert vcpu.next_exit() == IoOut(1, 1, b"\x5a")


def test_run_goes_on_after_a_kick(start: Start) -> None:
    vcpu = start("outb %al, $1\n hlt")
    vcpu.kick()
    exits = vcpu.run(timeout=LONG)
    assert [next(exits) for _ in range(3)] == [Intr(), IoOut(1, 1, b"\0"), Hlt()]


def test_kick_wakes_a_halted_vcpu_in_the_kernel(vm: Vm, start: Start) -> None:
    """With the irqchip in the kernel HLT waits there; the vCPU stays halted after the kick."""
    vm.create_irqchip()
    vcpu = start("cli\n 1: hlt\n jmp 1b")
    vcpu.set_budget(timeout=LONG)
    for _ in range(20):
        with thread(vcpu.kick):
            assert vcpu.next_exit() == Intr()
    assert vcpu.get_mp_state() in (lib.KVM_MP_STATE_HALTED, lib.KVM_MP_STATE_RUNNABLE)


# --- signals ----------------------------------------------------------------------------------------------------


class Caught(Exception):
    """What the tests' signal handlers raise."""


@contextmanager
def handler(signum: int, handle: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    before = signal.signal(signum, handle)
    try:
        yield
    finally:
        signal.signal(signum, before)


def test_signal_handler_of_python_runs_while_the_guest_spins(start: Start) -> None:
    """EINTR comes back to Python: a handler that raises ends `next_exit`, as Ctrl-C does. The guest can go on."""
    vcpu = start(SPIN)
    vcpu.set_budget(timeout=LONG)

    def handle(signum: int, frame: FrameType | None) -> None:
        raise Caught

    with handler(signal.SIGPROF, handle):
        signal.setitimer(signal.ITIMER_PROF, 0.01)
        with pytest.raises(Caught):
            vcpu.next_exit()
    vcpu.kick()
    assert vcpu.next_exit() == Intr()


def test_signal_that_raises_nothing_is_no_exit(start: Start) -> None:
    """The guest goes on by itself: `next_exit` comes back only with what the handler's kick makes."""
    vcpu = start(SPIN)
    vcpu.set_budget(timeout=LONG)
    seen: list[int] = []

    def handle(signum: int, frame: FrameType | None) -> None:
        seen.append(signum)
        if len(seen) == 3:
            vcpu.kick()

    with handler(signal.SIGPROF, handle):
        signal.setitimer(signal.ITIMER_PROF, 0.005, 0.005)
        try:
            assert vcpu.next_exit() == Intr()
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    assert len(seen) >= 3


def test_kick_with_another_signal_pending_is_not_lost(start: Start) -> None:
    vcpu = start(SPIN)
    vcpu.set_budget(timeout=LONG)
    main = threading.get_ident()
    going = threading.Semaphore(0)
    seen: list[int] = []

    def kicker() -> None:
        for _ in range(200):
            going.acquire()
            signal.pthread_kill(main, signal.SIGUSR1)
            vcpu.kick()

    with handler(signal.SIGUSR1, lambda signum, frame: seen.append(signum)), thread(kicker):
        for _ in range(200):
            going.release()
            assert vcpu.next_exit() == Intr()
    assert seen


def test_kick_from_a_signal_handler_that_interrupts_a_kick(start: Start) -> None:
    """A handler runs between any two steps of the main thread, also inside `kick`: that is no deadlock."""
    vcpu = start(OUTS)
    count = 0

    def handle(signum: int, frame: FrameType | None) -> None:
        nonlocal count
        count += 1
        vcpu.kick()

    with handler(signal.SIGPROF, handle):
        signal.setitimer(signal.ITIMER_PROF, 0.001, 0.001)
        try:
            while count < 20:
                vcpu.kick()
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    assert vcpu.next_exit() == Intr()


def test_budget_of_time_ends_a_guest_that_spins(start: Start) -> None:
    vcpu = start(SPIN)
    vcpu.set_budget(timeout=0.05)
    assert vcpu.next_exit() == DeadlinePassed()
    assert vcpu.exits_total == 0
    vcpu.set_budget(timeout=0.05)
    assert vcpu.next_exit() == DeadlinePassed()


def test_budget_of_time_ends_a_halt_in_the_kernel(vm: Vm, start: Start) -> None:
    vm.create_irqchip()
    vcpu = start("cli\n hlt")
    vcpu.set_budget(timeout=0.05)
    assert vcpu.next_exit() == DeadlinePassed()


def test_budget_of_time_that_is_over_enters_no_guest(start: Start) -> None:
    vcpu = start(OUTS)
    vcpu.set_budget(timeout=0)
    assert vcpu.next_exit() == DeadlinePassed()
    vcpu.set_budget()
    assert vcpu.next_exit() == IoOut(1, 1, b"\0")


def test_budget_of_time_holds_in_whichever_thread_runs(start: Start) -> None:
    """The timer signals one thread; the loop makes another when it finds itself in another thread."""
    vcpu = start(SPIN)
    seen: list[Exit] = []

    def run() -> None:
        vcpu.set_budget(timeout=0.02)
        seen.append(vcpu.next_exit())

    for _ in range(3):
        with thread(run):
            pass
    run()
    assert seen == [DeadlinePassed()] * 4


def test_an_ap_that_is_started_just_runs(vm: Vm, memory: GuestMemory, start: Start) -> None:
    """KVM API §4.10: KVM_RUN on an AP returns EAGAIN when its SIPI comes; nobody sees that."""
    vm.create_irqchip()
    boot = start(START_OTHERS + SPIN, "protected")
    other = vm.create_vcpu(1)
    other.set_budget(timeout=LONG)
    memory.write(0x3000, bytes.fromhex("b055e601f4"))  # movb $0x55, %al; outb %al, $1; hlt
    assert other.get_mp_state() == lib.KVM_MP_STATE_UNINITIALIZED

    def run_boot() -> None:
        assert boot.next_exit() == Intr()

    with thread(run_boot):
        assert other.next_exit() == IoOut(1, 1, b"\x55")
        boot.kick()


# --- closing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [SPIN, OUTS, INS])
def test_close_from_another_thread_ends_next_exit_with_value_error(kvm: Kvm, code: str) -> None:
    """The number of the descriptor is free for others only after the thread inside has left."""
    for _ in range(10):
        with kvm.create_vm() as vm, GuestMemory(1 << 20) as memory:
            memory.map_into(vm)
            vcpu = vm.create_vcpu(0)
            set_up(vcpu, memory, assemble(code), "real")
            turns = random.randrange(40)
            inside, errors = threading.Event(), []

            def run(vcpu: Vcpu = vcpu, turns: int = turns, inside: threading.Event = inside) -> None:
                try:
                    while True:
                        exit = vcpu.next_exit()
                        if isinstance(exit, IoIn):
                            exit.reply(b"\0")
                        turns -= 1
                        if turns < 0:
                            inside.set()
                except BaseException as error:
                    errors.append(error)

            if code == SPIN:
                inside.set()
            with thread(run):
                inside.wait(LONG)
                vcpu.close()
            assert [str(error) for error in errors] == ["vCPU 0 is closed"]
            assert isinstance(errors[0], ValueError)
            vm.close()


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

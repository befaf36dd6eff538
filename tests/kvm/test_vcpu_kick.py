"""Taking a vCPU out of the guest: kicks are never lost, signals reach Python, time limits hold."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import pytest
from guest_code import assemble, set_up

from kvmpy import GuestMemory, Kvm, MiB
from kvmpy._shim import lib
from kvmpy.kvm import DeadlinePassed, Exit, Hlt, Intr, IoIn, IoOut, Vcpu, Vm

pytestmark = pytest.mark.kvm
Start = Callable[..., Vcpu]

SPIN = "1: jmp 1b"
OUTS = "1: outb %al, $1\n jmp 1b"
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


@contextmanager
def kicks_on_demand(vcpu: Vcpu, count: int) -> Iterator[threading.Semaphore]:
    """Kick from another thread, ``count`` times in all, once for each release of the semaphore."""
    going = threading.Semaphore(0)

    def kicker() -> None:
        for _ in range(count):
            going.acquire()
            vcpu.kick()

    with thread(kicker):
        yield going


def test_kick_from_another_thread_is_never_lost(start: Start) -> None:
    """The flag alone does not wake a vCPU in the guest, the signal alone loses the race. Each kick, once."""
    vcpu = start(SPIN)
    vcpu.set_budget(timeout=LONG)
    with kicks_on_demand(vcpu, 300) as going:
        for _ in range(300):
            going.release()
            assert vcpu.next_exit() == Intr()


def test_kick_reaches_a_vcpu_that_exits_all_the_time(start: Start) -> None:
    """Whether it comes inside KVM_RUN, in C between two of them, or in Python."""
    vcpu = start(OUTS)
    vcpu.set_budget(timeout=LONG)
    with kicks_on_demand(vcpu, 300) as going:
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


def test_budget_of_a_run_ends_with_it(start: Start) -> None:
    vcpu = start(SPIN)
    assert list(vcpu.run(timeout=0.05)) == [DeadlinePassed()]
    vcpu.kick()
    assert vcpu.next_exit() == Intr()


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


def test_a_child_process_can_kick_and_time_vcpus_of_its_own(start: Start) -> None:
    """A thread has another number after fork: signals go to that one. The parent ran a vCPU in it before."""
    start("outb %al, $1").next_exit()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with Kvm() as kvm, kvm.create_vm() as vm, GuestMemory(1 * MiB) as memory:
                memory.map_into(vm)
                vcpu = vm.create_vcpu(0)
                set_up(vcpu, memory, assemble(SPIN), "real")
                vcpu.set_budget(timeout=0.02)
                assert vcpu.next_exit() == DeadlinePassed()
                vcpu.set_budget(timeout=LONG)
                for _ in range(20):
                    with thread(vcpu.kick):
                        assert vcpu.next_exit() == Intr()
                vm.close()
                status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


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

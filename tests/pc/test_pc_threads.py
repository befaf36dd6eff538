"""A second thread at any moment, Ctrl-C, an exception in a device: the PC takes it, and no other PC notices.

Each kind of guest meets each of them: those that spin, exit, print, halt, crash, reset and wake others.
"""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress

import pytest
from guest_code import assemble

from kvmpy.kvm import Intr, Vcpu
from kvmpy.kvm.exits import Exit
from kvmpy.machine.bus import Mode
from kvmpy.machine.machine import EndReason
from kvmpy.pc import Pc, RunResult

pytestmark = pytest.mark.kvm
MakePc = Callable[..., Pc]

LONG = 20.0  # seconds: a bound for what hangs, never waited for

GUESTS = {
    "spinning": ("1: jmp 1b", "real"),
    "exiting": ("1: outb %al, $0x80\n jmp 1b", "real"),
    "printing": ("1: outb %al, $0xe9\n jmp 1b", "real"),
    "string output": ("cld\n movw $0xe9, %dx\n 1: movw $999, %cx\n rep outsb\n jmp 1b", "real"),
    "halted": ("cli\n 1: hlt\n jmp 1b", "real"),
    "waiting": ("sti\n 1: hlt\n jmp 1b", "real"),
    "triple-faulting": ("lidt 1f\n ud2\n 1: .word 0, 0, 0", "protected"),
    "not emulated": ("movl $0xd0000000, %edi\n fnstenv (%rdi)", "long"),
    "resetting": ("movb $0xfe, %al\n outb %al, $0x64\n 1: jmp 1b", "real"),
    "waking others": (
        "movl $0xfee00000, %ebx\n 1: movl $0xc4500, 0x300(%ebx)\n movl $0xc4608, 0x300(%ebx)\n jmp 1b",
        "protected",
    ),
}
ENDS = {
    "triple-faulting": EndReason.SHUTDOWN,
    "not emulated": EndReason.INTERNAL_ERROR,
    "resetting": EndReason.RESET,
    "halted": EndReason.HALTED,
}


def kick(pc: Pc) -> None:
    for vcpu in pc.machine.vcpus():
        vcpu.kick()


def disturb(pc: Pc, number: random.Random, moves: int) -> None:
    """Do ``moves`` random things to a PC that another thread runs."""
    actions = [pc.pause, pc.resume, lambda: kick(pc), pc.request_stop]
    for _ in range(moves):
        with suppress(RuntimeError, OSError, ValueError):  # it may have been closed meanwhile
            number.choice(actions)()
        for _ in range(number.randrange(200)):
            pass


@pytest.mark.parametrize("last", ["stop", "close"])
@pytest.mark.parametrize("guest", GUESTS)
def test_other_threads_may_do_anything_at_any_moment(make_pc: MakePc, guest: str, last: str) -> None:
    """Two of them pause, resume, kick and ask; then one stops or closes. `run` returns, with one end."""
    code, mode = GUESTS[guest]
    for seed in range(3):
        pc = make_pc(code, mode, cores=2)
        number = random.Random(seed)

        def work(pc: Pc = pc, seed: int = seed) -> None:
            disturb(pc, random.Random(seed + 100), 10)

        def finish(pc: Pc = pc, number: random.Random = number) -> None:
            disturb(pc, number, 10)
            getattr(pc, last)()

        others = [threading.Thread(target=work), threading.Thread(target=finish)]
        for other in others:
            other.start()
        ended: set[object] = set()
        # It may be closed before it begins.
        with suppress(ValueError) if last == "close" else nullcontext():
            ended.add(pc.run(timeout=LONG).reason)
        assert ended <= {EndReason.INTERRUPTED, ENDS.get(guest)}
        for other in others:
            other.join(LONG)
            assert not other.is_alive()
        pc.close()


def test_closing_from_many_threads_closes_once(make_pc: MakePc) -> None:
    for _ in range(5):
        pc = make_pc(GUESTS["exiting"][0], cores=2)
        closers = [threading.Thread(target=pc.close) for _ in range(4)]
        for closer in closers:
            closer.start()
        with suppress(ValueError):  # it was closed before it began
            pc.run(timeout=LONG)
        for closer in closers:
            closer.join(LONG)
            assert not closer.is_alive()


def test_paused_pc_stands_still_and_goes_on(make_pc: MakePc) -> None:
    pc = make_pc(GUESTS["exiting"][0], cores=2)
    runner = threading.Thread(target=pc.run, kwargs={"timeout": LONG})
    runner.start()
    for _ in range(10):
        pc.pause()
        before = pc.machine.exits_total()
        assert pc.machine.exits_total() == before
        pc.resume()
        while pc.machine.exits_total() == before:
            time.sleep(0)  # yield: a storm of kicks could keep the guest from its next exit
    pc.stop()
    runner.join(LONG)
    assert not runner.is_alive()


def test_timeout_counts_while_paused(make_pc: MakePc) -> None:
    """Nobody can hold a run open by a pause; and resuming it afterwards runs nothing."""
    pc = make_pc(GUESTS["exiting"][0])
    pc.pause()
    paused = threading.Event()

    def pause() -> None:
        pc.pause()
        paused.set()

    pauser = threading.Thread(target=pause)
    pauser.start()
    result = pc.run(timeout=0.2)
    assert paused.wait(LONG)
    pauser.join()
    assert result.reason is EndReason.TIMEOUT
    before = pc.machine.exits_total()
    pc.resume()
    pc.pause()
    assert pc.machine.exits_total() == before


# --- exceptions -------------------------------------------------------------------------------------------------


class Broken:
    """A device that fails when it is written."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def read(self, offset: int, size: int) -> bytes:
        return bytes(size)

    def write(self, offset: int, data: bytes) -> None:
        raise self.error


@pytest.mark.parametrize("error", [ZeroDivisionError("broken"), OSError(5, "broken"), KeyboardInterrupt("broken")])
def test_exception_in_a_device_is_raised_from_run(make_pc: MakePc, error: BaseException) -> None:
    """With its own traceback, which names the device's line."""
    pc = make_pc("outb %al, $0x99\n 1: jmp 1b", cores=2)
    pc.machine.pio.attach(0x99, 1, Broken(error), name="broken")
    with pytest.raises(type(error), match="broken") as caught:
        pc.run(timeout=LONG)
    assert "write" in [frame.name for frame in caught.traceback]
    assert pc.machine.end is not None
    assert pc.machine.end.reason is EndReason.ERROR
    pc.close()


def test_exception_in_a_device_ends_only_its_own_pc(make_pc: MakePc) -> None:
    """The other PC runs on, in the same process."""
    begun = threading.Event()
    good = make_pc("1: outb %al, $0xe9\n jmp 1b", debugcon=lambda data: begun.set())
    bad = make_pc("outb %al, $0x99\n 1: jmp 1b")
    bad.machine.pio.attach(0x99, 1, Broken(ZeroDivisionError()), name="broken")
    results: list[RunResult] = []
    runner = threading.Thread(target=lambda: results.append(good.run(timeout=LONG)))
    runner.start()
    assert begun.wait(LONG)
    with pytest.raises(ZeroDivisionError):
        bad.run(timeout=LONG)
    bad.close()
    before = good.machine.exits_total()
    while good.machine.exits_total() == before:
        time.sleep(0)
    good.stop()
    runner.join(LONG)
    assert [result.reason for result in results] == [EndReason.INTERRUPTED]


def test_exception_in_a_tracer_is_raised_from_run(make_pc: MakePc) -> None:
    def trace(vcpu: Vcpu, exit: Exit) -> None:
        if not isinstance(exit, Intr):
            raise LookupError("traced")

    pc = make_pc("1: outb %al, $0x80\n jmp 1b", trace_exits=True, tracer=trace)
    with pytest.raises(LookupError, match="traced"):
        pc.run(timeout=LONG)


# --- two at once, fork, Ctrl-C ----------------------------------------------------------------------------------


def test_two_pcs_at_once_do_not_disturb_each_other(make_pc: MakePc) -> None:
    """Each prints and counts its own, in C and in Python, while the other runs, crashes or is stopped."""
    code = (
        "movw $2000, %cx\n 1: movb ${byte}, %al\n outb %al, $0xe9\n loop 1b\n movb ${byte}, %al\n outb %al, $0xf4\n hlt"
    )
    pcs = {
        byte: make_pc(code.format(byte=byte), device_modes={"debugcon": mode})
        for byte, mode in ((65, Mode.C), (66, Mode.PYTHON), (67, Mode.C))
    }
    crash = make_pc(*GUESTS["triple-faulting"])
    results: dict[int, RunResult] = {}
    runners = [
        threading.Thread(target=lambda byte=byte, pc=pc: results.update({byte: pc.run(timeout=LONG)}))
        for byte, pc in [*pcs.items(), (0, crash)]
    ]
    for runner in runners:
        runner.start()
    for runner in runners:
        runner.join(LONG)
    assert results.pop(0).reason is EndReason.SHUTDOWN
    for byte, result in results.items():
        assert result.status == byte
        assert result.debugcon_bytes == bytes([byte]) * 2000
        assert result.exits_total == 2001


def test_guest_goes_on_after_a_storm_of_kicks(make_pc: MakePc) -> None:
    """While it lasts a storm may keep the guest from its next exit; nothing of the guest is lost by it."""
    begun = threading.Event()
    pc = make_pc("1: outb %al, $0xe9\n jmp 1b", debugcon=lambda data: begun.set())
    runner = threading.Thread(target=pc.run, kwargs={"timeout": LONG})
    runner.start()
    assert begun.wait(LONG)
    for _ in range(5):
        for _ in range(20_000):
            kick(pc)
        for _ in range(2):  # what was printed before may come once
            begun.clear()
            assert begun.wait(LONG)
    pc.stop()
    runner.join(LONG)
    assert not runner.is_alive()


def test_fork_of_the_host_leaves_the_pc_alone(make_pc: MakePc) -> None:
    """A child that only ends; the vCPUs are the parent's."""
    begun = threading.Event()
    pc = make_pc("1: outb %al, $0xe9\n jmp 1b", debugcon=lambda data: begun.set())
    runner = threading.Thread(target=pc.run, kwargs={"timeout": LONG})
    runner.start()
    assert begun.wait(LONG)
    child = os.fork()
    if child == 0:
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    for _ in range(2):  # what was printed before the fork may come once
        begun.clear()
        assert begun.wait(LONG)
    pc.stop()
    runner.join(LONG)
    assert not runner.is_alive()


CTRL_C_LEVEL_2 = """
import sys, time
from kvmpy import MachineSpec, MiB, Pc
from kvmpy.machine.boot.plan import BootOptions
def say(data):
    sys.stdout.write(data.decode()); sys.stdout.flush()
with Pc(MachineSpec(sys.argv[1], cores=2, memory=4 * MiB, boot_options=BootOptions(format="flat")), debugcon=say) as pc:
    try:
        pc.run(timeout=60.0, watch_halt=False)
    except KeyboardInterrupt:
        print("interrupted")
    assert pc.machine.end is None
    before = pc.machine.exits_total()
    assert pc.machine.exits_total() == before
    pc.resume(); pc.pause()
print("closed")
"""

CTRL_C_LEVEL_1 = """
import sys
from kvmpy import GuestMemory, IoOut, Kvm, MiB, real_mode
with Kvm() as kvm, kvm.create_vm() as vm:
    memory = GuestMemory(1 * MiB)
    memory.map_into(vm)
    memory.load(sys.argv[1], gpa=0x1000)
    vcpu = vm.create_vcpu(0)
    real_mode(vcpu, entry=0x1000)
    try:
        for exit in vcpu.run(timeout=60.0):
            if isinstance(exit, IoOut):
                print(exit.data.decode(), end="", flush=True)
    except KeyboardInterrupt:
        print("interrupted")
print("closed")
"""


@pytest.mark.parametrize("program", [CTRL_C_LEVEL_1, CTRL_C_LEVEL_2], ids=["level 1", "level 2"])
@pytest.mark.parametrize("then", ["1: jmp 1b", "1: outb %al, $0x80\n jmp 1b"], ids=["spinning", "exiting"])
def test_ctrl_c_in_the_middle_of_kvm_run(tmp_path: object, program: str, then: str) -> None:
    """SIGINT becomes KeyboardInterrupt where `run` was called; everything then closes as always."""
    if program is CTRL_C_LEVEL_1:
        then = then.replace("outb %al, $0x80", "nop")
    image = os.path.join(str(tmp_path), "guest.bin")
    with open(image, "wb") as file:
        file.write(assemble(f"movb $'!', %al\n outb %al, $0xe9\n {then}"))
    child = subprocess.Popen(
        [sys.executable, "-c", program, image], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.read(1) == "!"
    child.send_signal(signal.SIGINT)
    out, error = child.communicate(timeout=60)
    assert (out, error, child.returncode) == ("interrupted\nclosed\n", "", 0)


def test_stop_is_for_signal_handlers_too(make_pc: MakePc) -> None:
    """A handler runs between any two steps of the thread that waits: also there where it is just ending the run."""
    pc = make_pc("1: jmp 1b", cores=2)
    before = signal.signal(signal.SIGPROF, lambda signum, frame: pc.stop())
    signal.setitimer(signal.ITIMER_PROF, 0.02, 0.001)
    try:
        result = pc.run(timeout=LONG)
        pc.close()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    assert result.reason is EndReason.INTERRUPTED

"""What an exit costs: answered in C, and answered by a Python device, beside the same loop in plain C.

Every guest here is that of ``c_loop.c``: a real-mode loop that writes to a port. All sides run on one CPU and take
turns, some milliseconds each.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing

import pytest
from c_program import CProgram
from conftest import OUTPUT
from pytest_benchmark.fixture import BenchmarkFixture
from sampling import Row, difference, figure, ratio

from kvmpy import GuestMemory, Kvm, MiB, real_mode
from kvmpy._shim import lib
from kvmpy.kvm import Action, FastRange, RangeTable, Space, Vcpu
from kvmpy.kvm import vcpu as vcpu_module
from kvmpy.machine.bus import Mode
from kvmpy.machine.machine import Machine

GUEST = bytes.fromhex("e6e9 ebfc")  # 1: out %al, $0xe9; jmp 1b
PORT, ENTRY = 0xE9, 0x1000
EXITS, ROUNDS = 500, 400

pytestmark = pytest.mark.usefixtures("one_cpu")


class Tally:
    """A device that does next to nothing: it counts down, and tells when it came to the end."""

    def __init__(self) -> None:
        self.left = 0
        self.ended_ns = 0
        self.ended = threading.Event()

    def read(self, offset: int, size: int) -> bytes:
        return bytes(size)

    def write(self, offset: int, data: bytes) -> None:
        self.left -= 1
        if self.left == 0:
            self.ended_ns = time.perf_counter_ns()
            self.ended.set()


class PythonDevice:
    """A machine with a `Tally`, run as every machine is: vCPU thread, typed exit, bus, device."""

    def __init__(self, kvm: Kvm, memory: GuestMemory) -> None:
        self._tally = Tally()
        self._machine = Machine(kvm, memory)
        self._machine.pio.attach(PORT, 1, self._tally, name="tally", mode=Mode.PYTHON)
        self._machine.power_on(lambda vcpu: real_mode(vcpu, ENTRY))
        self.close = self._machine.close

    def round(self, exits: int) -> float:
        """Return the microseconds of one exit, over ``exits`` of them."""
        tally = self._tally
        tally.left = exits
        tally.ended.clear()
        started_ns = time.perf_counter_ns()
        self._machine.run()
        tally.ended.wait()
        self._machine.pause()
        return (tally.ended_ns - started_ns) / exits / 1000


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """What ends when the benchmark does."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def c_loop(stack: ExitStack) -> CProgram:
    """The baseline."""
    return stack.enter_context(closing(CProgram("c_loop.c", OUTPUT)))


@pytest.fixture
def kvm(stack: ExitStack) -> Kvm:
    """An open /dev/kvm."""
    return stack.enter_context(Kvm())


def guest_memory(stack: ExitStack) -> GuestMemory:
    """Return 1 MiB with the guest in it."""
    memory = stack.enter_context(GuestMemory(1 * MiB))
    memory.write(ENTRY, GUEST)
    return memory


def bare_vcpu(kvm: Kvm, stack: ExitStack) -> Vcpu:
    """Return a vCPU of a VM with nothing but memory, as the C program has it."""
    memory = guest_memory(stack)
    vm = stack.enter_context(kvm.create_vm())
    memory.map_into(vm)
    vcpu = vm.create_vcpu(0)
    real_mode(vcpu, ENTRY)
    return vcpu


def python_device(kvm: Kvm, stack: ExitStack) -> PythonDevice:
    """Return a machine whose exits go to a Python device."""
    return stack.enter_context(closing(PythonDevice(kvm, guest_memory(stack))))


def microseconds(started_ns: int, exits: int) -> float:
    """Return the microseconds of one exit since ``started_ns``."""
    return (time.perf_counter_ns() - started_ns) / exits / 1000


def answered_in_c(vcpu: Vcpu, exits: int) -> float:
    """Take ``exits`` exits in one call, all answered by the range table."""
    vcpu.set_budget(max_exits=exits)
    started_ns = time.perf_counter_ns()
    vcpu.next_exit()
    return microseconds(started_ns, exits)


def bare_calls(vcpu: Vcpu, exits: int) -> float:
    """Take ``exits`` exits by calling the C loop for each, and do nothing with them."""
    run, loop = lib.kvmpy_run, vcpu._loop
    started_ns = time.perf_counter_ns()
    for _ in range(exits):
        run(loop)
    return microseconds(started_ns, exits)


def typed_exits(vcpu: Vcpu, exits: int) -> float:
    """Take ``exits`` exits as typed objects, and do nothing with them."""
    next_exit = vcpu.next_exit
    started_ns = time.perf_counter_ns()
    for _ in range(exits):
        next_exit()
    return microseconds(started_ns, exits)


def test_exit_answered_in_c(
    benchmark: BenchmarkFixture, rows: list[Row], c_loop: CProgram, kvm: Kvm, stack: ExitStack
) -> None:
    """One call of `Vcpu.next_exit` with a budget, its range a SINK, against the C program."""
    vcpu = bare_vcpu(kvm, stack)
    vcpu.use_ranges(RangeTable([(Space.PIO, PORT, FastRange(0, 1, on_write=Action.SINK))]))
    ours: list[float] = []
    theirs: list[float] = []

    def baseline() -> None:
        theirs.append(c_loop.round(str(2 * EXITS)))

    def target() -> None:
        ours.append(answered_in_c(vcpu, 2 * EXITS))

    benchmark.pedantic(target, setup=baseline, rounds=ROUNDS)
    rows.append(ratio("exit answered in C / C program", "us", ours, theirs, aim=1.02))


def test_exit_answered_in_python(
    benchmark: BenchmarkFixture, rows: list[Row], c_loop: CProgram, kvm: Kvm, stack: ExitStack
) -> None:
    """The whole way to a Python device against the C program, and how much of it is the call out of C alone."""
    vcpu, device = bare_vcpu(kvm, stack), python_device(kvm, stack)
    device.round(EXITS)
    c: list[float] = []
    bare: list[float] = []
    typed: list[float] = []
    ours: list[float] = []

    def baselines() -> None:
        c.append(c_loop.round(str(EXITS)))
        bare.append(bare_calls(vcpu, EXITS))
        typed.append(typed_exits(vcpu, EXITS))

    def target() -> None:
        ours.append(device.round(EXITS))

    benchmark.pedantic(target, setup=baselines, rounds=ROUNDS)
    rows.append(difference("exit answered by a Python device / C", "us", ours, c, aim=1.2))
    rows.append(difference("  of that: calls of the C loop alone", "us", bare, c))
    rows.append(difference("  of that: and the typed exit", "us", typed, c))


def test_python_part_of_an_exit(
    benchmark: BenchmarkFixture,
    rows: list[Row],
    kvm: Kvm,
    stack: ExitStack,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same Python work with no KVM_RUN in between: what it costs where an exit leaves the processor warm."""
    device = python_device(kvm, stack)
    device.round(EXITS)
    # The loop without its KVM_RUN: it finds the last exit again and again.
    monkeypatch.setattr(vcpu_module, "_kvmpy_run", lib.kvmpy_handle_exit)
    warm: list[float] = []
    benchmark.pedantic(lambda: warm.append(device.round(20 * EXITS)), rounds=30, warmup_rounds=2)
    rows.append(figure("  the same work without KVM_RUN", "us", warm, aim=1.2))

"""The bare board: exits reach the devices, the first end counts, and a paused machine stands still."""

import os
import threading
import time
from collections.abc import Iterator

import pytest
from guest_code import assemble, set_up

from kvmpy import GuestMemory, Kvm, MiB
from kvmpy._shim import lib
from kvmpy.devices.debug import Counter, ExitPort
from kvmpy.errors import KvmError
from kvmpy.kvm import Exit, InternalError, Intr, IoIn, IoOut, MmioRead, MmioWrite, Shutdown, Vcpu
from kvmpy.machine.bus import Mode
from kvmpy.machine.machine import End, EndReason, Machine

pytestmark = pytest.mark.kvm

LONG = 20.0  # seconds: a bound for what hangs, never waited for
NOWHERE = 0xD000_0000
SPIN = "1: jmp 1b"
OUTS = "1: outb %al, $0x80\n jmp 1b"
FINISH = "\n movb $3, %al\n outb %al, $0xf4\n cli\n hlt"


class Written:
    """A device that keeps what is written and reads as it counts up."""

    def __init__(self) -> None:
        self.written: list[tuple[int, bytes]] = []
        self.reads = 0

    def read(self, offset: int, size: int) -> bytes:
        self.reads += 1
        return (offset << 4 | self.reads).to_bytes(size, "little")

    def write(self, offset: int, data: bytes) -> None:
        self.written.append((offset, data))


class Bench:
    """Machines with one device at port 0x80, one at NOWHERE, and the exit port."""

    def __init__(self, kvm: Kvm) -> None:
        self.kvm = kvm
        self.ends: list[End] = []
        self.ended = threading.Event()
        self.port, self.window = Written(), Written()
        self.machine: Machine
        self.memory: GuestMemory

    def on_end(self, end: End) -> None:
        self.ends.append(end)
        self.ended.set()

    def make(self, text: str, mode: str = "real", *, cores: int = 1, power: bool = True) -> Machine:
        self.memory = GuestMemory(2 * MiB)
        self.machine = machine = Machine(self.kvm, self.memory, cores=cores, on_end=self.on_end)
        machine.pio.attach(0x80, 4, self.port, name="port")
        machine.pio.attach(
            0xF4, 4, ExitPort(lambda value: machine.finish(End(EndReason.EXIT_PORT, value=value))), name="exit"
        )
        machine.mmio.attach(NOWHERE, 16, self.window, name="window")
        if power:
            machine.power_on(lambda vcpu: set_up(vcpu, self.memory, assemble(text, mode), mode))
        return machine

    def run(self, text: str, mode: str = "real", **options: int) -> End:
        machine = self.make(text, mode, **options)
        machine.run()
        assert self.ended.wait(LONG)
        machine.pause_ended()
        return self.ends[0]


@pytest.fixture
def bench(kvm: Kvm) -> Iterator[Bench]:
    bench = Bench(kvm)
    yield bench
    bench.machine.close()
    bench.memory.close()


def test_port_accesses_reach_the_device_with_their_offset(bench: Bench) -> None:
    code = "movl $0x44332211, %eax\n outb %al, $0x80\n outw %ax, $0x82\n outl %eax, $0x80\n inb $0x83, %al\n"
    end = bench.run(code + "outb %al, $0x80" + FINISH)
    assert bench.port.written == [(0, b"\x11"), (2, b"\x11\x22"), (0, b"\x11\x22\x33\x44"), (0, b"\x31")]
    assert (end.reason, end.value, end.vcpu_id) == (EndReason.EXIT_PORT, 3, 0)


def test_every_element_of_string_io_reaches_the_device(bench: Bench) -> None:
    """String I/O arrives with ``io.count`` above 1, and every device sees each element."""
    code = "cld\n movw $0x3000, %di\n movw $0x80, %dx\n movw $5, %cx\n rep insb\n movw $0x3000, %si\n movw $5, %cx\n"
    bench.run(code + "rep outsb" + FINISH)
    assert bench.port.reads == 5
    assert bench.port.written == [(0, bytes([n])) for n in range(1, 6)]
    assert bench.memory.read(0x3000, 5) == bytes(range(1, 6))


def test_elements_that_come_in_one_exit_are_taken_apart(bench: Bench) -> None:
    """Whether KVM bundles an OUTS is its own business: here is an exit as those hosts give it that do."""
    machine = bench.make(SPIN)
    vcpu = next(machine.vcpus())
    assert machine._handle(vcpu, IoOut(0x80, 2, b"aabbcc", 3))
    assert bench.port.written == [(0, b"aa"), (0, b"bb"), (0, b"cc")]
    exit = IoIn(0x82, 2, 3, memoryview(bytearray(6)))
    assert machine._handle(vcpu, exit)
    assert bytes(exit.buffer) == b"\x21\0\x22\0\x23\0"


def test_memory_accesses_reach_the_device(bench: Bench) -> None:
    code = f"movl ${NOWHERE}, %edi\n movq $0x1122334455667788, %rax\n movq %rax, 8(%rdi)\n movl 4(%rdi), %ecx\n"
    bench.run(code + "movl %ecx, (%rdi)\n movb $3, %al\n outb %al, $0xf4\n hlt", "long")
    assert bench.window.written == [(8, bytes.fromhex("8877665544332211")), (0, b"\x41\0\0\0")]


def test_nobodys_ports_and_addresses_read_as_ones(bench: Bench) -> None:
    code = "inb $0x99, %al\n outb %al, $0x80\n movl 0xe0000000, %eax\n outl %eax, $0x80\n outb %al, $0x99"
    bench.run(code + FINISH, "protected")
    assert bench.port.written == [(0, b"\xff"), (0, b"\xff\xff\xff\xff")]
    assert (bench.machine.pio.unmapped_reads, bench.machine.pio.unmapped_writes) == (1, 1)
    assert bench.machine.mmio.unmapped_reads == 1


def test_triple_fault_ends_the_machine(bench: Bench) -> None:
    end = bench.run("lidt 1f\n movl $1, %eax\n ud2\n 1: .word 0, 0, 0", "protected")
    assert (end.reason, end.exit) == (EndReason.SHUTDOWN, Shutdown())


def test_what_kvm_cannot_emulate_ends_the_machine(bench: Bench) -> None:
    end = bench.run(f"movl ${NOWHERE}, %edi\n fnstenv (%rdi)", "long")
    assert end.reason is EndReason.INTERNAL_ERROR
    assert isinstance(end.exit, InternalError)
    assert end.exit.instruction[:2] == bytes.fromhex("d937")


def test_exit_port_that_c_owns_ends_the_machine(bench: Bench) -> None:
    """The range in the table says EXIT; no Python device is asked."""
    end = bench.run("movw $0x1234, %ax\n outw %ax, $0xf4\n hlt")
    assert (end.reason, end.value) == (EndReason.EXIT_PORT, 0x1234)
    assert bench.machine.fast_use(next(o for o in bench.machine.pio if o.name == "exit")) == (0, 1)


@pytest.mark.parametrize("mode", Mode)
def test_fast_ranges_are_used_only_in_mode_c(bench: Bench, mode: Mode) -> None:
    machine = bench.make("", power=False)
    counter = Counter(1)
    owner = machine.pio.attach(0x10, 1, counter, name="counter", mode=mode)
    code = "movw $50, %cx\n 1: outb %al, $0x10\n loop 1b" + FINISH
    machine.power_on(lambda vcpu: set_up(vcpu, bench.memory, assemble(code), "real"))
    machine.run()
    assert bench.ended.wait(LONG)
    machine.pause_ended()
    assert counter.value == 50
    assert (machine.fast_use(owner), owner.writes) == (((0, 50), 0) if mode is Mode.C else ((0, 0), 50))


def test_tracer_sees_every_exit_after_it_was_handled(bench: Bench) -> None:
    """With `trace_exits`, those that C would answer too; the reply of a read is in it by then."""
    machine = bench.make("", power=False)
    machine.pio.attach(0x10, 1, Counter(1), name="counter")
    seen: list[tuple[int, Exit, bytes]] = []

    def trace(vcpu: Vcpu, exit: Exit) -> None:
        reply = bytes(exit.buffer) if isinstance(exit, IoIn | MmioRead) else b""
        seen.append((vcpu.vcpu_id, exit, reply))

    machine.tracer = trace
    code = f"outb %al, $0x10\n inb $0x81, %al\n movb {NOWHERE}, %al\n movb %al, {NOWHERE + 1}\n movb $3, %al\n"

    def start(vcpu: Vcpu) -> None:
        vcpu.trace_exits(True)
        set_up(vcpu, bench.memory, assemble(code + FINISH, "protected"), "protected")

    machine.power_on(start)
    machine.run()
    assert bench.ended.wait(LONG)
    machine.pause_ended()
    assert [row for row in seen if row[1] != Intr()] == [
        (0, IoOut(0x10, 1, b"\0"), b""),
        (0, IoIn(0x81, 1), b"\x11"),
        (0, MmioRead(NOWHERE, 1), b"\x01"),
        (0, MmioWrite(NOWHERE + 1, b"\x01"), b""),
        (0, IoOut(0xF4, 1, b"\x03"), b""),
    ]


# --- ends -------------------------------------------------------------------------------------------------------


def test_only_the_first_end_counts(bench: Bench) -> None:
    machine = bench.make(SPIN)
    machine.run()
    callers = [threading.Thread(target=machine.finish, args=(End(EndReason.TIMEOUT, value=n),)) for n in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(bench.ends) == 1
    assert machine.end is bench.ends[0]


def test_end_takes_all_vcpus_out_of_the_guest(bench: Bench) -> None:
    machine = bench.make(OUTS, cores=2)
    machine.run()
    machine.finish(End(EndReason.TIMEOUT))
    machine.pause_ended()
    before = machine.exits_total()
    assert machine.exits_total() == before


@pytest.mark.parametrize("code", [SPIN, OUTS])
def test_machine_does_not_run_on_after_its_end(bench: Bench, code: str) -> None:
    """Whoever paused it before may resume it only afterwards: then the guest stays where it is."""
    machine = bench.make(code)
    machine.run()
    machine.pause()
    machine.finish(End(EndReason.TIMEOUT))
    machine.threads[0].call(lambda vcpu: None)
    before = machine.exits_total()
    for _ in range(3):
        machine.run()
        wait_until_it_stands(machine)
    assert machine.exits_total() == before


def wait_until_it_stands(machine: Machine) -> None:
    """Wait until no vCPU is let into the guest any more; nobody is kicked for that."""
    limit = time.monotonic() + LONG
    while not all(thread._paused for thread in machine.threads):
        assert time.monotonic() < limit, "a vCPU runs on"
        os.sched_yield()


def test_resuming_races_with_the_end(bench: Bench) -> None:
    """In whatever order the two come, no vCPU is in the guest for long when both are over."""
    for _ in range(20):
        machine = bench.make(SPIN)
        machine.run()
        machine.pause()
        resumer = threading.Thread(target=machine.run)
        resumer.start()
        machine.threads[0].call(lambda vcpu: None)
        machine.finish(End(EndReason.TIMEOUT))
        resumer.join()
        wait_until_it_stands(machine)
        machine.close()
        bench.memory.close()


def test_end_that_comes_between_look_and_resume_still_ends(bench: Bench) -> None:
    """The narrowest of these races, made to happen: the end's kick is spent when the vCPU is resumed."""
    machine = bench.make(SPIN)
    thread = machine.threads[0]
    resume = thread.resume

    def resume_late() -> None:
        machine.finish(End(EndReason.TIMEOUT))
        resume()
        wait_until_it_stands(machine)
        resume()

    thread.resume = resume_late
    machine.run()
    wait_until_it_stands(machine)


def test_device_that_raises_ends_the_machine_with_its_error(bench: Bench) -> None:
    machine = bench.make("", power=False)

    class Broken(Written):
        def write(self, offset: int, data: bytes) -> None:
            raise ZeroDivisionError("broken")

    machine.pio.attach(0x10, 1, Broken(), name="broken")
    machine.power_on(lambda vcpu: set_up(vcpu, bench.memory, assemble("outb %al, $0x10\n" + SPIN), "real"))
    machine.run()
    assert bench.ended.wait(LONG)
    machine.pause_ended()
    assert bench.ends[0].reason is EndReason.ERROR
    assert bench.ends[0].vcpu_id == 0
    assert str(bench.ends[0].error) == "broken"


# --- vCPUs, power -----------------------------------------------------------------------------------------------


def test_machine_is_paused_when_it_is_made(bench: Bench) -> None:
    machine = bench.make(OUTS)
    machine.pause()
    assert machine.exits_total() == 0


def test_pause_stops_every_vcpu_and_run_goes_on(bench: Bench) -> None:
    machine = bench.make(OUTS)
    total = 0
    for _ in range(20):
        machine.run()
        while machine.exits_total() == total:
            time.sleep(0)
        machine.pause()
        total = machine.exits_total()
        assert machine.exits_total() == total
    assert len(bench.port.written) in (total, total - 1)


def test_aps_wait_for_their_init(bench: Bench) -> None:
    """KVM API §4.38: the first vCPU is runnable, all others wait for INIT."""
    machine = bench.make(SPIN, cores=3)
    states = [thread.call(lambda vcpu: vcpu.get_mp_state()) for thread in machine.threads]
    assert states == [lib.KVM_MP_STATE_RUNNABLE] + [lib.KVM_MP_STATE_UNINITIALIZED] * 2


def test_vcpus_have_the_pics_on_lint0(bench: Bench) -> None:
    """MP specification 1.4 §3.6.2.2, virtual-wire mode: ExtINT on LINT0, NMI on LINT1."""
    machine = bench.make(SPIN)
    lapic = machine.threads[0].call(lambda vcpu: vcpu.get_state("LAPIC"))
    words = [b"".join(lapic.regs[0x350 + 0x10 * pin : 0x354 + 0x10 * pin]) for pin in (0, 1)]
    assert [int.from_bytes(word, "little") & 0x1_0700 for word in words] == [0x700, 0x400]


def test_power_on_that_fails_names_the_vcpu(bench: Bench) -> None:
    """KVM_CREATE_VCPU of an id that is taken: the error of the thread arrives where the machine was switched on."""
    machine = bench.make("", cores=2, power=False)
    machine.vm.create_vcpu(1)
    with pytest.raises(KvmError, match=r"^KVM_CREATE_VCPU: EEXIST \(vcpu_id=1\)$"):
        machine.power_on(lambda vcpu: None)


def test_close_twice_is_harmless(bench: Bench) -> None:
    machine = bench.make(SPIN)
    machine.run()
    machine.close()
    machine.close()
    assert [thread for thread in threading.enumerate() if thread.name.startswith("kvmpy-vcpu")] == []


def test_memory_that_does_not_fit_leaves_no_vm(kvm: Kvm) -> None:
    """A machine that cannot be made closes what it has opened."""

    class TwoInOne(GuestMemory):
        def map_into(self, vm: object, *, first_slot: int = 0) -> None:
            super().map_into(vm, first_slot=first_slot)
            super().map_into(vm, first_slot=5)

    before = sorted(os.listdir("/proc/self/fd"))
    with TwoInOne(1 * MiB) as memory, pytest.raises(KvmError, match="EEXIST"):
        Machine(kvm, memory)
    assert sorted(os.listdir("/proc/self/fd")) == before

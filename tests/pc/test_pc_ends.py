"""How a run ends: every reason, its exit status, and one line that says why."""

import threading
from collections.abc import Callable

import pytest

from kvmpy._shim import lib
from kvmpy.errors import KvmError
from kvmpy.kvm import Debug, Exit, InternalError, Vcpu
from kvmpy.machine.machine import EndReason
from kvmpy.pc import DebugExit, ExitStatus, Pc, RunResult

pytestmark = pytest.mark.kvm
Run = Callable[..., RunResult]

SPIN = "1: jmp 1b"
OUTS = "1: outb %al, $0x80\n jmp 1b"


def write_port(port: int, value: int, *, size: int = 1) -> str:
    register = {1: "%al", 2: "%ax", 4: "%eax"}[size]
    return f"movw ${port}, %dx\n movl ${value}, %eax\n out {register}, %dx\n cli\n 1: hlt\n jmp 1b"


@pytest.mark.parametrize(("value", "status"), [(0, 0), (1, 1), (0x7F, 0x7F), (0x80, 0), (0xFF, 0x7F)])
def test_exit_port_ends_with_the_low_seven_bits(run_guest: Run, value: int, status: int) -> None:
    """The guest's own value v ends the run with v & 0x7f: success is 0, and no value gives a status of kvmpy's own."""
    result = run_guest(write_port(lib.KVMPY_PORT_EXIT, value))
    assert (result.reason, result.status, result.message) == (EndReason.EXIT_PORT, status, "")
    assert result.end.value == value


@pytest.mark.parametrize("size", [2, 4])
def test_exit_port_takes_wide_writes(run_guest: Run, size: int) -> None:
    result = run_guest(write_port(lib.KVMPY_PORT_EXIT, 0x1_0005 if size == 4 else 0x105, size=size))
    assert (result.reason, result.status) == (EndReason.EXIT_PORT, 5)


@pytest.mark.parametrize(("value", "status"), [(0, 1), (1, 3), (0x10, 0x21), (0x7F, 0xFF), (0x80, 1)])
def test_debug_exit_of_qemu_is_never_success(run_guest: Run, value: int, status: int) -> None:
    """QEMU's isa-debug-exit: (v << 1) | 1."""
    result = run_guest(write_port(lib.KVMPY_PORT_EXIT, value), debug_exit=DebugExit.QEMU)
    assert (result.reason, result.status) == (EndReason.EXIT_PORT, status)


def test_power_off_is_success(run_guest: Run) -> None:
    """ACPI 6.5 §4.8.3.2.1: SLP_TYP of S5 with SLP_EN."""
    control = lib.KVMPY_ACPI_S5 << 10 | 1 << 13
    result = run_guest(write_port(lib.KVMPY_PORT_ACPI_CONTROL, control, size=2))
    assert (result.reason, result.status, result.message) == (EndReason.POWER_OFF, 0, "")


@pytest.mark.parametrize(("port", "value"), [(0x64, 0xFE), (0x92, 0x01), (lib.KVMPY_PORT_RESET, 0x06)])
def test_each_reset_port_ends_with_reset(run_guest: Run, port: int, value: int) -> None:
    result = run_guest(write_port(port, value))
    assert (result.reason, result.status) == (EndReason.RESET, ExitStatus.RESET)
    assert result.message == "the guest reset the machine"


def test_triple_fault_is_a_crash_with_its_place(run_guest: Run) -> None:
    """Where RIP is afterwards depends on the processor: the message claims no more than it knows."""
    result = run_guest("lidt 1f\n ud2\n 1: .word 0, 0, 0", "protected")
    assert (result.reason, result.status) == (EndReason.SHUTDOWN, ExitStatus.CRASH)
    assert result.message.startswith("vCPU 0: triple fault, last known rip 0x")


def test_instruction_that_cannot_be_emulated_is_shown(run_guest: Run) -> None:
    result = run_guest("movl $0xd0000000, %edi\n fnstenv (%rdi)", "long")
    assert (result.reason, result.status) == (EndReason.INTERNAL_ERROR, ExitStatus.CRASH)
    assert isinstance(result.end.exit, InternalError)
    assert "KVM cannot emulate the instruction d9 37" in result.message
    assert "at rip 0x100005 (KVM_EXIT_INTERNAL_ERROR, suberror 1)" in result.message
    assert result.message.endswith("nor does kvmpy: its operand at gpa 0xd0000000 is not RAM")
    assert "\n" not in result.message


def test_fetch_from_nowhere_is_told(run_guest: Run) -> None:
    result = run_guest("movl $0xd0000000, %eax\n jmp *%eax", "protected")
    assert (result.reason, result.status) == (EndReason.INTERNAL_ERROR, ExitStatus.CRASH)
    assert result.message.startswith("vCPU 0: KVM cannot ")
    assert "at rip 0xd0000000 (KVM_EXIT_INTERNAL_ERROR, suberror 1)" in result.message


HALTED = "cli\n hlt"
INIT_OTHERS = "movl $0xfee00000, %ebx\n movl $0xc4500, 0x300(%ebx)\n"


@pytest.mark.parametrize(
    ("code", "mode", "cores"),
    [(HALTED, "real", 1), (HALTED, "real", 3), (INIT_OTHERS + HALTED, "protected", 2)],
    ids=["alone", "others never started", "others in INIT"],
)
def test_halted_for_ever_is_seen_and_told(run_guest: Run, code: str, mode: str, cores: int) -> None:
    """With the irqchip in the kernel such a guest never exits: all vCPUs halted with interrupts off, or not started."""
    result = run_guest(code, mode, cores=cores)
    assert (result.reason, result.status) == (EndReason.HALTED, ExitStatus.CRASH)
    assert result.message.startswith("halted for ever: HLT with interrupts off before rip 0x")


def test_halt_is_not_watched_when_nobody_wants_it(make_pc: Callable[..., Pc]) -> None:
    result = make_pc(HALTED).run(timeout=0.3, watch_halt=False)
    assert result.reason is EndReason.TIMEOUT


def test_halt_with_interrupts_on_is_no_end(run_guest: Run) -> None:
    """Something may wake it: only the time limit ends it."""
    result = run_guest("sti\n 1: hlt\n jmp 1b", timeout=0.4)
    assert (result.reason, result.status, result.message) == (EndReason.TIMEOUT, ExitStatus.LIMIT, "timeout")


@pytest.mark.parametrize("code", [SPIN, OUTS, "1: outb %al, $0xe9\n jmp 1b", "sti\n 1: hlt\n jmp 1b"])
def test_timeout_ends_whatever_does_not_end(run_guest: Run, code: str) -> None:
    result = run_guest(code, timeout=0.15)
    assert (result.reason, result.status) == (EndReason.TIMEOUT, ExitStatus.LIMIT)


def test_timeout_of_nothing_ends_at_once(run_guest: Run) -> None:
    assert run_guest(SPIN, timeout=0.0).reason is EndReason.TIMEOUT


@pytest.mark.parametrize("max_exits", [0, 1, 500])
def test_budget_of_exits_is_exact(run_guest: Run, max_exits: int) -> None:
    """Exits that C answers count as those that Python does."""
    for code in (OUTS, "1: outb %al, $0xe9\n jmp 1b"):
        result = run_guest(code, max_exits=max_exits)
        assert (result.reason, result.status) == (EndReason.BUDGET, ExitStatus.LIMIT)
        assert result.exits_total == max_exits
        assert result.message == "exit budget spent"


def test_stop_from_another_thread_is_an_interruption(make_pc: Callable[..., Pc]) -> None:
    begun = threading.Event()
    pc = make_pc("outb %al, $0xe9\n" + SPIN, debugcon=lambda data: begun.set())
    stopper = threading.Thread(target=lambda: begun.wait() and pc.stop())
    stopper.start()
    result = pc.run(timeout=20.0)
    stopper.join()
    assert (result.reason, result.status) == (EndReason.INTERRUPTED, ExitStatus.INTERRUPTED)
    assert result.message == "interrupted"


def test_stop_before_the_run_ends_it_before_its_first_instruction(make_pc: Callable[..., Pc]) -> None:
    pc = make_pc(OUTS)
    pc.stop(EndReason.POWER_OFF)
    result = pc.run(timeout=20.0)
    assert (result.reason, result.exits_total) == (EndReason.POWER_OFF, 0)


def test_exit_that_nobody_handles_is_told(make_pc: Callable[..., Pc]) -> None:
    """A Debug exit that nobody asked this board for."""
    pc = make_pc("1: nop\n jmp 1b")
    control = lib.KVM_GUESTDBG_ENABLE | lib.KVM_GUESTDBG_SINGLESTEP
    pc.machine.threads[0].call(lambda vcpu: vcpu.set_guest_debug(control))
    result = pc.run(timeout=1.0)
    if result.reason is EndReason.TIMEOUT:
        pytest.skip("this host does not single-step guests")
    assert (result.reason, result.status) == (EndReason.UNHANDLED, ExitStatus.CRASH)
    assert isinstance(result.end.exit, Debug)
    assert result.message.startswith("vCPU 0: nobody handles Debug(")
    assert result.message.endswith("at rip 0x1001")


def test_refusal_by_the_host_is_a_result(make_pc: Callable[..., Pc]) -> None:
    """KvmError in a vCPU's thread: status 196 and the error's line, no traceback."""

    def refuse(vcpu: Vcpu, exit: Exit) -> None:
        raise KvmError(14, "KVM_RUN", f"vcpu_id={vcpu.vcpu_id}")

    result = make_pc(OUTS, trace_exits=True, tracer=refuse).run(timeout=20.0)
    assert (result.reason, result.status) == (EndReason.ERROR, ExitStatus.HOST)
    assert result.message == "KVM_RUN: EFAULT (vcpu_id=0)"


def test_statuses_of_kvmpy_are_returned_by_no_exit_port() -> None:
    """They are even and above 127."""
    values = {v & 0x7F for v in range(256)} | {(v << 1 | 1) & 0xFF for v in range(256)}
    assert not values & {int(status) for status in ExitStatus}


def test_pc_runs_once(make_pc: Callable[..., Pc]) -> None:
    pc = make_pc(HALTED)
    pc.run(timeout=20.0)
    with pytest.raises(ValueError, match="ran already"):
        pc.run()


def test_pc_that_is_closed_does_not_run(make_pc: Callable[..., Pc]) -> None:
    pc = make_pc(HALTED)
    pc.close()
    pc.close()
    with pytest.raises(ValueError, match="closed"):
        pc.run()

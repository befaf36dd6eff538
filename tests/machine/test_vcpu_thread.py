"""The thread of a vCPU: it serves exits, does what others ask between them, and ends in good order."""

import os
import threading
from collections.abc import Callable, Iterator

import pytest
from guest_code import assemble, set_up

from kvmpy import GuestMemory
from kvmpy.kvm import Exit, Hlt, Intr, IoOut, MmioRead, MmioWrite, Vcpu, Vm
from kvmpy.machine.vcpu_thread import VcpuThread

pytestmark = pytest.mark.kvm

LONG = 20.0  # seconds: a bound for what hangs, never waited for
SPIN = "1: jmp 1b"
OUTS = "1: outb %al, $1\n jmp 1b"
SSE = "movq %cr4, %rax\n orq $0x600, %rax\n movq %rax, %cr4\n"  # OSFXSR, OSXMMEXCPT


class Board:
    """Makes vCPU threads, and keeps what they report."""

    def __init__(self, vm: Vm, memory: GuestMemory) -> None:
        self.vm, self.memory = vm, memory
        self.exits: list[Exit] = []
        self.errors: list[tuple[int, BaseException]] = []
        self.failed = threading.Event()
        self.threads: list[VcpuThread] = []

    def start(
        self, text: str, mode: str = "real", *, handle: Callable[[Vcpu, Exit], bool] | None = None, **options: int
    ) -> VcpuThread:
        code = assemble(text, mode)
        thread = VcpuThread(
            self.vm,
            len(self.threads),
            prepare=lambda vcpu: set_up(vcpu, self.memory, code, mode),
            handle=handle or self.handle,
            on_error=self.on_error,
            **options,
        )
        self.threads.append(thread)
        return thread

    def handle(self, vcpu: Vcpu, exit: Exit) -> bool:
        self.exits.append(exit)
        return not isinstance(exit, Hlt)

    def on_error(self, vcpu_id: int, error: BaseException) -> None:
        self.errors.append((vcpu_id, error))
        self.failed.set()


@pytest.fixture
def board(vm: Vm, memory: GuestMemory) -> Iterator[Board]:
    board = Board(vm, memory)
    yield board
    for thread in board.threads:
        thread.stop()
        thread.join()


def rip(thread: VcpuThread) -> int:
    return thread.call(lambda vcpu: vcpu.get_regs().rip)


def test_nothing_runs_before_resume(board: Board) -> None:
    thread = board.start(OUTS)
    assert rip(thread) == 0x1000
    assert board.exits == []


def test_calls_are_made_in_the_vcpus_own_thread(board: Board) -> None:
    """KVM wants a vCPU's ioctls from the thread that created it."""
    thread = board.start(SPIN)
    own = thread.call(lambda vcpu: threading.current_thread())
    assert own.name == "kvmpy-vcpu0"
    thread.resume()
    assert thread.call(lambda vcpu: threading.current_thread()) is own


def test_call_reaches_a_guest_that_never_exits(board: Board) -> None:
    thread = board.start(SPIN)
    thread.resume()
    for _ in range(100):
        assert rip(thread) == 0x1000


def test_call_raises_what_the_function_raises(board: Board) -> None:
    thread = board.start(SPIN)
    with pytest.raises(ZeroDivisionError):
        thread.call(lambda vcpu: 1 // 0)
    assert rip(thread) == 0x1000
    assert board.errors == []


def test_call_from_the_own_thread_is_just_made(board: Board) -> None:
    thread = board.start(SPIN)
    assert thread.call(lambda vcpu: thread.call(lambda inner: inner is vcpu))


def test_paused_guest_stands_still(board: Board) -> None:
    """After `pause` the vCPU is out of the guest, until `resume`: its counts do not move."""
    thread = board.start(OUTS)
    for _ in range(50):
        thread.resume()
        thread.pause()
        before = thread.call(lambda vcpu: (vcpu.exits_total, vcpu.get_regs().rip))
        assert thread.call(lambda vcpu: (vcpu.exits_total, vcpu.get_regs().rip)) == before


def test_resume_twice_and_pause_twice_are_harmless(board: Board) -> None:
    thread = board.start(SPIN)
    for _ in range(2):
        thread.resume()
    for _ in range(2):
        thread.pause()
    assert rip(thread) == 0x1000


def test_handler_that_says_no_pauses_the_vcpu(board: Board) -> None:
    halted = threading.Event()

    def handle(vcpu: Vcpu, exit: Exit) -> bool:
        board.exits.append(exit)
        if exit == Hlt():
            halted.set()
        return exit != Hlt()

    thread = board.start("outb %al, $1\n hlt\n outb %al, $2\n hlt", handle=handle)
    thread.resume()
    assert halted.wait(LONG)
    assert rip(thread) == 0x1003
    halted.clear()
    thread.resume()
    assert halted.wait(LONG)
    exits = [exit for exit in board.exits if exit != Intr()]
    assert exits == [IoOut(1, 1, b"\0"), Hlt(), IoOut(2, 1, b"\0"), Hlt()]


def test_pause_finishes_an_instruction_of_many_exits(board: Board) -> None:
    """Its last exit is complete on return: a wide access is then whole, and its registers can be changed."""
    for number, (first, second) in enumerate(
        (("movups 0x3000, %xmm0", "movups %xmm0, (%rdi)"), ("nop", "movups (%rdi), %xmm0"))
    ):
        seen: list[Exit] = []
        pausing = threading.Event()

        def handle(
            vcpu: Vcpu, exit: Exit, seen: list[Exit] = seen, pausing: threading.Event = pausing, number: int = number
        ) -> bool:
            if isinstance(exit, MmioRead):
                exit.reply(bytes(8))
            if isinstance(exit, MmioRead | MmioWrite):
                seen.append(exit)
                if len(seen) == 1:  # between the halves somebody wants to pause
                    board.threads[number]._paused = True
                    pausing.set()
            return True

        code = SSE + f"movl $0xd0000000, %edi\n {first}\n {second}\n 1: jmp 1b"
        thread = board.start(code, "long", handle=handle)
        thread.resume()
        assert pausing.wait(LONG)
        thread.pause()
        assert len(seen) == 2
        assert thread.call(lambda vcpu: vcpu.complete()) is False
        assert rip(thread) == 0x10_0000 + len(assemble(code, "long")) - 2


def test_error_in_a_handler_is_reported_and_questions_are_still_answered(board: Board) -> None:
    """What the handler raises ends the guest's run; why it died can be asked afterwards."""

    def handle(vcpu: Vcpu, exit: Exit) -> bool:
        raise ZeroDivisionError("in a device")

    thread = board.start(OUTS, handle=handle)
    thread.resume()
    assert board.failed.wait(LONG)
    assert [(vcpu_id, str(error)) for vcpu_id, error in board.errors] == [(0, "in a device")]
    thread.resume()
    assert thread.call(lambda vcpu: vcpu.exits_total) == 1
    thread.pause()


def test_vcpu_that_cannot_be_created_is_reported(board: Board) -> None:
    """Its thread ends: whoever asks it something is told so."""
    board.start(SPIN)
    board.threads[0].call(lambda vcpu: None)
    twin = VcpuThread(board.vm, 0, prepare=lambda vcpu: None, handle=lambda vcpu, exit: True, on_error=board.on_error)
    assert board.failed.wait(LONG)
    assert [str(error) for _, error in board.errors] == ["KVM_CREATE_VCPU: EEXIST (vcpu_id=0)"]
    with pytest.raises(RuntimeError, match="has ended"):
        twin.call(lambda vcpu: None)
    with pytest.raises(RuntimeError, match="has ended"):
        twin.pause()
    twin.join()


def test_error_in_preparing_is_reported(board: Board) -> None:
    def prepare(vcpu: Vcpu) -> None:
        raise ValueError("not this one")

    thread = VcpuThread(board.vm, 0, prepare=prepare, handle=lambda vcpu, exit: True, on_error=board.on_error)
    assert board.failed.wait(LONG)
    thread.join()
    assert [str(error) for _, error in board.errors] == ["not this one"]


@pytest.mark.parametrize("code", [SPIN, OUTS, "cli\n hlt"])
@pytest.mark.parametrize("resumed", [False, True])
def test_stop_ends_the_thread_whatever_the_guest_does(board: Board, code: str, resumed: bool) -> None:
    thread = board.start(code)
    if resumed:
        thread.resume()
    thread.call(lambda vcpu: None)
    thread.stop()
    thread.join()
    with pytest.raises(RuntimeError, match="the vCPU thread has ended"):
        thread.call(lambda vcpu: None)
    thread.stop()
    thread.join()
    assert board.errors == []


def test_calls_that_wait_are_refused_when_the_thread_ends(board: Board) -> None:
    """Nobody waits for ever: many ask while it is stopped."""
    thread = board.start(SPIN)
    thread.resume()
    answered: list[str] = []

    def ask() -> None:
        try:
            while True:
                thread.call(lambda vcpu: None)
        except RuntimeError as error:
            answered.append(str(error))

    askers = [threading.Thread(target=ask) for _ in range(4)]
    for asker in askers:
        asker.start()
    thread.call(lambda vcpu: None)
    thread.stop()
    for asker in askers:
        asker.join(LONG)
    assert answered == ["the vCPU thread has ended"] * 4


def test_thread_runs_on_the_host_cpu_that_it_was_given(board: Board) -> None:
    chosen = max(os.sched_getaffinity(0))
    thread = board.start(SPIN, host_cpu=chosen)
    assert thread.call(lambda vcpu: os.sched_getaffinity(0)) == {chosen}
    assert os.sched_getaffinity(0) >= {chosen}

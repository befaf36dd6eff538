"""A Linux kernel's panic: heard in whatever pieces it comes, believed only when the guest then behaves like it."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpy.kvm import Kvm
from kvmpy.machine.machine import EndReason
from kvmpy.machine.probe.bench import Bench, Mode
from kvmpy.pc import ExitStatus, OnReboot, Pc, RunResult, panic
from kvmpy.pc.panic import LAST_WORDS, LONGEST_LINE, LONGEST_TRACE, HungPanic, PanicWatch, clean, last_words

WHY = "VFS: Unable to mount root fs on unknown-block(0,0)"
START = f"[    1.234567] Kernel panic - not syncing: {WHY}\r\n"
TRACE = "[    1.234600] CPU: 0 PID: 1 Comm: swapper Not tainted 6.1.192 #1\r\n[    1.23] Call Trace:\r\n"
END = f"[    1.235000] ---[ end Kernel panic - not syncing: {WHY} ]---\r\n"
REBOOTED = "[  100.000000] reboot: Restarting system\r\n"


def heard(*pieces: bytes | str) -> PanicWatch:
    """Return a watch that has heard ``pieces``."""
    watch = PanicWatch()
    for piece in pieces:
        watch.hear(piece.encode() if isinstance(piece, str) else piece)
    watch.finish()
    return watch


@pytest.mark.parametrize(
    "text",
    [
        f"Kernel panic - not syncing: {WHY}\n",
        START,
        f"[    1.234567][    T1] Kernel panic - not syncing: {WHY}\n",
        f"/ # [   12.0] Kernel panic - not syncing: {WHY}\n",
        f"Linux version 6.1\r\n{START}{TRACE}{END}",
        f"# echo 'Kernel panic - not syncing: {WHY}, or so'\n{START}",
        f"{'#' * 2000} Kernel panic - not syncing: {WHY}\n",
        f"Kernel panic - not syncing: {WHY}",
        END,
    ],
    ids=[
        "plain",
        "time",
        "caller",
        "behind a prompt",
        "among others",
        "behind a joke",
        "behind a long line",
        "without an end",
        "the last line alone",
    ],
)
def test_the_reason_is_found(text: str) -> None:
    assert heard(text).message == WHY


@given(st.data())
def test_pieces_of_any_size_tell_the_same(data: st.DataObject) -> None:
    text = ("Linux version 6.1\r\n" + START + TRACE + END).encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=40)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    watch = heard(*pieces)
    assert (watch.message, watch.ended, watch.heard) == (WHY, True, len(text))


def test_byte_by_byte_tells_the_same_also_on_a_long_line() -> None:
    text = ("#" * 3 * LONGEST_LINE + START + END).encode()
    watch = heard(*(text[i : i + 1] for i in range(len(text))))
    assert (watch.message, watch.ended) == (WHY, True)


@pytest.mark.parametrize("text", ["Kernel panic", "kernel panic - not syncing: x", "not syncing: x", "", "\n" * 100])
def test_other_words_are_none(text: str) -> None:
    watch = heard(text + "\n")
    assert (watch.message, watch.ended) == (None, False)


def test_a_kernel_that_lives_on_has_not_panicked() -> None:
    """It says "reboot: " before it resets, halts or powers off: kernel/reboot.c. A kernel that panicked does not."""
    assert heard(START, END, "# ls\n", REBOOTED).message is None
    assert heard(START, END, "another line\n" * (LONGEST_TRACE + 1)).message is None
    assert heard(START, REBOOTED, START).message == WHY
    assert not heard(END, START).ended


def test_what_is_kept_is_bounded() -> None:
    """However long a line is, and whatever it holds; and a message too."""
    watch = PanicWatch()
    for piece in (b"x" * 60000, b"Kernel panic - not syncing: " + b"y" * 60000, b"z" * 60000):
        watch.hear(piece)
        assert len(watch._line) <= LONGEST_LINE
    watch.hear(b"\n")
    assert watch.message is not None
    assert watch.message.startswith("yyy")
    assert len(watch.message) <= LONGEST_LINE


def test_nothing_that_plays_with_a_terminal_remains() -> None:
    assert (
        clean(b"a\x1b[2J\x07b\tc\xff\xe2\x80\xae\x9b1m\r")
        == "a?[2J?b c\N{REPLACEMENT CHARACTER}?\N{REPLACEMENT CHARACTER}1m"
    )
    assert all(line.isprintable() for line in last_words(bytes(range(256)) * 10))
    assert heard("Kernel panic - not syncing: \x1b]0;title\x07x\n").message == "?]0;title?x"


def test_last_words_are_the_last_lines_that_say_something() -> None:
    text = "".join(f"line {number}\r\n\r\n" for number in range(50))
    assert last_words(text.encode()) == tuple(f"line {number}" for number in range(50 - LAST_WORDS, 50))
    assert last_words(b"one\ntwo") == ("one", "two")
    assert last_words(b"") == ()
    assert sum(map(len, last_words(b"x" * 10**6))) <= LONGEST_LINE


# --- guests -----------------------------------------------------------------------------------------------------

kvm = pytest.mark.kvm
MakePc = Callable[..., Pc]
Run = Callable[..., RunResult]
LONG = 20.0

RESET = "movb $0xfe, %al ; outb %al, $0x64 ; 9: jmp 9b"
SPIN = "9: jmp 9b"


def say(text: str, then: str, mode: str = "real") -> str:
    """Return a guest that prints ``text`` on COM1 and then does ``then``."""
    letters = ", ".join(str(byte) for byte in text.encode())
    si = {"real": "%si", "protected": "%esi"}[mode]
    return f"""
        mov $text, {si}
        movw $0x3f8, %dx
    1:  movb ({si}), %al ; testb %al, %al ; jz 2f ; outb %al, %dx ; inc {si} ; jmp 1b
    2:  {then}
    text: .byte {letters}, 0
    """


@kvm
@pytest.mark.parametrize(
    ("text", "then", "mode"),
    [
        (START + TRACE, RESET, "real"),
        (START.rstrip(), RESET, "real"),
        (START + TRACE, "lidt 8f ; ud2\n 8: .word 0, 0, 0", "protected"),
        (START + END, "cli ; hlt", "real"),
    ],
    ids=["reset", "reset in the middle of the line", "triple fault", "halted"],
)
def test_a_panic_is_the_cause_of_the_end_behind_it(run_guest: Run, text: str, then: str, mode: str) -> None:
    result = run_guest(say(text, then, mode), mode)
    assert (result.reason, result.status) == (EndReason.PANIC, ExitStatus.CRASH)
    assert result.message == f"the guest's kernel panicked: {WHY}"
    assert result.panic == WHY
    assert result.last_words[0] == clean(START.encode())


@kvm
@pytest.mark.parametrize("cores", [1, 2])
def test_a_kernel_that_hangs_behind_its_panic_is_ended(make_pc: MakePc, cores: int) -> None:
    """The processors that it stopped, or never started, halt; it spins in ring 0 and prints no more."""
    result = make_pc(say(START + TRACE + END, SPIN), cores=cores).run(timeout=LONG)
    assert (result.reason, result.status, result.panic) == (EndReason.PANIC, ExitStatus.CRASH, WHY)
    assert result.seconds < LONG / 2


@kvm
def test_it_is_looked_at_often_behind_the_last_line_alone(make_pc: MakePc) -> None:
    machine = make_pc(SPIN).machine
    assert HungPanic(machine, [heard(), heard(START + TRACE)]).interval == panic.NEVER
    assert HungPanic(machine, [heard(), heard(START + END)]).interval == panic.LOOK_SECONDS


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hang is believed after a tenth of a second."""
    monkeypatch.setattr(panic, "HANG_SECONDS", 0.1)
    monkeypatch.setattr(panic, "LOOK_SECONDS", 0.01)


@kvm
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("text", "then"),
    [
        (START + TRACE, SPIN),
        (START + END + REBOOTED, SPIN),
        (START + END, "9: sti ; hlt ; jmp 9b"),
        (START + END, "9: outb %al, $0x80 ; jmp 9b"),
        (START + END, "movb $'.', %al ; 9: outb %al, %dx ; jmp 9b"),
    ],
    ids=["no last line", "a living kernel", "waiting", "exits", "printing"],
)
def test_words_alone_end_nothing(make_pc: MakePc, text: str, then: str) -> None:
    """A user printed them: such a guest waits for interrupts, talks to devices or goes on printing."""
    result = make_pc(say(text, then)).run(timeout=0.8)
    assert (result.reason, result.status) == (EndReason.TIMEOUT, ExitStatus.LIMIT)


@kvm
@pytest.mark.usefixtures("quick")
def test_whoever_watches_himself_is_left_alone(make_pc: MakePc) -> None:
    result = make_pc(say(START + END, SPIN)).run(timeout=0.8, watch_halt=False)
    assert (result.reason, result.panic) == (EndReason.TIMEOUT, WHY)


@kvm
@pytest.mark.parametrize(("mode", "stuck"), [(Mode.CPL0, True), (Mode.CPL3, False)])
def test_a_user_program_that_spins_is_no_hang(kvm: Kvm, mode: Mode, stuck: bool) -> None:
    with Bench(kvm) as bench, bench.start(b"\xeb\xfe", mode) as vcpu:
        assert panic._is_stuck(vcpu) is stuck


@kvm
@pytest.mark.parametrize(
    ("text", "then", "reason", "status"),
    [
        (START + REBOOTED, RESET, EndReason.RESET, 202),
        (START, "movb $3, %al ; outb %al, $0xf4", EndReason.EXIT_PORT, 3),
        (START, "movw $0x3400, %ax ; movw $0x604, %dx ; outw %ax, %dx", EndReason.POWER_OFF, 0),
    ],
    ids=["reboot", "exit port", "power-off"],
)
def test_an_orderly_end_is_no_panic(run_guest: Run, text: str, then: str, reason: EndReason, status: int) -> None:
    result = run_guest(say(text, then))
    assert (result.reason, result.status, result.panic, result.last_words) == (reason, status, None, ())


@kvm
def test_a_panic_that_resets_boots_again_where_a_reset_does_and_is_told(make_pc: MakePc) -> None:
    """The next boot begins without a panic: here it resets without a word."""
    results: list[RunResult] = []

    def on_restart(result: RunResult) -> None:
        results.append(result)
        if len(results) == 2:
            pc.stop()

    code = "movw $0x3f8, %dx ; inb %dx, %al ; cmpb $'p', %al ; jne 2f\n" + say(START, RESET)
    pc = make_pc(code, on_reboot=OnReboot.RESTART, on_restart=on_restart)
    pc.serial.feed(b"pn")
    pc.run(timeout=LONG)
    assert [(result.reason, result.panic) for result in results] == [(EndReason.PANIC, WHY), (EndReason.RESET, None)]

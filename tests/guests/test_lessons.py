"""Every lesson does what its header says: the lab sheets cannot rot."""

import re
import threading
from argparse import Namespace
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from lesson_exits import described, differences, patterns

from kvmpy import lessons
from kvmpy.cli.parser import Parser
from kvmpy.cli.run import configure, spec_of
from kvmpy.kvm import Exit, Vcpu
from kvmpy.lessons import STOP_REQUEST, Lesson
from kvmpy.machine.boot.inspection import inspect
from kvmpy.machine.boot.plan import BootOptions, CpuMode
from kvmpy.pc import MachineSpec, Pc
from kvmpy.units import parse_size

GUESTS = Path(__file__).resolve().parents[2] / "guests"
LESSONS = {lesson.name: lesson for lesson in lessons.lessons()}
TIMEOUT = 20.0  # seconds: far beyond what any lesson takes

MODES = {
    "real mode, cs:ip = 0:0x1000": (None, CpuMode.REAL, 0x1000),
    "boot sector, 0x7c00": ("bootsector", CpuMode.REAL, 0x7C00),
    "bzImage, long mode": ("bzimage", CpuMode.LONG, None),
    "multiboot 1, protected mode": ("multiboot1", CpuMode.PROTECTED, None),
    "multiboot 2, protected mode": ("multiboot2", CpuMode.PROTECTED, None),
    "PVH, protected mode": ("pvh", CpuMode.PROTECTED, None),
    "ELF32, protected mode, CPL0": ("elf", CpuMode.PROTECTED, None),
    "ELF64, long mode, CPL0": ("elf", CpuMode.LONG, None),
}
"""What a Mode line may say: the protocol by which the file boots (None: no magic), the mode, and the entry if fixed."""


@dataclass
class Outcome:
    """What a lesson really did."""

    mode: CpuMode
    rip: int
    status: int
    printed: str
    exits: dict[int, list[str]] = field(default_factory=dict)


def options_of(lesson: Lesson, disk: Path) -> Namespace:
    """Read the options that the lesson gives to ``kvmpy run``, as that command does; a blank disk where it asks."""
    parser = Parser(prog="kvmpy run", description="")
    configure(parser)
    disks = []
    if lesson.disk:
        disk.write_bytes(bytes(parse_size(lesson.disk)))
        disks = ["--disk", f"{disk},format=raw"]
    return parser.parse_args([*lesson.options, *disks, str(lesson.image)])


def run(lesson: Lesson, *, traced: bool) -> Outcome:
    """Run the lesson: each exit brought to Python and written down, or on the fast path."""
    with TemporaryDirectory() as folder:
        return _run(lesson, options_of(lesson, Path(folder) / "disk"), traced)


def _run(lesson: Lesson, options: Namespace, traced: bool) -> Outcome:
    seen: dict[int, list[str]] = {}

    def trace(vcpu: Vcpu, exit: Exit) -> None:
        seen.setdefault(vcpu.vcpu_id, []).extend(described(exit))

    spec = spec_of(options).replace(trace_exits=traced)
    printed = threading.Event()
    with Pc(spec, tracer=trace, debugcon=lambda data: printed.set()) as pc:
        asker = threading.Thread(target=lambda: printed.wait(TIMEOUT) and pc.request_stop())
        if lesson.input == STOP_REQUEST:
            asker.start()
        else:
            pc.serial.feed(lesson.input.encode("latin-1"))
        result = pc.run(timeout=options.timeout or TIMEOUT)
        if lesson.input == STOP_REQUEST:
            asker.join()
        return Outcome(pc.entry.mode, pc.entry.rip, result.status, result.debugcon + result.serial, seen)


@cache
def outcome(name: str) -> Outcome:
    """Return what the lesson ``name`` did in a traced run, which many tests look at."""
    return run(LESSONS[name], traced=True)


def broken_promises(lesson: Lesson, did: Outcome) -> list[str]:
    """Return where the run differs from the header: nothing, for a true one."""
    _, mode, rip = MODES[lesson.mode]
    wrong = differences(lesson.exits, did.exits)
    if did.printed != lesson.prints:
        wrong.append(f"printed {did.printed!r}, not {lesson.prints!r}")
    if did.status != lesson.status:
        wrong.append(f"status {did.status}, not {lesson.status}")
    if did.mode is not mode or rip not in (None, did.rip):
        wrong.append(f"started in {did.mode} mode at 0x{did.rip:x}")
    return wrong


every_lesson = pytest.mark.parametrize("name", LESSONS)


@pytest.mark.kvm
@every_lesson
def test_lesson_does_what_its_header_says(name: str) -> None:
    """Mode, Exits, Prints and Status, in full."""
    assert broken_promises(LESSONS[name], outcome(name)) == []


@pytest.mark.kvm
@every_lesson
def test_lesson_prints_the_same_when_c_answers_its_exits(name: str) -> None:
    """The fast path is the readable one, only faster: nothing that a guest sees differs."""
    lesson = LESSONS[name]
    did = run(lesson, traced=False)
    assert (did.printed, did.status) == (lesson.prints, lesson.status)


@every_lesson
def test_mode_line_names_the_protocol_by_which_the_file_boots(name: str) -> None:
    """Without any option a file boots by the first protocol that it offers; a flat image offers none."""
    lesson = LESSONS[name]
    assert inspect(lesson.image).boots == MODES[lesson.mode][0]


def mutations(lesson: Lesson) -> list[tuple[str, str]]:
    """Return pairs (what, header text) with one byte of one Prints, Exits or Status line changed."""
    text = lesson.source.read_text()
    changed = []
    for found in re.finditer(r"^# (Prints|Exits|Status): +(\S.*)$", text, re.MULTILINE):
        start, end = found.span(2)
        for at in {start, (start + end) // 2, end - 1}:
            byte = chr(ord(text[at]) ^ 1)
            changed.append((f"{found[0]!r} with {byte!r} at {at}", text[:at] + byte + text[at + 1 :]))
    return changed


def is_caught(lesson: Lesson, text: str) -> bool:
    """Tell whether a header with ``text`` fails: it cannot be read, or does not fit what the guest did."""
    try:
        return bool(broken_promises(lessons.parse(text, source=lesson.source), outcome(lesson.name)))
    except ValueError:
        return True


@pytest.mark.kvm
@every_lesson
def test_one_changed_byte_in_a_header_is_caught(name: str) -> None:
    """The comparison has teeth: the first, middle and last byte of each promise, each changed in turn."""
    lesson = LESSONS[name]
    assert not is_caught(lesson, lesson.source.read_text())
    assert [what for what, text in mutations(lesson) if not is_caught(lesson, text)] == []


@pytest.mark.kvm
def test_every_changed_byte_of_a_header_is_caught() -> None:
    """The same for each single byte of one lesson's promises, and each of several other values."""
    lesson = LESSONS["mmio"]
    text = lesson.source.read_text()
    missed = []
    for found in re.finditer(r"^# (?:Prints|Exits): +(\S.*)$", text, re.MULTILINE):
        for at in range(*found.span(1)):
            for byte in " ;x0f~".replace(text[at], ""):
                changed = text[:at] + byte + text[at + 1 :]
                # A blank at either end of a value is no part of it.
                if lessons.parse(changed, source=lesson.source) != lesson and not is_caught(lesson, changed):
                    missed.append((found[0], text[at - 8 : at], byte))
    assert missed == []


@pytest.mark.parametrize(
    "line",
    [
        "",
        "IoOut port=0xe9 x",
        "IoOut port=0xe9 x3 x4",
        "IoOut port=0xe9 IoIn port=0x71",
        "IoOut prt=0xe9",
        "Nonsense",
        "(IoOut port=0xe9 x*",
        "IoOut port=0xe9 ;",
        "x3 ; Shutdown",
    ],
)
def test_exits_line_outside_the_grammar_is_refused(line: str) -> None:
    """A typing error in a header must not be read as a promise that is easy to keep."""
    with pytest.raises(ValueError, match=re.escape(repr(line)) + "|unterminated"):
        patterns([line])


def test_exits_lines_tell_order_counts_choices_and_vcpus() -> None:
    """The grammar, by example."""
    lines = ["IoIn port=0x71 ; IoOut port=0xe9 data=0x41 x2", "(Hlt | Shutdown) x*", "vcpu 1: Hlt"]
    first = ["IoIn port=0x71 size=1", *["IoOut port=0xe9 size=1 data=0x41"] * 2]
    assert differences(lines, {0: [*first, "Hlt", "Shutdown"], 1: ["Hlt"]}) == []
    assert differences(lines, {0: [*first, "Hlt", "Shutdown"]}) == ["vcpu 1 did: "]
    assert differences(lines, {0: first, 1: ["Hlt"]}) == ["vcpu 0 did: IoIn port=0x71 ; IoOut port=0xe9 x2"]
    assert differences(lines, {0: [*first, "Hlt"], 1: ["Hlt"], 2: ["Hlt"]}) == ["vcpu 2 did: Hlt"]
    assert differences(lines, {0: [*first[::-1], "Hlt"], 1: ["Hlt"]}) != []


@pytest.mark.kvm
def test_there_are_lessons_for_every_device_of_the_board() -> None:
    """Some port of each device stands in the Exits lines of some lesson."""
    spec = MachineSpec(boot=LESSONS["hello"].image, boot_options=BootOptions(format="flat"))
    ports = {int(port, 16) for lesson in LESSONS.values() for port in re.findall("port=(0x[0-9a-f]+)", str(lesson))}
    with Pc(spec) as pc:
        used = {r.name for r in pc.machine.pio if any(r.base <= port < r.base + r.size for port in ports)}
        assert {r.name for r in pc.machine.pio} - used == set()


def test_readme_gives_the_reading_order_of_all_lessons() -> None:
    """guests/README.md names each lesson in its table once, and nothing else."""
    listed = re.findall(r"^\| \d+ \| `(\w+)` \|", (GUESTS / "README.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(LESSONS)

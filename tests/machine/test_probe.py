"""The probes of the host: closed and consistent, bounded, and right about guests whose answer is known."""

import errno
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmpy.errors import KvmError
from kvmpy.kvm import Kvm
from kvmpy.machine import probe
from kvmpy.machine.probe import REQUIRED, SECTIONS, Ability, Examination, Finding, Verdict, instructions
from kvmpy.machine.probe import bench as bench_module
from kvmpy.machine.probe import host as host_probes
from kvmpy.machine.probe.bench import Bench, Done, Ended, Hang, Mode, Trap, describe
from kvmpy.machine.probe.judge import Judgement, Probe, compare, expect

NOBODY = 65534
SPIN = bytes.fromhex("ebfe")  # jmp .
HALT_FOR_EVER = bytes.fromhex("faf4")  # cli; hlt
UD2 = bytes.fromhex("0f0b")


@pytest.fixture
def bench() -> Iterator[Bench]:
    with Kvm() as kvm, Bench(kvm) as made:
        yield made


@pytest.fixture(scope="module")
def examination() -> Examination:
    return probe.examine()


# --- what was found ---------------------------------------------------------------------------------------------


def test_every_ability_has_one_probe_and_one_place_in_the_report() -> None:
    listed = [ability for abilities in SECTIONS.values() for ability in abilities]
    assert sorted(listed) == sorted(Ability)


@pytest.mark.kvm
def test_every_ability_is_found_once(examination: Examination) -> None:
    assert sorted(found.name for found in examination.findings) == sorted(Ability)


@pytest.mark.kvm
def test_what_is_not_ok_says_why(examination: Examination) -> None:
    assert [f.name for f in examination.findings if f.verdict is not Verdict.OK and not f.detail] == []


@pytest.mark.kvm
def test_what_can_be_mended_says_how(examination: Examination) -> None:
    without = (Verdict.OK, Verdict.UNKNOWN)
    assert [f.name for f in examination.findings if (f.fix is None) is not (f.verdict in without)] == []


@pytest.mark.kvm
def test_details_and_fixes_are_one_line(examination: Examination) -> None:
    assert [f.name for f in examination.findings if "\n" in f.detail + (f.fix or "")] == []


@pytest.mark.kvm
def test_a_host_with_kvm_works(examination: Examination) -> None:
    assert examination.works
    assert examination.host.cpu
    assert examination.host.kernel == os.uname().release


@pytest.mark.kvm
@pytest.mark.parametrize(
    "ability",
    [
        Ability.LONG_CPL3,
        Ability.INT3_CPL3,
        Ability.SINGLE_STEP_CPL0,
        Ability.HW_BREAKPOINT_CPL0,
        Ability.SMP_START,
        Ability.READONLY_SLOT,
        Ability.DIRTY_LOG,
    ],
)
def test_what_every_kvm_can_do_is_found(examination: Examination, ability: Ability) -> None:
    """Without these no kernel that kvmpy promises to boot would run."""
    assert {f.name: f for f in examination.findings}[ability].verdict is Verdict.OK


@pytest.mark.kvm
def test_a_second_look_agrees_with_the_first(examination: Examination) -> None:
    """But for huge pages: the host gives them when it has some."""
    again = probe.examine()
    pairs = zip(examination.findings, again.findings, strict=True)
    changed = [first.name for first, second in pairs if first.verdict is not second.verdict]
    assert set(changed) <= {Ability.HUGE_PAGES}


@pytest.mark.kvm
@pytest.mark.parametrize("ability", [Ability.DEVICE, Ability.REAL_MODE, Ability.SMP_START, Ability.IRQ_AFTER_STI])
def test_an_ability_asked_alone_is_found_as_in_the_report(examination: Examination, ability: Ability) -> None:
    found = {f.name: f for f in examination.findings}[ability]
    assert probe.has(ability.value) is (found.verdict is Verdict.OK)


@pytest.mark.kvm
def test_an_ability_is_probed_once_a_process() -> None:
    assert probe.probe("long-cpl0") is probe.probe("long-cpl0")


def test_a_name_that_no_ability_has_is_refused() -> None:
    with pytest.raises(ValueError, match="teleportation"):
        probe.has("teleportation")


def test_an_emulated_ability_is_not_had_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Finding(Ability.NATIVE_CPL0, Verdict.EMULATED, "slow", "wait")
    monkeypatch.setattr(probe, "_known", {Ability.NATIVE_CPL0: slow})
    assert not probe.has("native-cpl0")


def test_an_emulated_required_ability_still_works() -> None:
    emulated = tuple(Finding(ability, Verdict.EMULATED, "slow", "wait") for ability in REQUIRED)
    assert Examination("", host_probes.describe_host(), emulated, 0.0).works


@pytest.mark.parametrize("verdict", [Verdict.MISSING, Verdict.BROKEN, Verdict.UNKNOWN])
@pytest.mark.parametrize("ability", sorted(REQUIRED))
def test_without_one_required_ability_nothing_works(ability: Ability, verdict: Verdict) -> None:
    findings = tuple(Finding(a, verdict if a is ability else Verdict.OK, "", "") for a in REQUIRED)
    assert not Examination("", host_probes.describe_host(), findings, 0.0).works


# --- guests that misbehave --------------------------------------------------------------------------------------


@pytest.mark.kvm
@pytest.mark.parametrize("mode", Mode)
def test_a_guest_that_spins_is_a_hang_within_its_time(bench: Bench, mode: Mode) -> None:
    assert bench.run(SPIN, mode) == Hang()


@pytest.mark.kvm
def test_a_guest_that_halts_for_ever_is_a_hang_within_its_time(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_module, "WALL_SECONDS", 0.1)
    assert bench.run(HALT_FOR_EVER) == Hang()


@pytest.mark.kvm
def test_the_bench_serves_the_next_guest_after_a_hang(bench: Bench) -> None:
    bench.run(SPIN)
    assert bench.run(b"", rax=7) == Done(7)


@pytest.mark.kvm
def test_a_hang_is_a_broken_finding_with_its_fix(bench: Bench) -> None:
    found = Probe(Ability.MOVBE_CPL0, expect(SPIN, Done(0)), "press reset").find(bench)
    assert (found.verdict, found.fix) == (Verdict.BROKEN, "press reset")
    assert "hangs" in found.detail


@pytest.mark.kvm
def test_a_triple_fault_ends_the_guest_and_nothing_else(bench: Bench) -> None:
    """Intel SDM vol. 3 §6.15: a fault while a double fault is delivered shuts the processor down."""
    no_idt_then_ud2 = bytes.fromhex("0f011e") + UD2  # lidt (%rsi): a limit of 0
    outcome = bench.run(no_idt_then_ud2)
    assert isinstance(outcome, Ended)
    assert "triple fault" in describe(outcome)
    assert bench.run(b"", rax=7) == Done(7)


@pytest.mark.kvm
def test_a_wrong_value_is_broken_and_tells_both(bench: Bench) -> None:
    verdict, detail = expect(b"", Done(0x13), rax=0xC)(bench)
    assert verdict is Verdict.BROKEN
    assert "0xc" in detail
    assert "0x13" in detail


@pytest.mark.kvm
def test_an_invalid_opcode_is_missing(bench: Bench) -> None:
    assert expect(UD2, Done(0))(bench) == (Verdict.MISSING, "raises #UD")


def test_another_vector_than_expected_is_broken() -> None:
    assert compare(Trap(0x20), Trap(0x21))[0] is Verdict.BROKEN


def test_the_right_vector_at_the_wrong_level_is_broken() -> None:
    assert compare(Trap(3, cpl=3), Trap(3)) == (Verdict.BROKEN, "raises #BP at CPL3")


@pytest.mark.kvm
@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTTY, errno.ENOMEM])
def test_an_ioctl_that_the_host_refuses_is_a_finding(bench: Bench, number: int) -> None:
    def refuse(bench: Bench) -> Judgement:
        raise KvmError(number, "KVM_SET_GUEST_DEBUG")

    found = Probe(Ability.WATCHPOINT_CPL0, refuse, "do without").find(bench)
    assert (found.verdict, found.fix) == (Verdict.MISSING, "do without")
    assert f"KVM_SET_GUEST_DEBUG: {errno.errorcode[number]}" in found.detail


@pytest.mark.kvm
def test_an_examination_leaves_no_descriptor_behind() -> None:
    before = os.listdir("/proc/self/fd")
    probe.examine()
    assert len(os.listdir("/proc/self/fd")) == len(before)


# --- the guests are what they say -------------------------------------------------------------------------------

_CONSTANT = re.compile(r"^([A-Z0-9_]+) = bytes\.fromhex\($")
_LINE = re.compile(r'^ +"([0-9a-f ]+)"  # (.+)$')
_SLOT = 16
"""No instruction is longer (Intel SDM vol. 2 §2.3.11)."""


def written_code() -> dict[str, list[tuple[str, bytes]]]:
    """Return each line of hand-made code, (assembly, bytes), under the directive for its mode."""
    found: dict[str, list[tuple[str, bytes]]] = {".code16": [], ".code32": [], ".code64": []}
    for path in sorted(Path(probe.__file__).parent.glob("*.py")):
        directive = ".code64"
        for line in path.read_text().splitlines():
            if constant := _CONSTANT.match(line):
                directive = {"16": ".code16", "32": ".code32"}.get(constant[1][-2:], ".code64")
            elif written := _LINE.match(line):
                found[directive].append((written[2], bytes.fromhex(written[1])))
    return found


def assemble(directive: str, lines: list[str], folder: Path) -> list[bytes]:
    """Return what the assembler makes of each line, alone in its slot."""
    source = "".join(f".balign {_SLOT}, 0\n{line}\n" for line in [directive, *lines, ".byte 0"])
    subprocess.run(["as", "-o", folder / "a.o", "-"], input=source, text=True, check=True)
    subprocess.run(["objcopy", "-O", "binary", "-j", ".text", folder / "a.o", folder / "a.bin"], check=True)
    raw = (folder / "a.bin").read_bytes()
    return [raw[at : at + _SLOT] for at in range(0, len(raw), _SLOT)]


@pytest.mark.parametrize("directive", [".code16", ".code32", ".code64"])
def test_the_bytes_of_each_guest_are_what_the_comment_beside_says(directive: str, tmp_path: Path) -> None:
    lines = written_code()[directive]
    assert lines
    made = assemble(directive, [assembly for assembly, _ in lines], tmp_path)
    wrong = [line for line, code in zip(lines, made, strict=False) if code != line[1].ljust(_SLOT, b"\0")]
    assert wrong == []


@pytest.mark.kvm
@pytest.mark.parametrize(
    ("flag", "code", "right"),
    [
        ("sse", instructions.MOVUPS, 0x5A),
        ("sse2", instructions.MOVD, 0x5A),
        ("sse", instructions.LDMXCSR, 0x1F80),
        ("fpu", instructions.FLD1, 1),
        ("popcnt", instructions.POPCNT, 8),
        ("cx16", instructions.CMPXCHG16B, 0x5A),
        ("movbe", instructions.MOVBE, 0x44332211),
        ("abm", instructions.LZCNT, 19),
        ("bmi1", instructions.TZCNT, 32),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_instruction_of_this_processor_gives_the_right_value_to_a_user(
    bench: Bench, flag: str, code: bytes, right: int
) -> None:
    """Where the host's processor has it, CPL 3 runs it: what the probes at CPL 0 expect is right."""
    with open("/proc/cpuinfo") as file:
        flags = next(line for line in file if line.startswith("flags")).split()
    assert flag not in flags or bench.run(code, Mode.CPL3) == Done(right)


@pytest.mark.kvm
@pytest.mark.parametrize("mode", [Mode.CPL0, Mode.CPL3])
@pytest.mark.parametrize(
    ("code", "vector"),
    [
        ("31c9 f7f1", 0),  # xor %ecx, %ecx; div %ecx
        ("0f0b", 6),  # ud2
        ("48b8 0000000000000080 8b00", 13),  # movabs $1 << 63, %rax; mov (%rax), %eax
        ("b8 00000040 8b00", 14),  # mov $0x40000000, %eax; mov (%rax), %eax
    ],
)
def test_each_fault_enters_its_handler_at_cpl0(bench: Bench, mode: Mode, code: str, vector: int) -> None:
    """Intel SDM vol. 3, table 6-1."""
    assert bench.run(bytes.fromhex(code), mode) == Trap(vector)

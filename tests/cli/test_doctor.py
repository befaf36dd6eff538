"""``kvmpy doctor``: what is printed, and the status that goes with it."""

import json
import re
from pathlib import Path

import pytest

from kvmpy.cli import doctor
from kvmpy.cli.main import main
from kvmpy.machine.probe import REQUIRED, SECTIONS, Ability, Examination, Finding, Host, Verdict, examine
from kvmpy.pc.result import ExitStatus

HOST = Host("Zuse Z3", "6.1.0", ("kvm_relay",))
LINE = re.compile(r"  (ok|note|FAIL) +([a-z0-9-]+)(  .*)?")


def examined(*findings: Finding) -> Examination:
    """All is well, but for ``findings``."""
    other = {found.name: found for found in findings}
    every = (ability for abilities in SECTIONS.values() for ability in abilities)
    return Examination("/dev/kvm", HOST, tuple(other.get(a, Finding(a, Verdict.OK)) for a in every), 0.25)


def lines_of(examination: Examination) -> list[str]:
    return doctor.as_text(examination).splitlines()


# --- on this host -----------------------------------------------------------------------------------------------


@pytest.mark.kvm
def test_doctor_says_that_kvm_works_and_returns_zero(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("KVM works here: ")
    assert "FAIL  " not in out


@pytest.mark.kvm
def test_json_and_text_tell_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert main(["doctor"]) == 0
    printed = [LINE.fullmatch(line) for line in capsys.readouterr().out.splitlines()]
    marks = {line[2]: line[1] for line in printed if line}
    assert {found["name"]: found["mark"] for found in report["findings"]} == marks
    assert report["works"] is True
    assert len(marks) == len(Ability)


def test_an_unknown_option_is_a_usage_error(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--cure"]) == ExitStatus.USAGE
    assert "--cure" in capfd.readouterr().err


# --- without KVM ------------------------------------------------------------------------------------------------


def test_a_missing_device_fails_with_the_fix_on_the_next_line(tmp_path: Path) -> None:
    examination = examine(str(tmp_path / "kvm"))
    lines = lines_of(examination)
    assert lines[0].startswith("KVM does not work here: ")
    failing = [i for i, line in enumerate(lines) if line.startswith("  FAIL")]
    assert len(failing) == 1
    assert "No such file" in lines[failing[0]]
    assert lines[failing[0] + 1].strip().startswith("fix: ")
    assert doctor.exit_status(examination) == ExitStatus.HOST


def test_a_regular_file_is_no_device(tmp_path: Path) -> None:
    (tmp_path / "kvm").write_bytes(b"not KVM")
    examination = examine(str(tmp_path / "kvm"))
    assert "is a regular file, not a character device" in doctor.as_text(examination)
    assert doctor.exit_status(examination) == ExitStatus.HOST


def test_a_device_of_another_kind_does_not_speak_kvm() -> None:
    examination = examine("/dev/null")
    assert "open /dev/null: Inappropriate ioctl" in doctor.as_text(examination)
    assert doctor.exit_status(examination) == ExitStatus.HOST


def test_json_without_kvm_names_the_failure_too(tmp_path: Path) -> None:
    report = json.loads(doctor.as_json(examine(str(tmp_path / "kvm"))))
    assert report["works"] is False
    assert [found["name"] for found in report["findings"] if found["mark"] == "FAIL"] == ["device"]


# --- the report -------------------------------------------------------------------------------------------------


def test_the_first_line_names_processor_kernel_and_module() -> None:
    assert lines_of(examined())[0] == "KVM works here: Zuse Z3, Linux 6.1.0, kvm_relay"


def test_each_finding_is_one_line_and_all_details_begin_in_one_column() -> None:
    examination = examined(*(Finding(a, Verdict.OK, "detail") for a in Ability))
    found = [line for line in lines_of(examination) if LINE.fullmatch(line)]
    assert len(found) == len(Ability)
    assert {line.index("detail") for line in found} == {found[0].index("detail")}


def test_a_fix_that_neighbours_share_stands_once_below_the_last() -> None:
    shared = [
        Finding(a, Verdict.MISSING, "raises #GP", "boot 64 bits") for a in (Ability.PAGING_32, Ability.PAGING_PAE)
    ]
    lines = lines_of(examined(*shared))
    at = next(i for i, line in enumerate(lines) if "paging-pae" in line)
    assert [i for i, line in enumerate(lines) if "fix: boot 64 bits" in line] == [at + 1]


@pytest.mark.parametrize("ability", sorted(REQUIRED))
def test_every_failure_has_its_own_fix_on_the_next_line_and_the_status_196(ability: Ability) -> None:
    broken = tuple(Finding(a, Verdict.BROKEN, "hangs", "the same") for a in SECTIONS_OF[ability])
    examination = examined(*broken)
    lines = lines_of(examination)
    failing = [i for i, line in enumerate(lines) if line.startswith("  FAIL")]
    assert any(f" {ability} " in lines[i] for i in failing)
    assert {lines[i + 1].strip() for i in failing} == {"fix: the same"}
    assert doctor.exit_status(examination) == 196


SECTIONS_OF = {ability: abilities for abilities in SECTIONS.values() for ability in abilities}


def test_a_note_leaves_the_status_zero() -> None:
    examination = examined(Finding(Ability.SYSCALL_CPL3, Verdict.BROKEN, "stays at CPL3", "use INT3"))
    assert doctor.exit_status(examination) == 0
    assert any(line.startswith("  note  syscall-cpl3") for line in lines_of(examination))


def test_the_last_line_counts_the_marks() -> None:
    examination = examined(Finding(Ability.SYSCALL_CPL3, Verdict.BROKEN, "stays at CPL3", "use INT3"))
    assert lines_of(examination)[-1].startswith(f"{len(Ability) - 1} ok, 1 note, 0 FAIL, in 0.2 s.")

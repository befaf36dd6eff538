"""The sixty cases: as expected, on both engines and both kinds of ring. ``KVMPY_CAMPAIGN=1`` runs the long ones too."""

import json
import os
import re
from pathlib import Path

import pytest

from kvmpy.cli.main import main
from kvmpy.conformance import runner
from kvmpy.conformance.case import RINGS, Case, Variant, Verdict
from kvmpy.conformance.cases.table import CASES
from kvmpy.conformance.judge import Judgement
from kvmpy.conformance.report import as_text
from kvmpy.conformance.runner import Outcome, Setting

LONG = (8, 60)
"""The twin takes seconds for each."""
SHORT = [case.number for case in CASES if case.number not in LONG or os.environ.get("KVMPY_CAMPAIGN") == "1"]
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "conformance.md"


@pytest.mark.parametrize(("engine", "numbers"), [("c", [case.number for case in CASES]), ("python", SHORT)])
def test_every_verdict_is_as_expected(engine, numbers, tmp_path, capfd):
    """WEDGED and FAIL are defects; REJECT where PASS is expected is one too, and the other way round."""
    report = tmp_path / "report.json"
    chosen = [option for number in numbers for option in ("--case", str(number))]
    status = main(["conformance", "--engine", engine, "--json", str(report), *chosen])
    table = capfd.readouterr().out
    assert status == 0, table
    verdicts = json.loads(report.read_text())
    assert verdicts["as_expected"]
    assert [case["number"] for case in verdicts["cases"]] == numbers
    assert {ring for case in verdicts["cases"] for ring in (v["ring"] for v in case["variants"])} == set(RINGS)
    assert verdicts["counts"]["WEDGED"] == verdicts["counts"]["FAIL"] == 0
    assert verdicts["counts"]["PASS"] > 100
    assert verdicts["counts"]["REJECT"] > 100


def test_cases_are_numbered_and_their_variants_named():
    assert [case.number for case in CASES] == list(range(1, 61))
    for case in CASES:
        for ring in RINGS:
            names = [variant.name for variant in case.variants if ring in variant.rings]
            assert len(set(names)) == len(names), f"case {case.number}"


def test_document_lists_each_case():
    rows = re.findall(r"^\| (\d+) \| (.*?) \| (.*?) \| (\S+) \|$", DOCUMENT.read_text(), re.MULTILINE)
    assert rows == [(str(c.number), c.title, c.villain, c.expected) for c in CASES]


# --- what a run makes of a process that does not come to its end ------------------------------------------------


def outcomes_of(numbers, monkeypatch, **settings):
    for name, value in settings.items():
        monkeypatch.setattr(runner, name, value)
    return runner.run([case for case in CASES if case.number in numbers], ["python"])


def test_process_that_dies_is_a_failure_and_the_rest_runs_in_another(monkeypatch):
    """A variant that its process does not know ends that process; the next is judged by a new one."""
    unknown = Case(24, "", "", (*CASES[23].variants, *CASES[23].variants))
    outcomes = runner.run([unknown, CASES[24]], ["python"])
    verdicts = [outcome.judgement for outcome in outcomes if outcome.setting.ring == "split"]
    assert verdicts[1] == (Verdict.FAIL, "", "the host process died: IndexError: tuple index out of range")
    assert [judgement.verdict for judgement in verdicts] == [Verdict.REJECT, Verdict.FAIL, Verdict.REJECT]


def test_process_that_does_not_finish_is_wedged(monkeypatch):
    outcomes = outcomes_of([24], monkeypatch, LIMIT=0.001)
    assert {outcome.judgement.verdict for outcome in outcomes} == {Verdict.WEDGED}
    assert not any(outcome.as_expected for outcome in outcomes)


# --- the table --------------------------------------------------------------------------------------------------


def table_of(judgement):
    variant = Variant("the variant", "OK", lambda bench: None)
    case = Case(7, "a title", "T0001", (variant,))
    settings = [Setting(engine, ring) for engine in runner.ENGINES for ring in RINGS]
    return as_text([case], [Outcome(case, variant, setting, judgement) for setting in settings], 1.0).splitlines()


def test_table_is_aligned_and_narrow():
    header, row, blank, closing = table_of(Judgement(Verdict.PASS, "OK"))
    assert blank == ""
    assert closing == "1 cases, 4 variants in 1.0 s: 4 PASS; all as expected"
    assert len(header) < 110
    for column, verdict in (("case", "a title"), ("expected", "PASS"), ("c split", "PASS"), ("python packed", "PASS")):
        assert row[header.index(column) :].startswith(verdict)


def test_unexpected_verdict_is_marked_and_explained():
    header, row, _, first, why, *_, closing = table_of(Judgement(Verdict.FAIL, "IOERR", "a byte was written"))
    assert row[header.index("c split") :].startswith("FAIL !")
    assert first == "case 7, the variant, c split:"
    assert why == "    expected PASS (OK), got FAIL (IOERR): a byte was written"
    assert closing.endswith("4 FAIL; 4 not as expected")


def test_skipped_is_neither_good_nor_bad():
    *_, closing = table_of(Judgement(Verdict.SKIP, "", "no /dev/kvm"))
    assert closing == "1 cases, 4 variants in 1.0 s: 4 SKIP; all as expected"


# --- the command line -------------------------------------------------------------------------------------------


def test_unexpected_verdict_is_status_198(monkeypatch, capfd):
    monkeypatch.setattr(runner, "LIMIT", 0.001)
    assert main(["conformance", "--engine", "python", "--case", "24"]) == 198
    assert "2 WEDGED; 2 not as expected" in capfd.readouterr().out


def test_json_on_standard_output_stands_alone(capfd):
    assert main(["conformance", "--engine", "python", "--case", "24", "--case", "25", "--json", "-"]) == 0
    assert [case["number"] for case in json.loads(capfd.readouterr().out)["cases"]] == [24, 25]


@pytest.mark.parametrize("number", ["0", "61", "x", "-1", ""])
def test_unknown_case_is_one_line(number, capfd):
    assert main(["conformance", "--case", number]) == 192
    assert capfd.readouterr().err.count("\n") == 1


def test_report_that_cannot_be_written_is_found_first(tmp_path, capfd):
    assert main(["conformance", "--json", str(tmp_path / "none" / "x")]) == 196
    assert capfd.readouterr().err.endswith("No such file or directory\n")

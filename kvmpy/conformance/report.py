"""What came of a run, as a table and as JSON."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from kvmpy.conformance.case import Case, Verdict, worst
from kvmpy.conformance.runner import Outcome, Setting

TITLE_WIDTH = 42
NOT_THERE = "-"


def settings_of(outcomes: Sequence[Outcome]) -> list[Setting]:
    """Return the engines and rings that were run, in order."""
    return list(dict.fromkeys(outcome.setting for outcome in outcomes))


def as_text(cases: Sequence[Case], outcomes: Sequence[Outcome], seconds: float) -> str:
    """Return the table: a row for each case with the worst verdict of its variants; a ``!`` where that is wrong."""
    return "\n".join([*_table(cases, outcomes), "", *_unexpected(outcomes), _closing(cases, outcomes, seconds)])


def _table(cases: Sequence[Case], outcomes: Sequence[Outcome]) -> Iterator[str]:
    settings = settings_of(outcomes)
    columns = [f"{setting.engine} {setting.ring}" for setting in settings]
    yield _row("no", "case", "expected", columns, columns)
    for case in cases:
        cells = [_cell([o for o in outcomes if o.case is case and o.setting == setting]) for setting in settings]
        yield _row(str(case.number), case.title, case.expected, cells, columns)


def _row(number: str, title: str, expected: str, cells: Sequence[str], columns: Sequence[str]) -> str:
    last = "  ".join(f"{cell:{max(8, len(column))}}" for cell, column in zip(cells, columns, strict=True))
    return f"{number:>3}  {title:{TITLE_WIDTH}}  {expected:11}  {last}".rstrip()


def _cell(outcomes: Sequence[Outcome]) -> str:
    if not outcomes:
        return NOT_THERE
    mark = "" if all(outcome.as_expected for outcome in outcomes) else " !"
    return worst(outcome.judgement.verdict for outcome in outcomes) + mark


def _unexpected(outcomes: Sequence[Outcome]) -> Iterator[str]:
    for case, variant, setting, (verdict, answer, detail) in (o for o in outcomes if not o.as_expected):
        name = f", {variant.name}" if variant.name else ""
        got = ": ".join(part for part in (f"{verdict} ({answer})" if answer else verdict, detail) if part)
        yield f"case {case.number}{name}, {setting.engine} {setting.ring}:"
        yield f"    expected {variant.expected} ({variant.answer}), got {got}"


def _closing(cases: Sequence[Case], outcomes: Sequence[Outcome], seconds: float) -> str:
    counts = Counter(outcome.judgement.verdict for outcome in outcomes)
    verdicts = ", ".join(f"{counts[verdict]} {verdict}" for verdict in Verdict if counts[verdict])
    wrong = sum(not outcome.as_expected for outcome in outcomes)
    end = f"{wrong} not as expected" if wrong else "all as expected"
    return f"{len(cases)} cases, {len(outcomes)} variants in {seconds:.1f} s: {verdicts}; {end}"


def as_dict(cases: Sequence[Case], outcomes: Sequence[Outcome], seconds: float) -> dict[str, Any]:
    """Return the same for programs."""
    counts = Counter(outcome.judgement.verdict for outcome in outcomes)
    return {
        "as_expected": all(outcome.as_expected for outcome in outcomes),
        "seconds": round(seconds, 3),
        "counts": {verdict.value: counts[verdict] for verdict in Verdict},
        "cases": [_case(case, [o for o in outcomes if o.case is case]) for case in cases],
    }


def _case(case: Case, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    return {
        "number": case.number,
        "title": case.title,
        "villain": case.villain.split(),
        "expected": case.expected,
        "verdict": worst(outcome.judgement.verdict for outcome in outcomes),
        "as_expected": all(outcome.as_expected for outcome in outcomes),
        "variants": [
            {
                "name": outcome.variant.name,
                "engine": outcome.setting.engine,
                "ring": outcome.setting.ring,
                "expected": outcome.variant.expected,
                "expected_answer": outcome.variant.answer,
                **outcome.judgement._asdict(),
            }
            for outcome in outcomes
        ],
    }

"""``kvmpy doctor``: tell whether KVM works on this host, what it can do, and how to mend what is wrong.

Prints one line for each finding: ``ok``, ``note`` (guests run; kvmpy does it for them, or they do without) or ``FAIL``
(guests do not run), and below it what to do. A fix that several neighbours share stands once, below the last.

Floor: cli.
"""

import argparse
from collections import Counter
from collections.abc import Iterator
from typing import Any

from kvmpy.kvm.system import DEVICE
from kvmpy.machine.probe import SECTIONS, Examination, Finding, Verdict, examine
from kvmpy.pc.result import ExitStatus

OK, NOTE, FAIL = "ok", "note", "FAIL"
_NAME_WIDTH = max(len(ability) for abilities in SECTIONS.values() for ability in abilities)
_INDENT = "  "


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def execute(arguments: argparse.Namespace) -> int:
    """Examine the host, print the report, and return the exit status: 0, or 196 where no guest can run."""
    examination = examine(DEVICE)
    print(as_json(examination) if arguments.json else as_text(examination))
    return exit_status(examination)


def exit_status(examination: Examination) -> int:
    """Return the command's exit status."""
    return 0 if examination.works else ExitStatus.HOST


def mark(finding: Finding) -> str:
    """Return how much a finding matters."""
    if finding.verdict is Verdict.OK:
        return OK
    return FAIL if finding.fails else NOTE


def headline(examination: Examination) -> str:
    """Return the first line: does it work, and where are we?"""
    host = examination.host
    modules = ", ".join(host.modules) or "no KVM vendor module"
    where = f"{host.cpu}, Linux {host.kernel}, {modules}"
    if examination.works:
        return f"KVM works here: {where}"
    return f"KVM does not work here: {where}"


def as_text(examination: Examination) -> str:
    """Return the report for people."""
    return "\n".join(_lines(examination))


def as_json(examination: Examination) -> str:
    """Return the same report for programs."""
    import json

    host = examination.host
    report = {
        "works": examination.works,
        "device": examination.device,
        "cpu": host.cpu,
        "kernel": host.kernel,
        "modules": list(host.modules),
        "seconds": round(examination.seconds, 3),
        "findings": [_finding(title, found) for title, findings in _sections(examination) for found in findings],
    }
    return json.dumps(report, indent=2)


def _finding(title: str, found: Finding) -> dict[str, Any]:
    return {
        "section": title,
        "name": found.name,
        "mark": mark(found),
        "verdict": found.verdict,
        "detail": found.detail,
        "fix": found.fix,
    }


def _lines(examination: Examination) -> Iterator[str]:
    yield headline(examination)
    for title, findings in _sections(examination):
        yield ""
        yield title
        yield from _section(findings)
    yield ""
    yield _summary(examination)


def _sections(examination: Examination) -> Iterator[tuple[str, list[Finding]]]:
    """Yield the sections that were examined, each with its findings."""
    by_name = {found.name: found for found in examination.findings}
    for title, abilities in SECTIONS.items():
        findings = [by_name[ability] for ability in abilities if ability in by_name]
        if findings:
            yield title, findings


def _section(findings: list[Finding]) -> Iterator[str]:
    for i, found in enumerate(findings):
        following = findings[i + 1] if i + 1 < len(findings) else None
        yield f"{_INDENT}{mark(found):4}  {found.name:{_NAME_WIDTH}}  {found.detail}".rstrip()
        shared = following is not None and following.fix == found.fix and not found.fails
        if found.fix and not shared:
            yield f"{_INDENT}{'':4}  {'':{_NAME_WIDTH}}  fix: {found.fix}"


def _summary(examination: Examination) -> str:
    count = Counter(mark(found) for found in examination.findings)
    counts = ", ".join(f"{count[kind]} {kind}" for kind in (OK, NOTE, FAIL))
    if not examination.works:
        return f"{counts}, in {examination.seconds:.1f} s. kvmpy cannot run guests until the failures are mended."
    does = "kvmpy runs guests; the notes say what it does for them, and what they do without."
    return f"{counts}, in {examination.seconds:.1f} s. {does}"

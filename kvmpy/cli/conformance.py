"""``kvmpy conformance``: hostile drivers against the disks, and what came of each.

Floor: cli.
"""

import argparse
import json
import os
import time

from kvmpy.cli.output import open_output
from kvmpy.cli.parser import reads
from kvmpy.conformance.cases.table import CASES
from kvmpy.conformance.report import as_dict, as_text
from kvmpy.conformance.runner import ENGINES, run
from kvmpy.pc.result import ExitStatus

STANDARD_OUTPUT = "-"


@reads
def case_number(text: str) -> int:
    """Read the number of a case."""
    if not text.isdecimal() or not 1 <= int(text) <= len(CASES):
        raise ValueError(f"{text!r} is not a case: allowed is 1 to {len(CASES)}")
    return int(text)


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument(
        "--engine", choices=(*ENGINES, "both"), default="both", help="which block engine (default: both)"
    )
    parser.add_argument(
        "--case", metavar="N", type=case_number, action="append", help="run this case; repeatable (default: all)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the verdicts as JSON; - is standard output, alone")


def execute(arguments: argparse.Namespace) -> int:
    """Run the cases, print the table, and return the exit status: 0, or 198 where a verdict is not as expected."""
    # Opened first: a path that cannot be written is found before the cases run.
    fd = open_output(arguments.json) if arguments.json not in (None, STANDARD_OUTPUT) else None
    cases = [case for case in CASES if arguments.case is None or case.number in arguments.case]
    engines = ENGINES if arguments.engine == "both" else (arguments.engine,)
    start = time.monotonic()
    outcomes = run(cases, engines)
    seconds = time.monotonic() - start
    report = json.dumps(as_dict(cases, outcomes, seconds), indent=2)
    if fd is not None:
        with os.fdopen(fd, "w") as file:
            file.write(f"{report}\n")
    print(report if arguments.json == STANDARD_OUTPUT else as_text(cases, outcomes, seconds))
    return 0 if all(outcome.as_expected for outcome in outcomes) else ExitStatus.CRASH

"""Runs the cases: a process for each engine and kind of ring, and another one where a variant brought it down.

What a process did not survive is FAIL, what it did not finish in time is WEDGED; the variants behind it run in the
next. Source of the verdicts otherwise: `kvmpy.conformance.judge`.
"""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, NamedTuple

from kvmpy.conformance.case import RINGS, Case, Variant, Verdict
from kvmpy.conformance.judge import Judgement

ENGINES = ("c", "python")
LIMIT = 60.0
"""Seconds for one variant: the longest takes two where nothing else runs."""
PACKAGES = Path(__file__).resolve().parents[2]


class Setting(NamedTuple):
    """An engine and a kind of ring."""

    engine: str
    ring: str


class Outcome(NamedTuple):
    """What came of one variant in one setting."""

    case: Case
    variant: Variant
    setting: Setting
    judgement: Judgement

    @property
    def as_expected(self) -> bool:
        """Whether it is the verdict, and the answer, that the variant says; or none, where it could not be run."""
        verdict, answer, _ = self.judgement
        return verdict is Verdict.SKIP or (verdict, answer) == (self.variant.expected, self.variant.answer)


def run(cases: Sequence[Case], engines: Sequence[str]) -> list[Outcome]:
    """Run all variants of ``cases`` on ``engines``, as many processes at once as there are CPUs."""
    settings = [Setting(engine, ring) for engine in engines for ring in RINGS]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return [outcome for outcomes in pool.map(lambda s: _run_setting(cases, s), settings) for outcome in outcomes]


def _run_setting(cases: Sequence[Case], setting: Setting) -> list[Outcome]:
    wanted = [
        (case, index) for case in cases for index, variant in enumerate(case.variants) if setting.ring in variant.rings
    ]
    judgements: list[Judgement] = []
    while len(judgements) < len(wanted):
        judgements += _run_process(setting, wanted[len(judgements) :])
    return [
        Outcome(case, case.variants[index], setting, judgement)
        for (case, index), judgement in zip(wanted, judgements, strict=True)
    ]


def _run_process(setting: Setting, wanted: Sequence[tuple[Case, int]]) -> list[Judgement]:
    """Return the judgements of one process: of all, or of those up to the one that it did not survive."""
    command = [sys.executable, "-m", "kvmpy.conformance.worker", *setting]
    command += [f"{case.number}:{index}" for case, index in wanted]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(PACKAGES), os.environ.get("PYTHONPATH", "")))}
    judgements: list[Judgement] = []
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=environment) as process,
    ):
        assert process.stdout is not None
        try:
            for line in _lines(process.stdout.fileno()):
                verdict, answer, detail = json.loads(line)
                judgements.append(Judgement(Verdict(verdict), answer, detail))
        except TimeoutError:
            judgements.append(Judgement(Verdict.WEDGED, "", f"not done within {LIMIT:.0f} s"))
        process.kill()
        status = process.wait()
        if len(judgements) < len(wanted) and not (judgements and judgements[-1].verdict is Verdict.WEDGED):
            judgements.append(Judgement(Verdict.FAIL, "", f"the host process died: {_why(status, errors)}"))
    return judgements


def _lines(fd: int) -> Iterator[bytes]:
    """Yield the lines that come, until the end. Raises TimeoutError: none came in time."""
    pending = b""
    deadline = time.monotonic() + LIMIT
    while select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
        data = os.read(fd, 65536)
        if not data:
            return
        *lines, pending = (pending + data).split(b"\n")
        if lines:
            deadline = time.monotonic() + LIMIT
        yield from lines
    raise TimeoutError


def _why(status: int, errors: IO[bytes]) -> str:
    if status < 0 and -status != signal.SIGKILL:
        return signal.Signals(-status).name
    errors.seek(0)
    last = errors.read().decode(errors="replace").strip().splitlines()
    return last[-1] if last else f"exit status {status}"

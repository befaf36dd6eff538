"""Collects the rows of all benchmarks, prints them as one table at the end, and writes them to build/benchmarks/.

Nothing here fails because of a time: a missed aim is a word in the table. pytest-benchmark takes the rounds; its own
table is left out, for it knows nothing of the baselines.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from host import environment, load
from sampling import Row

from kvmpy import Kvm, KvmUnavailable

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "build" / "benchmarks"
HEADINGS = ("measured", "kvmpy", "baseline", "ratio or difference", "at most", "met")
WIDTHS = (38, 10, 10, 24, 8, 3)
"""Columns, with one space between: 98 in all."""

ROWS = pytest.StashKey[list[Row]]()
ENVIRONMENT = pytest.StashKey[dict[str, str | int]]()


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.option.benchmark_quiet = True
    config.stash[ROWS] = []
    config.stash[ENVIRONMENT] = environment()


def pytest_runtest_setup(item: pytest.Item) -> None:
    try:
        Kvm().close()
    except KvmUnavailable as error:
        pytest.skip(f"no usable /dev/kvm: {error}")


@pytest.fixture
def rows(request: pytest.FixtureRequest) -> list[Row]:
    """Where a benchmark puts what it found."""
    return request.config.stash[ROWS]


@pytest.fixture
def one_cpu() -> Iterator[int]:
    """Keep this process, its threads and its children on one CPU: both sides of a comparison meet the same caches."""
    before = os.sched_getaffinity(0)
    chosen = max(before)
    os.sched_setaffinity(0, {chosen})
    yield chosen
    os.sched_setaffinity(0, before)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows, host = config.stash[ROWS], config.stash[ENVIRONMENT]
    if not rows:
        return
    host["load_at_end"] = load()
    terminalreporter.write_line("")
    for line in (*host_lines(host), "", *table(rows)):
        terminalreporter.write_line(line)
    OUTPUT.mkdir(parents=True, exist_ok=True)
    target = OUTPUT / "latest.json"
    target.write_text(json.dumps({"environment": host, "rows": [row.as_json() for row in rows]}, indent=2) + "\n")
    terminalreporter.write_line("")
    terminalreporter.write_line(f"written to {target.relative_to(ROOT)}")


def host_lines(host: dict[str, str | int]) -> list[str]:
    """Return the machine in two lines."""
    return [
        f"{host['cpu']}, {host['cpus']} CPUs; Linux {host['kernel']}; {host['kvm']}",
        f"Python {host['python']}, QEMU {host['qemu']}; load {host['load_at_start']}, at the end {host['load_at_end']}",
    ]


def table(rows: list[Row]) -> list[str]:
    """Return ``rows`` as aligned text."""
    return [_line(HEADINGS), " ".join("-" * width for width in WIDTHS), *(_line(row.cells()) for row in rows)]


def _line(cells: tuple[str, ...]) -> str:
    """Return ``cells`` in their columns: figures to the right, words to the left."""
    texts = (
        f"{cell:>{w}}" if i in (1, 2) else f"{cell:<{w}}" for i, (cell, w) in enumerate(zip(cells, WIDTHS, strict=True))
    )
    return " ".join(texts).rstrip()

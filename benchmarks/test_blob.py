"""Page blobs: what a thin copy takes, and what a long line of copies costs who reads the last one."""

import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from conftest import OUTPUT
from disk_guest import Workload, build, run_kvmpy
from pytest_benchmark.fixture import BenchmarkFixture
from sampling import Row, figure, ratio

from kvmpy.storage.blob import PageBlob
from kvmpy.storage.blob_copy import copy, delete
from kvmpy.units import GiB, KiB, MiB

COPIES = 100
SPAN = 64 * MiB
READS = [
    Workload("4 KiB read, depth 32", 4 * KiB, 32, 200_000, SPAN),
    Workload("1 MiB read, depth 8", MiB, 8, 512, SPAN, random=False),
]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder on the disk that has the checkout."""
    OUTPUT.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=OUTPUT) as name:
        yield Path(name)


def blob_with_data(path: Path, size: int) -> Path:
    """Make a blob of ``size`` bytes whose first SPAN bytes are no zeros."""
    with PageBlob.create(path, size) as blob:
        for at in range(0, SPAN, MiB):
            blob.write(at, bytes([at // MiB + 1]) * MiB)
    return path


def test_thin_copy(benchmark: BenchmarkFixture, rows: list[Row], folder: Path) -> None:
    """A thin copy of 10 GiB; before each, the source was written, so that it has a layer to be frozen."""
    source, target = blob_with_data(folder / "source.blob", 10 * GiB), folder / "copy.blob"
    taken: list[float] = []

    def written() -> None:
        if target.exists():
            delete(target)
        with PageBlob.open(source) as blob:
            blob.write(0, bytes([len(taken) % 255 + 1]) * 512)

    def copied() -> None:
        started_ns = time.perf_counter_ns()
        copy(source, target)
        taken.append((time.perf_counter_ns() - started_ns) / 1e6)

    benchmark.pedantic(copied, setup=written, rounds=50)
    rows.append(figure("thin copy of a 10 GiB blob", "ms", taken, aim=10))


def test_line_of_copies(benchmark: BenchmarkFixture, rows: list[Row], folder: Path) -> None:
    """A guest reads the first copy of a blob, and the last of a hundred copies of copies, each of which was written."""
    build()
    previous = blob_with_data(folder / "0.blob", SPAN)
    for number in range(1, COPIES + 1):
        path = folder / f"{number}.blob"
        copy(previous, path)
        with PageBlob.open(path) as blob:
            blob.write(number * SPAN // (COPIES + 1) // (64 * KiB) * (64 * KiB), bytes([number]) * 64 * KiB)
        previous = path
    for workload in READS:
        rows.append(compare(workload, folder / "1.blob", previous))
    benchmark.pedantic(lambda: None)


def compare(workload: Workload, first: Path, last: Path) -> Row:
    """Return what a read of ``last`` takes beside one of ``first``, both from the page cache."""
    run_kvmpy(first, workload, format=None)
    run_kvmpy(last, workload, format=None)
    of_first: list[float] = []
    of_last: list[float] = []
    for _ in range(9):
        of_first.append(run_kvmpy(first, workload, format=None)[0].total)
        of_last.append(run_kvmpy(last, workload, format=None)[0].total)
    return ratio(f"100th copy / first, {workload.name.partition(',')[0]}", "us", of_last, of_first, aim=1.2)

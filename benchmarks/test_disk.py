"""What a disk request costs beside QEMU's microvm: one bare-metal guest, one image, taking turns in one run.

The image is a raw file whose pages are all in the page cache before each turn, and clean. Both sides write back, and
both guests' memory is in huge pages, as the memory of the plain loop is. The guest polls, and wants no interrupts;
where "irq" stands, the device raises them, and the guest acknowledges each batch by two register accesses.
"""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from c_program import CProgram
from conftest import OUTPUT
from disk_guest import Shares, Times, Workload, build, run_kvmpy, run_qemu
from pytest_benchmark.fixture import BenchmarkFixture
from sampling import Row, figure, ratio

from kvmpy.pc.disk import Engine
from kvmpy.units import KiB, MiB

SOURCES = Path(__file__).parent
SPAN = 256 * MiB
ROUNDS = 9
SMALL = 4 * KiB

WORKLOADS = [
    Workload("4 KiB read, depth 1", SMALL, 1, 5_000, SPAN),
    Workload("4 KiB write, depth 1", SMALL, 1, 5_000, SPAN, write=True),
    Workload("4 KiB read, depth 32", SMALL, 32, 30_000, SPAN),
    Workload("4 KiB write, depth 32", SMALL, 32, 30_000, SPAN, write=True),
    Workload("4 KiB read, depth 1, irq", SMALL, 1, 2_000, SPAN, interrupts=True),
    Workload("4 KiB read, depth 32, irq", SMALL, 32, 10_000, SPAN, interrupts=True),
    Workload("1 MiB read, depth 8", MiB, 8, 512, SPAN, random=False),
    Workload("1 MiB write, depth 8", MiB, 8, 512, SPAN, write=True, random=False),
]
MOST_OF_QEMU = {1: 1.0, 32: 1 / 1.2, 8: 1.0}
"""By depth: kvmpy's time, of QEMU's."""
MOST_OF_LOOP = 1 / 0.8


@pytest.fixture(scope="module")
def image() -> Iterator[Path]:
    """A file of SPAN random bytes, and the guest built."""
    build()
    path = OUTPUT / "disk.raw"
    with path.open("wb") as file:
        for _ in range(SPAN // MiB):
            file.write(os.urandom(MiB))
    yield path
    path.unlink()


@pytest.fixture
def loop(image: Path) -> Iterator[CProgram]:
    loop = CProgram("disk_loop.c", OUTPUT, image, str(SPAN))
    yield loop
    loop.close()


def settle(image: Path) -> None:
    """Bring the page cache into the same state: all of the image there, and nothing of it dirty."""
    fd = os.open(image, os.O_RDWR)
    os.fdatasync(fd)
    for at in range(0, SPAN, 8 * MiB):
        os.pread(fd, 8 * MiB, at)
    os.close(fd)


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: workload.name)
def test_disk(benchmark: BenchmarkFixture, rows: list[Row], image: Path, loop: CProgram, workload: Workload) -> None:
    """The guest's time for a request, here and under QEMU; for large ones, beside a plain loop too."""
    ours: list[tuple[Times, Shares | None]] = []
    theirs: list[Times] = []
    plain: list[float] = []

    def baselines() -> None:
        settle(image)
        theirs.append(run_qemu(image, workload))
        settle(image)
        plain.append(loop.round(workload.transfers))
        settle(image)

    def target() -> None:
        ours.append(run_kvmpy(image, workload))

    benchmark.pedantic(target, setup=baselines, rounds=ROUNDS)
    totals = [times.total for times, _ in ours]
    rows.append(
        ratio(f"{workload.name} / QEMU", "us", totals, [t.total for t in theirs], aim=MOST_OF_QEMU[workload.depth])
    )
    rows.append(ratio("  without the guest's own time", "us", [t.host for t, _ in ours], [t.host for t in theirs]))
    aim = MOST_OF_LOOP if workload.size == MiB else None
    rows.append(ratio("  / plain preadv, pwritev loop", "us", totals, plain, aim=aim))
    rows.extend(split(ours))


def split(ours: list[tuple[Times, Shares | None]]) -> Iterator[Row]:
    """Yield where a request's time goes. With several in flight the guest's and the worker's shares overlap."""
    shares = [share for _, share in ours if share is not None]
    yield figure("  of that: guest", "us", [times.guest for times, _ in ours])
    yield figure("  of that: exit (QueueNotify)", "us", [times.notifying for times, _ in ours])
    yield figure("  of that: queue", "us", [share.queue for share in shares])
    yield figure("  of that: file", "us", [share.file for share in shares])
    yield figure("  of that: interrupt", "us", [share.interrupt for share in shares])


def test_python_twin(benchmark: BenchmarkFixture, rows: list[Row], image: Path) -> None:
    """The C engine against its readable twin."""
    for workload in (w for w in WORKLOADS if not w.interrupts):
        twin: list[float] = []
        ours: list[float] = []
        for _ in range(5):
            settle(image)
            ours.append(run_kvmpy(image, workload)[0].total)
            settle(image)
            twin.append(run_kvmpy(image, workload, engine=Engine.PYTHON)[0].total)
        rows.append(ratio(f"{workload.name} / Python twin", "us", ours, twin))
    benchmark.pedantic(lambda: None)


@pytest.mark.parametrize(
    ("name", "depth", "count", "direct"),
    [("cached, depth 1", 1, 20_000, 0), ("cached, depth 32", 32, 50_000, 0), ("O_DIRECT, depth 32", 32, 2_000, 1)],
)
def test_io_uring(
    benchmark: BenchmarkFixture, rows: list[Row], image: Path, name: str, depth: int, count: int, direct: int
) -> None:
    """What the engine uses beside what it does not: 4 KiB reads by system calls alone."""
    program = OUTPUT / "uring_loop"
    subprocess.run(["gcc", "-O2", "-Wall", "-Wextra", "-o", program, SOURCES / "uring_loop.c"], check=True)
    command = [program, image, *(str(word) for word in (SPAN, SMALL, depth, count, direct))]
    preadv: list[float] = []
    io_uring: list[float] = []

    def both() -> None:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 2:
            pytest.skip("this kernel has no io_uring for us")
        one, other = done.stdout.split()
        preadv.append(float(one) / 1000)
        io_uring.append(float(other) / 1000)

    settle(image)
    benchmark.pedantic(both, rounds=7, warmup_rounds=0 if direct else 1)
    rows.append(ratio(f"preadv / io_uring, {name}", "us", preadv, io_uring))

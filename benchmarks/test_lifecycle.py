"""A hundred machines in one process, one after the other: how long each takes, and that nothing stays behind."""

import gc
import os
import threading
import time
from pathlib import Path
from typing import NamedTuple

from conftest import ROOT
from pytest_benchmark.fixture import BenchmarkFixture
from sampling import Row, figure

from kvmpy import MachineSpec, Pc
from kvmpy.units import KiB, MiB

MACHINES, SETTLED = 100, 50
GROWTH = 2 * MiB
"""What malloc may keep between the 50th and the 100th machine; a serial ring left behind by each would be 3 MiB."""


class Holdings(NamedTuple):
    """What this process has: open descriptors, threads, run pages mapped, and bytes of its own."""

    descriptors: list[str]
    threads: int
    run_pages: int
    resident: int


def holdings() -> Holdings:
    gc.collect()
    maps = Path("/proc/self/maps").read_text()
    return Holdings(sorted(os.listdir("/proc/self/fd")), threading.active_count(), maps.count("kvm-vcpu"), resident())


def resident() -> int:
    """Return the bytes of this process that are in memory and its own."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * KiB for line in status.splitlines() if line.startswith("RssAnon"))


def test_a_hundred_machines_leave_nothing_behind(benchmark: BenchmarkFixture, rows: list[Row]) -> None:
    """Each boots guest.img on two cores and runs it to its end."""
    created: list[float] = []
    closed: list[float] = []
    settled: list[Holdings] = []
    spec = MachineSpec(ROOT / "guest.img", cores=2)

    def machine() -> None:
        started = time.perf_counter()
        pc = Pc(spec)
        ready = time.perf_counter()
        assert pc.run(timeout=30.0).status == 0
        ended = time.perf_counter()
        pc.close()
        closed.append((time.perf_counter() - ended) * 1e3)
        created.append((ready - started) * 1e3)
        if len(created) == SETTLED:
            settled.append(holdings())

    before = holdings()
    benchmark.pedantic(machine, rounds=MACHINES)
    after = holdings()
    assert after.descriptors == before.descriptors
    assert (after.threads, after.run_pages) == (before.threads, before.run_pages)
    assert after.resident - settled[0].resident < GROWTH
    rows.append(figure("machine with 2 cores created", "ms", created))
    rows.append(figure("machine with 2 cores closed", "ms", closed))
    grown = (after.resident - settled[0].resident) / MiB
    rows.append(figure("memory kept, 50th to 100th machine", "MiB", [grown], aim=GROWTH / MiB))

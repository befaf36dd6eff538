"""How much host memory a run costs beyond what the guest touched: the peak of the process, less the memfd's pages."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT
from process import plain_environment
from pytest_benchmark.fixture import BenchmarkFixture
from sampling import Row, figure

# `kvmpy run` as it is, but it tells at the end how many bytes of the memfd were populated, and its own peak.
MEASURED_RUN = """
import json, os, sys
from kvmpy.cli.main import main
from kvmpy.machine.memory import GuestMemory

touched = []
close = GuestMemory.close

def close_measured(memory):
    if memory.fd >= 0 and not touched:
        touched.append(os.fstat(memory.fd).st_blocks * 512)
    close(memory)

GuestMemory.close = close_measured
status = main(sys.argv[1:])
with open("/proc/self/status") as lines:
    peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
print(json.dumps({"status": status, "peak": peak, "touched": touched[0]}), file=sys.stderr)
"""


def measure(size: str) -> dict[str, int]:
    """Run guest.img on one core with ``size`` of memory; return its status, and its peak and touched bytes."""
    command = [sys.executable, "-c", MEASURED_RUN, "run", str(ROOT / "guest.img"), "--mem", size]
    ended = subprocess.run(command, capture_output=True, text=True, env=plain_environment(), check=True)
    found: dict[str, int] = json.loads(ended.stderr.splitlines()[-1])
    assert found["status"] == 0
    assert found["touched"] > 0
    return found


@pytest.mark.parametrize(("size", "name"), [("128M", "128 MiB"), ("3.5G", "3.5 GiB")])
def test_peak_memory(benchmark: BenchmarkFixture, rows: list[Row], size: str, name: str) -> None:
    runs: list[dict[str, int]] = []
    benchmark.pedantic(lambda: runs.append(measure(size)), rounds=5)
    beyond = [(run["peak"] - run["touched"]) / (1 << 20) for run in runs]
    rows.append(figure(f"peak memory beyond guest's, {name}", "MiB", beyond, aim=24))

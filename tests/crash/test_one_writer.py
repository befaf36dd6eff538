"""Two processes can never both write one disk, also when those who hold it are killed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from power_cuts import CAMPAIGN
from recording import HERE

from kvmpy.storage.convert import check_disk, create
from kvmpy.units import KiB

INCREMENTS = 10_000 if CAMPAIGN else 120
SEED = int(os.environ.get("KVMPY_SEED", "20261120"))


def rage(path: Path, format: str, increments: int, *options: str) -> subprocess.CompletedProcess[str]:
    """Have a storm of processes on a new disk at ``path``."""
    create(str(path), 64 * KiB, format=format)
    command = [sys.executable, HERE / "storm.py", path, format, str(increments), str(SEED), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=3600 if CAMPAIGN else 100)


def lost(storm: subprocess.CompletedProcess[str]) -> str | None:
    """Return what shows that two have written at once, or None."""
    if storm.returncode:
        return storm.stderr
    result = json.loads(storm.stdout)
    reported = result["reported"]
    if len(set(reported)) < len(reported):
        return "two processes have made the same increment"
    if not set(reported) <= set(range(1, result["count"] + 1)):
        return "an increment is lost"
    if result["count"] > len(reported) + result["killed"]:
        return "somebody has counted twice"
    return None


@pytest.mark.parametrize("format", ["blob", "raw", "vhd-fixed", "vhd-dynamic"])
def test_no_increment_is_lost_in_a_storm_of_writers(format: str, tmp_path: Path) -> None:
    """A second writer is refused while the first lives, and takes over at once when it is dead."""
    storm = rage(tmp_path / "disk", format, INCREMENTS)
    print(f"\nseed {SEED}")
    assert lost(storm) is None
    assert check_disk(str(tmp_path / "disk"), format=format) == []


@pytest.mark.parametrize("format", ["blob", "raw"])
def test_storm_without_a_lock_is_seen(format: str, tmp_path: Path) -> None:
    """The planted defect: nobody takes the lock. It ends when two have made the same increment."""
    assert lost(rage(tmp_path / "disk", format, 1_000_000, "without-lock")) is not None

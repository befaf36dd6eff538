"""What the figures were measured on: without it they mean nothing."""

import os
import platform
import shutil
import subprocess
from pathlib import Path


def environment() -> dict[str, str | int]:
    """Return the machine, as the table and the JSON file name it."""
    return {
        "cpu": _cpu(),
        "cpus": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "kvm": _kvm_modules(),
        "python": platform.python_version(),
        "qemu": _qemu(),
        "load_at_start": load(),
    }


def load() -> str:
    """Return the load averages of 1, 5 and 15 minutes."""
    return " ".join(f"{value:.2f}" for value in os.getloadavg())


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _kvm_modules() -> str:
    """Return the vendor modules that are loaded or built in: kvm_intel, kvm_amd."""
    return " ".join(sorted(path.name for path in Path("/sys/module").glob("kvm_*"))) or "unknown"


def _qemu() -> str:
    qemu = shutil.which("qemu-system-x86_64")
    if qemu is None:
        return "none"
    said = subprocess.run([qemu, "--version"], capture_output=True, text=True, check=True).stdout
    return said.split("version ")[1].split()[0]

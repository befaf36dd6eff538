"""What the figures were measured on: without it they mean nothing."""

import os
import platform
import shutil
import subprocess

from kvmpy.machine.probe.host import describe_host


def environment() -> dict[str, str | int]:
    """Return the machine, as the table and the JSON file name it."""
    host = describe_host()
    return {
        "cpu": host.cpu,
        "cpus": len(os.sched_getaffinity(0)),
        "kernel": host.kernel,
        "kvm": " ".join(host.modules) or "built in",
        "python": platform.python_version(),
        "qemu": _qemu(),
        "load_at_start": load(),
    }


def load() -> str:
    """Return the load averages of 1, 5 and 15 minutes."""
    return " ".join(f"{value:.2f}" for value in os.getloadavg())


def _qemu() -> str:
    qemu = shutil.which("qemu-system-x86_64")
    if qemu is None:
        return "none"
    said = subprocess.run([qemu, "--version"], capture_output=True, text=True, check=True).stdout
    return said.split("version ")[1].split()[0]

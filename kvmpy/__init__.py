"""kvmpy: a hypervisor controller that people read.

Level 1 is the KVM API document in Python (`Kvm`, `GuestMemory`, the exits); level 2 is a PC (`Pc`, `MachineSpec`).
Names are loaded when they are first used, so that a command pays only for what it needs.
"""

from typing import TYPE_CHECKING

from kvmpy.errors import (
    DiskError,
    GuestError,
    GuestMemoryError,
    ImageError,
    KvmError,
    KvmpyError,
    KvmUnavailable,
    UnhandledExit,
)
from kvmpy.units import GiB, KiB, MiB

if TYPE_CHECKING:
    from kvmpy.kvm import Hlt, IoIn, IoOut, Kvm, MmioRead, MmioWrite, Shutdown, Vcpu, Vm
    from kvmpy.machine.memory import GuestMemory
    from kvmpy.machine.x86 import long_mode, protected_mode, real_mode
    from kvmpy.pc import MachineSpec, Pc, RunResult
    from kvmpy.pc.disk import Disk

__version__ = "0.1.0"

_HOMES = {
    "kvmpy.kvm": ("Hlt", "IoIn", "IoOut", "Kvm", "MmioRead", "MmioWrite", "Shutdown", "Vcpu", "Vm"),
    "kvmpy.machine.memory": ("GuestMemory",),
    "kvmpy.machine.x86": ("long_mode", "protected_mode", "real_mode"),
    "kvmpy.pc": ("MachineSpec", "Pc", "RunResult"),
    "kvmpy.pc.disk": ("Disk",),
}

__all__ = [
    "Disk",
    "DiskError",
    "GiB",
    "GuestError",
    "GuestMemory",
    "GuestMemoryError",
    "Hlt",
    "ImageError",
    "IoIn",
    "IoOut",
    "KiB",
    "Kvm",
    "KvmError",
    "KvmUnavailable",
    "KvmpyError",
    "MachineSpec",
    "MiB",
    "MmioRead",
    "MmioWrite",
    "Pc",
    "RunResult",
    "Shutdown",
    "UnhandledExit",
    "Vcpu",
    "Vm",
    "__version__",
    "long_mode",
    "protected_mode",
    "real_mode",
]


def __getattr__(name: str) -> object:
    for home, names in _HOMES.items():
        if name in names:
            import importlib

            return getattr(importlib.import_module(home), name)
    raise AttributeError(f"module 'kvmpy' has no attribute {name!r}")

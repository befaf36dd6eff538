"""A PC: the one place that composes. A typed `MachineSpec` becomes a running `Pc` and a typed `RunResult`."""

from kvmpy.pc.pc import Pc
from kvmpy.pc.result import DiskUse, ExitStatus, RangeUse, RunResult
from kvmpy.pc.spec import Announcement, DebugExit, MachineSpec, OnReboot

__all__ = [
    "Announcement",
    "DebugExit",
    "DiskUse",
    "ExitStatus",
    "MachineSpec",
    "OnReboot",
    "Pc",
    "RangeUse",
    "RunResult",
]

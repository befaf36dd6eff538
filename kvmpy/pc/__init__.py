"""A PC: the one place that composes. A typed `MachineSpec` becomes a running `Pc` and a typed `RunResult`."""

from kvmpy.pc.pc import Pc
from kvmpy.pc.result import ExitStatus, RangeUse, RunResult
from kvmpy.pc.spec import DebugExit, MachineSpec

__all__ = ["DebugExit", "ExitStatus", "MachineSpec", "Pc", "RangeUse", "RunResult"]

"""``/dev/kvm`` as it is: the KVM API document in Python.

One class for each kind of file descriptor, methods named after the ioctls, exits as a closed set of types. Knows no
board and no boot protocol; imports the C shim and nothing else of kvmpy but errors and units.

``lib`` has every constant of the KVM headers under its own name: ``lib.KVM_CAP_IRQCHIP``, ``lib.KVM_MEM_READONLY``.
"""

from kvmpy._shim import lib
from kvmpy.kvm.decode import ExitRecord
from kvmpy.kvm.exits import (
    BudgetSpent,
    DeadlinePassed,
    Debug,
    Exit,
    ExitPort,
    FailEntry,
    Hlt,
    Hypercall,
    InternalError,
    Intr,
    IoapicEoi,
    IoIn,
    IoOut,
    IrqWindowOpen,
    MmioRead,
    MmioWrite,
    Rdmsr,
    Shutdown,
    SystemEvent,
    Unknown,
    Wrmsr,
)
from kvmpy.kvm.ranges import Action, FastRange, RangeTable, Space
from kvmpy.kvm.system import Kvm
from kvmpy.kvm.vcpu import Vcpu
from kvmpy.kvm.vm import Vm

__all__ = [
    "Action",
    "BudgetSpent",
    "DeadlinePassed",
    "Debug",
    "Exit",
    "ExitPort",
    "ExitRecord",
    "FailEntry",
    "FastRange",
    "Hlt",
    "Hypercall",
    "InternalError",
    "Intr",
    "IoIn",
    "IoOut",
    "IoapicEoi",
    "IrqWindowOpen",
    "Kvm",
    "MmioRead",
    "MmioWrite",
    "RangeTable",
    "Rdmsr",
    "Shutdown",
    "Space",
    "SystemEvent",
    "Unknown",
    "Vcpu",
    "Vm",
    "Wrmsr",
    "lib",
]

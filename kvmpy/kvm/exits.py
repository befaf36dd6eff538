"""Why KVM_RUN came back: a closed set of types, made for ``match``.

The names are those of ``struct kvm_run``. An exit is complete only after KVM_RUN was entered again: until then the
instruction of an IoIn, IoOut, MmioRead or MmioWrite has not finished, and RIP may still point at it
(`Vcpu.complete`).

Source: KVM API §5, "The kvm_run structure".
"""

from dataclasses import dataclass, field
from enum import IntEnum

from kvmpy._shim import lib


class ExitReason(IntEnum):
    """KVM_EXIT_*: the field ``exit_reason``, as far as an x86 host gives it."""

    UNKNOWN = lib.KVM_EXIT_UNKNOWN
    EXCEPTION = lib.KVM_EXIT_EXCEPTION
    IO = lib.KVM_EXIT_IO
    HYPERCALL = lib.KVM_EXIT_HYPERCALL
    DEBUG = lib.KVM_EXIT_DEBUG
    HLT = lib.KVM_EXIT_HLT
    MMIO = lib.KVM_EXIT_MMIO
    IRQ_WINDOW_OPEN = lib.KVM_EXIT_IRQ_WINDOW_OPEN
    SHUTDOWN = lib.KVM_EXIT_SHUTDOWN
    FAIL_ENTRY = lib.KVM_EXIT_FAIL_ENTRY
    INTR = lib.KVM_EXIT_INTR
    SET_TPR = lib.KVM_EXIT_SET_TPR
    TPR_ACCESS = lib.KVM_EXIT_TPR_ACCESS
    NMI = lib.KVM_EXIT_NMI
    INTERNAL_ERROR = lib.KVM_EXIT_INTERNAL_ERROR
    SYSTEM_EVENT = lib.KVM_EXIT_SYSTEM_EVENT
    IOAPIC_EOI = lib.KVM_EXIT_IOAPIC_EOI
    HYPERV = lib.KVM_EXIT_HYPERV
    X86_RDMSR = lib.KVM_EXIT_X86_RDMSR
    X86_WRMSR = lib.KVM_EXIT_X86_WRMSR
    X86_BUS_LOCK = lib.KVM_EXIT_X86_BUS_LOCK


@dataclass(slots=True)
class IoIn:
    """The guest reads ``count`` times ``size`` bytes from ``port``: answer with `reply`."""

    port: int
    size: int
    count: int = 1
    buffer: memoryview = field(default=memoryview(bytearray(8)), repr=False, compare=False)

    def reply(self, data: bytes) -> None:
        """Give the guest ``data``: exactly ``size * count`` bytes, little-endian elements."""
        self.buffer[:] = data


@dataclass(slots=True)
class IoOut:
    """The guest writes ``data`` to ``port``: ``count`` elements of ``size`` bytes (more than one: string I/O)."""

    port: int
    size: int
    data: bytes
    count: int = 1


@dataclass(slots=True)
class MmioRead:
    """The guest reads ``size`` bytes (1 to 8) at ``phys_addr``, where there is no RAM: answer with `reply`."""

    phys_addr: int
    size: int
    buffer: memoryview = field(default=memoryview(bytearray(8)), repr=False, compare=False)

    def reply(self, data: bytes) -> None:
        """Give the guest ``data``: exactly ``size`` bytes."""
        self.buffer[:] = data


@dataclass(slots=True)
class MmioWrite:
    """The guest writes ``data`` (1 to 8 bytes) at ``phys_addr``, where there is no RAM, or RAM it may only read."""

    phys_addr: int
    data: bytes


@dataclass(slots=True)
class Hlt:
    """The guest halted and there is no in-kernel irqchip to wait in."""


@dataclass(slots=True)
class Shutdown:
    """A triple fault."""


@dataclass(slots=True)
class InternalError:
    """KVM gave up. Suberror 1 is an emulation failure: ``instruction`` then holds the bytes at RIP, if KVM told."""

    suberror: int
    data: tuple[int, ...]
    instruction: bytes = b""


@dataclass(slots=True)
class FailEntry:
    """The processor refused to enter the guest: the state it was given is invalid."""

    hardware_entry_failure_reason: int
    cpu: int


@dataclass(slots=True)
class Debug:
    """A breakpoint, watchpoint or single step that `Vcpu.set_guest_debug` asked for."""

    exception: int
    pc: int
    dr6: int
    dr7: int


@dataclass(slots=True)
class Hypercall:
    """A hypercall that KVM passes on (KVM_CAP_EXIT_HYPERCALL)."""

    nr: int
    args: tuple[int, ...]


@dataclass(slots=True)
class SystemEvent:
    """The guest asked the platform for a shutdown, a reset or a crash."""

    type: int
    data: tuple[int, ...]


@dataclass(slots=True)
class IoapicEoi:
    """End of a level-triggered interrupt, with a split irqchip."""

    vector: int


@dataclass(slots=True)
class Rdmsr:
    """The guest reads an MSR that KVM leaves to user space: answer with `Vcpu.reply_msr`."""

    index: int
    reason: int


@dataclass(slots=True)
class Wrmsr:
    """The guest writes an MSR that KVM leaves to user space: answer with `Vcpu.reply_msr`."""

    index: int
    data: int
    reason: int


@dataclass(slots=True)
class IrqWindowOpen:
    """The guest can take an interrupt now, and `Vcpu.request_interrupt_window` asked to hear of it."""


@dataclass(slots=True)
class Intr:
    """`Vcpu.kick` was called: no exit of the guest."""


@dataclass(slots=True)
class ExitPort:
    """A range with `Action.EXIT` was written: the guest ends its run with ``value``."""

    value: int


@dataclass(slots=True)
class BudgetSpent:
    """``max_exits`` exits were counted."""

    exits: int


@dataclass(slots=True)
class DeadlinePassed:
    """The time given to the run is over."""


@dataclass(slots=True)
class Unknown:
    """An exit reason that kvmpy has no type for."""

    exit_reason: int


Exit = (
    IoIn
    | IoOut
    | MmioRead
    | MmioWrite
    | Hlt
    | Shutdown
    | InternalError
    | FailEntry
    | Debug
    | Hypercall
    | SystemEvent
    | IoapicEoi
    | Rdmsr
    | Wrmsr
    | IrqWindowOpen
    | Intr
    | ExitPort
    | BudgetSpent
    | DeadlinePassed
    | Unknown
)

"""Why KVM_RUN came back: a closed set of types, made for ``match``.

The names are those of ``struct kvm_run``. An exit is complete only after KVM_RUN was entered again: until then the
instruction of an IoIn, IoOut, MmioRead or MmioWrite has not finished, and RIP may still point at it
(`Vcpu.complete`).

Source: KVM API §5, "The kvm_run structure".
"""

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


NO_BUFFER = memoryview(b"")


class _Exit:
    """What all exits have: fields by position for ``match``, equality, and a repr. Not a dataclass, because twenty of
    those cost 10 ms at each start."""

    __slots__: tuple[str, ...] = ()
    __match_args__: tuple[str, ...] = ()

    def __init_subclass__(cls) -> None:
        cls.__match_args__ = cls.__slots__  # type: ignore[misc]  # what dataclass does, too

    def _values(self) -> list[object]:
        return [getattr(self, name) for name in self.__slots__ if name != "buffer"]

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other._values() == self._values()

    def __hash__(self) -> int:
        return hash((type(self), *self._values()))

    def __repr__(self) -> str:
        shown = zip(self.__slots__, self._values(), strict=False)
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in shown)})"


class IoIn(_Exit):
    """The guest reads ``count`` times ``size`` bytes from ``port``: answer with `reply`."""

    __slots__ = ("port", "size", "count", "buffer")

    def __init__(self, port: int, size: int, count: int = 1, buffer: memoryview = NO_BUFFER) -> None:
        self.port = port
        self.size = size
        self.count = count
        self.buffer = buffer

    def reply(self, data: bytes) -> None:
        """Give the guest ``data``: exactly ``size * count`` bytes, little-endian elements."""
        if len(data) != len(self.buffer):
            raise ValueError(f"a reply of {len(data)} bytes: {len(self.buffer)} are wanted")
        self.buffer[:] = data


class IoOut(_Exit):
    """The guest writes ``data`` to ``port``: ``count`` elements of ``size`` bytes (more than one: string I/O)."""

    __slots__ = ("port", "size", "data", "count")

    def __init__(self, port: int, size: int, data: bytes, count: int = 1) -> None:
        self.port = port
        self.size = size
        self.data = data
        self.count = count


class MmioRead(_Exit):
    """The guest reads ``size`` bytes (1 to 8) at ``phys_addr``, where there is no RAM: answer with `reply`."""

    __slots__ = ("phys_addr", "size", "buffer")

    def __init__(self, phys_addr: int, size: int, buffer: memoryview = NO_BUFFER) -> None:
        self.phys_addr = phys_addr
        self.size = size
        self.buffer = buffer

    def reply(self, data: bytes) -> None:
        """Give the guest ``data``: exactly ``size`` bytes."""
        if len(data) != len(self.buffer):
            raise ValueError(f"a reply of {len(data)} bytes: {len(self.buffer)} are wanted")
        self.buffer[:] = data


class MmioWrite(_Exit):
    """The guest writes ``data`` (1 to 8 bytes) at ``phys_addr``, where there is no RAM, or RAM it may only read."""

    __slots__ = ("phys_addr", "data")

    def __init__(self, phys_addr: int, data: bytes) -> None:
        self.phys_addr = phys_addr
        self.data = data


class Hlt(_Exit):
    """The guest halted and there is no in-kernel irqchip to wait in."""

    __slots__ = ()


class Shutdown(_Exit):
    """A triple fault."""

    __slots__ = ()


class InternalError(_Exit):
    """KVM gave up. Suberror 1 is an emulation failure: ``instruction`` then holds the bytes at RIP, if KVM told."""

    __slots__ = ("suberror", "data", "instruction")

    def __init__(self, suberror: int, data: tuple[int, ...], instruction: bytes = b"") -> None:
        self.suberror = suberror
        self.data = data
        self.instruction = instruction


class FailEntry(_Exit):
    """The processor refused to enter the guest: the state it was given is invalid."""

    __slots__ = ("hardware_entry_failure_reason", "cpu")

    def __init__(self, hardware_entry_failure_reason: int, cpu: int) -> None:
        self.hardware_entry_failure_reason = hardware_entry_failure_reason
        self.cpu = cpu


class Debug(_Exit):
    """A breakpoint, watchpoint or single step that `Vcpu.set_guest_debug` asked for."""

    __slots__ = ("exception", "pc", "dr6", "dr7")

    def __init__(self, exception: int, pc: int, dr6: int, dr7: int) -> None:
        self.exception = exception
        self.pc = pc
        self.dr6 = dr6
        self.dr7 = dr7


class Hypercall(_Exit):
    """A hypercall that KVM passes on (KVM_CAP_EXIT_HYPERCALL)."""

    __slots__ = ("nr", "args")

    def __init__(self, nr: int, args: tuple[int, ...]) -> None:
        self.nr = nr
        self.args = args


class SystemEvent(_Exit):
    """The guest asked the platform for a shutdown, a reset or a crash."""

    __slots__ = ("type", "data")

    def __init__(self, type: int, data: tuple[int, ...]) -> None:
        self.type = type
        self.data = data


class IoapicEoi(_Exit):
    """End of a level-triggered interrupt, with a split irqchip."""

    __slots__ = ("vector",)

    def __init__(self, vector: int) -> None:
        self.vector = vector


class Rdmsr(_Exit):
    """The guest reads an MSR that KVM leaves to user space: answer with `Vcpu.reply_msr`."""

    __slots__ = ("index", "reason")

    def __init__(self, index: int, reason: int) -> None:
        self.index = index
        self.reason = reason


class Wrmsr(_Exit):
    """The guest writes an MSR that KVM leaves to user space: answer with `Vcpu.reply_msr`."""

    __slots__ = ("index", "data", "reason")

    def __init__(self, index: int, data: int, reason: int) -> None:
        self.index = index
        self.data = data
        self.reason = reason


class IrqWindowOpen(_Exit):
    """The guest can take an interrupt now, and `Vcpu.request_interrupt_window` asked to hear of it."""

    __slots__ = ()


class Intr(_Exit):
    """`Vcpu.kick` was called: no exit of the guest."""

    __slots__ = ()


class ExitPort(_Exit):
    """A range with `Action.EXIT` was written: the guest ends its run with ``value``."""

    __slots__ = ("value",)

    def __init__(self, value: int) -> None:
        self.value = value


class BudgetSpent(_Exit):
    """``max_exits`` exits were counted."""

    __slots__ = ("exits",)

    def __init__(self, exits: int) -> None:
        self.exits = exits


class DeadlinePassed(_Exit):
    """The time given to the run is over."""

    __slots__ = ()


class Unknown(_Exit):
    """An exit reason that kvmpy has no type for."""

    __slots__ = ("exit_reason",)

    def __init__(self, exit_reason: int) -> None:
        self.exit_reason = exit_reason


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

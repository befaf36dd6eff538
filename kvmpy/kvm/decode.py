"""From the run page to a typed exit: all but the hottest, one element written to a port, which is made in `Vcpu`.

Source: KVM API §5.
"""

from collections.abc import Callable
from struct import Struct
from typing import Any, NamedTuple

from kvmpy._shim import lib
from kvmpy.kvm import exits
from kvmpy.kvm.exits import Exit, ExitReason, IoIn, IoOut, MmioRead, MmioWrite

_U64 = Struct("=Q")
_ACCESS = Struct("=16xQQQQIIB").unpack_from  # struct kvmpy_exit from address to is_write
_IO, _MMIO = lib.KVM_EXIT_IO, lib.KVM_EXIT_MMIO


class ExitRecord(NamedTuple):
    """One exit as the post-mortem ring keeps it; ``data`` is what was written, or what C replied."""

    number: int
    rip: int
    address: int
    data: int
    reason: int
    elements: int
    size: int
    is_write: bool


def reason_name(reason: int) -> str:
    """Return the name of an exit reason: ``IO``, ``HLT``, or ``reason 99`` for one without a name."""
    try:
        return ExitReason(reason).name
    except ValueError:
        return f"reason {reason}"


def _internal_error(run: Any) -> exits.InternalError:
    data = tuple(run.internal.data[i] for i in range(min(run.internal.ndata, 16)))
    instruction = b""
    flag = lib.KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES
    emulation = run.internal.suberror == lib.KVM_INTERNAL_ERROR_EMULATION
    if emulation and len(data) > 2 and data[0] & flag:
        # KVM API §5: data[1] holds the size in its first byte, the instruction follows.
        raw = b"".join(_U64.pack(word) for word in data[1:3])
        instruction = raw[1 : 1 + min(raw[0], 15)]
    return exits.InternalError(run.internal.suberror, data, instruction)


def _words(values: Any, count: int) -> tuple[int, ...]:
    return tuple(values[i] for i in range(min(count, 16)))


_DECODERS: dict[int, Callable[[Any], Exit]] = {
    lib.KVM_EXIT_HLT: lambda run: exits.Hlt(),
    lib.KVM_EXIT_SHUTDOWN: lambda run: exits.Shutdown(),
    lib.KVM_EXIT_INTERNAL_ERROR: _internal_error,
    lib.KVM_EXIT_FAIL_ENTRY: lambda run: exits.FailEntry(
        run.fail_entry.hardware_entry_failure_reason, run.fail_entry.cpu
    ),
    lib.KVM_EXIT_DEBUG: lambda run: exits.Debug(
        run.debug.arch.exception, run.debug.arch.pc, run.debug.arch.dr6, run.debug.arch.dr7
    ),
    lib.KVM_EXIT_HYPERCALL: lambda run: exits.Hypercall(run.hypercall.nr, _words(run.hypercall.args, 6)),
    lib.KVM_EXIT_SYSTEM_EVENT: lambda run: exits.SystemEvent(
        run.system_event.type, _words(run.system_event.data, run.system_event.ndata)
    ),
    lib.KVM_EXIT_IOAPIC_EOI: lambda run: exits.IoapicEoi(run.eoi.vector),
    lib.KVM_EXIT_X86_RDMSR: lambda run: exits.Rdmsr(run.msr.index, run.msr.reason),
    lib.KVM_EXIT_X86_WRMSR: lambda run: exits.Wrmsr(run.msr.index, run.msr.data, run.msr.reason),
    lib.KVM_EXIT_IRQ_WINDOW_OPEN: lambda run: exits.IrqWindowOpen(),
}


def decode(exit: memoryview, page: memoryview, run: Any) -> Exit:
    """Return the exit that a ``struct kvmpy_exit`` and the run page tell; ``run`` is the page as a struct."""
    address, data, size, start, reason, count, is_write = _ACCESS(exit)
    if reason == _IO:
        buffer = page[start : start + size * count]
        if is_write:
            return IoOut(address, size, bytes(buffer), count)
        return IoIn(address, size, count, buffer)
    if reason == _MMIO:
        if is_write:
            return MmioWrite(address, data.to_bytes(size, "little"))
        return MmioRead(address, size, page[start : start + size])
    build = _DECODERS.get(reason)
    return build(run) if build else exits.Unknown(reason)

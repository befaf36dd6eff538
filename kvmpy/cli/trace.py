"""One line an exit, as ``--trace`` prints it: ``#12 vcpu0 rip 0x1004 IoOut port=0xe9 size=1 data=0x48 'H' debugcon``.

Names and fields are those of `kvmpy.kvm.exits`, and of the Exits lines in the headers of the lessons.
"""

from kvmpy.cli.output import Output
from kvmpy.kvm import (
    BudgetSpent,
    Exit,
    ExitRecord,
    InternalError,
    IoIn,
    IoOut,
    MmioRead,
    MmioWrite,
    SystemEvent,
    Vcpu,
)
from kvmpy.kvm.decode import reason_name
from kvmpy.machine.bus import Bus, Mode
from kvmpy.machine.machine import Machine
from kvmpy.pc import Pc

SHOWN = 16
"""Bytes of a string instruction that are shown."""


class Tracer:
    """Prints exits of ``pc`` as they were handled: each one, or those of devices in mode "trace" alone."""

    def __init__(self, pc: Pc, output: Output, *, all_exits: bool) -> None:
        self._pc = pc
        self._output = output
        self._all = all_exits

    def __call__(self, vcpu: Vcpu, exit: Exit) -> None:
        """Print a line for ``exit``; from the vCPU's thread."""
        bus = accessed(self._pc.machine, exit)
        owner = bus[0].find(bus[1], bus[2]) if bus else None
        if self._all or (owner is not None and owner.mode is Mode.TRACE):
            name = f" {owner.name}" if owner else " nobody" if bus else ""
            rip = vcpu.get_regs().rip
            line = f"#{vcpu.exits_total} vcpu{vcpu.vcpu_id} rip 0x{rip:x} {exit_text(exit)}{name}\n"
            self._output.write(line.encode())


def accessed(machine: Machine, exit: Exit) -> tuple[Bus, int, int] | None:
    """Return the bus, address and size of an access; None for an exit that is none."""
    match exit:
        case IoIn(port=address, size=size) | IoOut(port=address, size=size):
            return machine.pio, address, size
        case MmioRead(phys_addr=address, size=size):
            return machine.mmio, address, size
        case MmioWrite(phys_addr=address, data=data):
            return machine.mmio, address, len(data)
    return None


def exit_text(exit: Exit) -> str:
    """Return an exit as its name and fields; a read shows what it was answered."""
    match exit:
        case IoOut(port=port, size=size, count=count, data=data):
            return f"IoOut port=0x{port:x} size={size}{_data(data, size, count)}{_character(data)}"
        case IoIn(port=port, size=size, count=count, buffer=buffer):
            return f"IoIn port=0x{port:x} size={size}{_data(bytes(buffer), size, count)}"
        case MmioWrite(phys_addr=gpa, data=data):
            return f"MmioWrite gpa=0x{gpa:x} size={len(data)}{_data(data, len(data), 1)}"
        case MmioRead(phys_addr=gpa, size=size, buffer=buffer):
            return f"MmioRead gpa=0x{gpa:x} size={size}{_data(bytes(buffer), size, 1)}"
        case InternalError(suberror=suberror, instruction=code) if code:
            return f"InternalError suberror={suberror} instruction={code.hex(' ')}"
        case InternalError(suberror=suberror, data=words) | SystemEvent(type=suberror, data=words):
            kind = "suberror" if isinstance(exit, InternalError) else "type"
            return f"{type(exit).__name__} {kind}={suberror} data={','.join(f'0x{word:x}' for word in words)}"
        case BudgetSpent(exits=count):
            return f"BudgetSpent exits={count}"
    fields = [(name, getattr(exit, name)) for name in exit.__slots__]
    return " ".join([type(exit).__name__, *(f"{name}={_number(value)}" for name, value in fields)])


def _data(data: bytes, size: int, count: int) -> str:
    """Return the data of an access: a number, or the bytes with which a string instruction's begin."""
    if count == 1:
        return f" data=0x{int.from_bytes(data, 'little'):x}"
    shown, more = data[:SHOWN], " ..." if len(data) > SHOWN else ""
    text = f" {shown.decode()!r}" if size == 1 and shown.isascii() and shown.decode().isprintable() else ""
    return f" count={count} data={shown.hex(' ', size)}{text}{more}"


def _character(data: bytes) -> str:
    """Return what a console would make of one byte; nothing where that is no character."""
    return f" {chr(data[0])!r}" if len(data) == 1 and (0x20 <= data[0] < 0x7F or data in b"\t\n\r") else ""


def _number(value: object) -> str:
    return f"0x{value:x}" if isinstance(value, int) else str(value)


def record_line(record: ExitRecord) -> str:
    """Return one row of the post-mortem ring: what C kept of an exit."""
    reason = reason_name(record.reason)
    text = f"#{record.number} rip 0x{record.rip:x} {reason}"
    if reason not in ("IO", "MMIO"):
        return text
    direction, where = "write" if record.is_write else "read", "port" if reason == "IO" else "gpa"
    count = f" count={record.elements}" if record.elements > 1 else ""
    # Of a read that Python answered the ring does not know the reply.
    data = f" data=0x{record.data:x}" if record.is_write else ""
    return f"{text} {direction} {where}=0x{record.address:x} size={record.size}{count}{data}"

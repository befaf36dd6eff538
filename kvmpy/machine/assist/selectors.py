"""VERR, VERW, LAR and LSL: what the guest's descriptor tables say of a selector, without loading it.

A descriptor (code, data and system segments; in IA-32e mode system segments have 8 bytes more, which none of these
instructions looks at)::

     63       56 55 54 53 52 51   48 47 46 45 44 43   40 39       32 31                16 15            0
    +-----------+--+--+--+--+-------+--+-----+--+-------+-----------+--------------------+---------------+
    |base 31:24 |G |DB|L |AV| limit |P | DPL |S | type  |base 23:16 |     base 15:0      |  limit 15:0   |
    +-----------+--+--+--+--+-------+--+-----+--+-------+-----------+--------------------+---------------+

None of them asks whether the segment is present, and none faults because of a selector: ZF is the answer.

Floor: machine.

Source: Intel SDM vol. 2, LAR, LSL, VERR/VERW; vol. 3 §3.4.2 (selectors), §3.4.5 (descriptors), §5.10 (validation).
"""

from typing import NamedTuple, Self

from kvmpy._shim import lib
from kvmpy.machine import x86
from kvmpy.machine.assist.context import UD, Completion, Context, Fault
from kvmpy.machine.assist.instruction import Instruction, OpcodeMap

EFLAGS_ZF, EFLAGS_VM = 1 << 6, 1 << 17

# Selectors (Intel SDM vol. 3, figure 3-6)
RPL, TABLE_INDICATOR = 3, 4

# System segments that have a limit, and those with access rights; in IA-32e mode the 16-bit ones do not exist, nor
# task gates. A LDT has access rights there too: AMD APM vol. 3, LAR.
LSL_TYPES = {False: frozenset({1, 2, 3, 9, 11}), True: frozenset({2, 9, 11})}
LAR_TYPES = {False: frozenset({1, 2, 3, 4, 5, 9, 11, 12}), True: frozenset({2, 9, 11, 12})}

# What LAR gives of bytes 7:4: access byte, flags, and (undefined in the manual, given by processors) limit 19:16.
ACCESS_RIGHTS = 0x00FF_FF00


class Descriptor(NamedTuple):
    """One that a selector names."""

    low: int
    high: int

    @classmethod
    def load(cls, context: Context, selector: int) -> Self | None:
        """Return the descriptor of ``selector``, or None: the selector is null, or past the end of its table."""
        sregs = context.sregs
        if selector & TABLE_INDICATOR:
            base, limit = int(sregs.ldt.base), -1 if sregs.ldt.unusable else int(sregs.ldt.limit)
        else:
            base, limit = int(sregs.gdt.base), int(sregs.gdt.limit) if selector & ~RPL else -1
        offset = selector & ~(RPL | TABLE_INDICATOR)
        if offset + 7 > limit:
            return None
        data = context.read((base + offset) % (1 << 64), 8, system=True)
        return cls(int.from_bytes(data[:4], "little"), int.from_bytes(data[4:], "little"))

    @property
    def type(self) -> int:
        return self.high >> 8 & 0xF

    @property
    def is_system(self) -> bool:
        return not self.high & 1 << 12

    @property
    def is_code(self) -> bool:
        return not self.is_system and bool(self.type & 8)

    @property
    def is_conforming(self) -> bool:
        return self.is_code and bool(self.type & 4)

    @property
    def is_readable(self) -> bool:
        return not self.is_system and (not self.is_code or bool(self.type & 2))

    @property
    def is_writable(self) -> bool:
        return not self.is_system and not self.is_code and bool(self.type & 2)

    @property
    def limit(self) -> int:
        """The limit in bytes."""
        limit = self.low & 0xFFFF | self.high & 0xF_0000
        return limit << 12 | 0xFFF if self.high & 1 << 23 else limit

    def is_visible(self, context: Context, selector: int) -> bool:
        """Tell whether it may be used at this CPL with this RPL."""
        return self.is_conforming or max(context.cpl, selector & RPL) <= self.high >> 13 & 3


def find(instruction: Instruction) -> Completion | None:
    """Return what completes ``instruction``, or None: it is not one of these."""
    if instruction.map is not OpcodeMap.TWO_0F or instruction.vex:
        return None
    if instruction.opcode == 0x00:
        return {4: VERR, 5: VERW}.get(instruction.reg & 7)
    return {0x02: LAR, 0x03: LSL}.get(instruction.opcode)


def _load(context: Context) -> Descriptor | None:
    """Return the descriptor of the selector in the source operand, or None: it may not be used here."""
    if not context.sregs.cr0 & lib.X86_CR0_PE or context.rflags & EFLAGS_VM:
        raise Fault(UD)
    if context.instruction.memory is None:
        selector = context.registers[context.instruction.rm] & 0xFFFF
    else:
        selector = int.from_bytes(context.read_operand(2), "little")
    descriptor = Descriptor.load(context, selector)
    return descriptor if descriptor and descriptor.is_visible(context, selector) else None


def _verr(context: Context) -> None:
    descriptor = _load(context)
    _set_zf(context, descriptor is not None and descriptor.is_readable)


def _verw(context: Context) -> None:
    descriptor = _load(context)
    _set_zf(context, descriptor is not None and descriptor.is_writable)


def _lar(context: Context) -> None:
    descriptor = _usable(context, LAR_TYPES)
    _set_zf(context, descriptor is not None)
    if descriptor is not None:
        _set_register(context, descriptor.high & ACCESS_RIGHTS)


def _lsl(context: Context) -> None:
    descriptor = _usable(context, LSL_TYPES)
    _set_zf(context, descriptor is not None)
    if descriptor is not None:
        _set_register(context, descriptor.limit)


def _usable(context: Context, types: dict[bool, frozenset[int]]) -> Descriptor | None:
    """Return the descriptor, if it is visible and of a type that LAR or LSL takes."""
    descriptor = _load(context)
    if descriptor is None or not descriptor.is_system:
        return descriptor
    return descriptor if descriptor.type in types[bool(context.sregs.efer & x86.EFER_LMA)] else None


def _set_zf(context: Context, value: bool) -> None:
    context.rflags = context.rflags & ~EFLAGS_ZF | (EFLAGS_ZF if value else 0)


def _set_register(context: Context, value: int) -> None:
    """Set the destination: 16 bits leave the others as they are, 32 bits clear the upper half."""
    reg = context.instruction.reg
    if context.instruction.operand16:
        value = context.registers[reg] & ~0xFFFF | value & 0xFFFF
    context.registers[reg] = value


VERR, VERW = Completion("verr", _verr), Completion("verw", _verw)
LAR, LSL = Completion("lar", _lar), Completion("lsl", _lsl)

"""The guest's FPU, SSE and AVX state around one instruction: the faults before it, the state in and out, and #XM.

The state travels as XSAVE has it, in the standard format::

    0    x87 control word   2 status word   4 tags   6 opcode   8 instruction pointer   16 data pointer
    24   MXCSR              28 MXCSR_MASK
    32   ST0..ST7, 16 bytes each            160 XMM0..XMM15                    416 not used
    512  XSTATE_BV: which components are not in their initial state            576 the other components

SIMD exceptions. The host runs the instruction with all of them masked, and with clear flags: what it raised stands in
MXCSR afterwards, and is compared with the guest's masks. Masked underflow is raised by an inexact tiny result only,
unmasked underflow by an exact one too: for that there is a run before, with flush-to-zero, under which every tiny
result raises it. One thing is not exact, the flags beside an unmasked exception: of an overflow or underflow they are
those of the masked one, so PE may be set where the processor would not have set it; DPPS and DPPD, which are several
operations, tell those of all of them. The vector and the destination are right.

x87 exceptions need no such thing: an unmasked one is raised by the next waiting instruction, which is checked here
before it runs.

Source: Intel SDM vol. 1 §8.1.8 (pointers), §8.6 and §8.7 (#MF), §10.2.3 (MXCSR), §11.5 (SIMD exceptions), §13.4.1
(XSAVE area); vol. 3 §2.5 (control registers).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from kvmpy._shim import ffi, lib
from kvmpy.machine.assist.context import MF, NM, UD, XM, Context, Fault, Refused
from kvmpy.machine.assist.decode import effective_address
from kvmpy.machine.assist.rows import Row

AREA_SIZE = 4096
COMPONENTS = 0xE7
"""x87, SSE, AVX and the three of AVX-512: those that an instruction of ours could change."""

MXCSR, MXCSR_MASK = 24, 28
_FCW, _FSW, _FOP, _FIP, _FDP, _XSTATE_BV = 0, 2, 6, 8, 16, 512
_FLAGS, _BEFORE_COMPUTING = 0x3F, 0x07  # IE DE ZE OE UE PE; IE DE ZE
MXCSR_INITIAL = _MASKS = 0x1F80
_UE, _MASK_UE, _FTZ = 1 << 4, 1 << 11, 1 << 15
_SSE = 1 << 1

CR4_OSXSAVE = 1 << 18
XCR0_AVX = 6

NOT_WAITING = frozenset(("fnclex", "fninit", "fnsave", "fnstcw", "fnstenv", "fnstsw"))
"""x87 instructions that do not look for a pending exception (Intel SDM vol. 1 §8.3.12)."""


class Used(NamedTuple):
    """What the host has executed: where the code was, and where its memory operand."""

    code: bytes
    address: int
    operand: int


class State:
    """The guest's FPU state, on its way to the host's processor and back. Made by `load`."""

    def __init__(self, context: Context, row: Row) -> None:
        self._context, self._row = context, row
        self._xsave = context.vcpu.get_state("XSAVE")
        self._before = bytes(ffi.buffer(self._xsave))[:AREA_SIZE]
        self.area = bytearray(self._before)

    def field(self, offset: int, size: int) -> int:
        """Return one field of the area."""
        return int.from_bytes(self.area[offset : offset + size], "little")

    def set_field(self, offset: int, size: int, value: int) -> None:
        """Change one field of the area."""
        self.area[offset : offset + size] = value.to_bytes(size, "little")

    @property
    def mxcsr(self) -> int:
        """The guest's MXCSR."""
        return self.field(MXCSR, 4)

    @mxcsr.setter
    def mxcsr(self, value: int) -> None:
        self.set_field(MXCSR, 4, value)
        # The kernel takes MXCSR with the SSE component.
        self.set_field(_XSTATE_BV, 8, self.field(_XSTATE_BV, 8) | _SSE)

    @property
    def pending(self) -> bool:
        """An unmasked x87 exception waits for the next waiting instruction. FSW.ES follows from the flags."""
        return bool(self.field(_FSW, 2) & ~self.field(_FCW, 2) & _FLAGS)

    def choose_base(self, registers: Sequence[int]) -> int:
        """Return which of ``registers`` may address the operand: with it, FOP tells whether the instruction set FOP."""
        opcode, reg = self._context.instruction.opcode, self._context.instruction.reg & 7
        taken = (0, self.field(_FOP, 2)) if self._row.x87 else ()
        return next(register for register in registers if _fop(opcode, reg << 3 | register & 7) not in taken)

    @property
    def unmasked_underflow(self) -> bool:
        """The guest asks for underflow exceptions, and the instruction may raise one."""
        return self._row.vector and not self.mxcsr & _MASK_UE

    def prepare(self, *, flush_to_zero: bool = False) -> bytearray:
        """Return the area as the host shall load it. Unmasked underflow overrides the guest's own flush-to-zero."""
        given = bytearray(self.area)
        if self._row.vector:
            mxcsr = self.mxcsr & ~_FLAGS | _MASKS
            if self.unmasked_underflow:
                mxcsr = mxcsr | _FTZ if flush_to_zero else mxcsr & ~_FTZ
            given[MXCSR : MXCSR + 4] = mxcsr.to_bytes(4, "little")
        return given

    def finish(self, area: memoryview, used: Used, *, underflow: int) -> None:
        """Take the area that the host has left, from an instruction like this one with other operands: ``used``.

        Raises:
            Fault: #XM, or #UD where the guest's system knows none. Then the flags in MXCSR are all that changes.
        """
        mxcsr = self.mxcsr
        old, self.area = self.area, bytearray(area)
        if self._row.vector:
            raised = self.mxcsr & _FLAGS | underflow
            unmasked = raised & ~(mxcsr >> 7)
            if unmasked:
                self.area = old
                self.mxcsr = mxcsr | (raised & _BEFORE_COMPUTING if unmasked & _BEFORE_COMPUTING else raised)
                self.store()
                raise Fault(XM if self._context.sregs.cr4 & lib.X86_CR4_OSXMMEXCPT else UD)
            self.mxcsr = mxcsr | raised
        if self._row.x87:
            self._own_pointers(used)

    def _own_pointers(self, used: Used) -> None:
        """Put the guest's pointers where the host's processor has noted those of what it has executed."""
        context, instruction = self._context, self._context.instruction
        if self.field(_FIP, 8) == used.address:
            self.set_field(_FIP, 8, int(context.regs.rip))
        if instruction.memory is None:
            return
        if self.field(_FOP, 2) == _fop(*used.code[-2:]):
            self.set_field(_FOP, 2, _fop(instruction.opcode, instruction.modrm or 0))
        if self.field(_FDP, 8) == used.operand:
            self.set_field(_FDP, 8, effective_address(instruction, context.registers, context.next_rip))

    def store(self) -> None:
        """Give the area to the vCPU."""
        if self.area != self._before:
            ffi.buffer(self._xsave)[:AREA_SIZE] = self.area
            self._context.vcpu.set_state("XSAVE", self._xsave)


def _fop(opcode: int, modrm: int) -> int:
    """Return what the FPU notes of an opcode (Intel SDM vol. 1 §8.1.9)."""
    return (opcode & 7) << 8 | modrm


def underflow_in(area: memoryview) -> int:
    """Return the flag UE of MXCSR in ``area``."""
    return area[MXCSR] & _UE


def load(context: Context, row: Row) -> State | None:
    """Return the FPU state, or None when the instruction of ``row`` uses none.

    Raises:
        Fault: #UD, #NM or #MF: it may not be used now.
        Refused: #MF would go through an external interrupt (CR0.NE is clear).
    """
    if not (row.vector or row.mmx or row.x87):
        return None
    cr0, cr4 = context.sregs.cr0, context.sregs.cr4
    if row.vex:
        if not cr4 & CR4_OSXSAVE or _xcr0(context) & XCR0_AVX != XCR0_AVX:
            raise Fault(UD)
    elif not row.x87 and (cr0 & lib.X86_CR0_EM or (row.vector and not cr4 & lib.X86_CR4_OSFXSR)):
        raise Fault(UD)
    if cr0 & lib.X86_CR0_TS or (row.x87 and cr0 & lib.X86_CR0_EM):
        raise Fault(NM)
    state = State(context, row)
    if (row.x87 or row.mmx) and row.name not in NOT_WAITING and state.pending:
        raise_pending(context)
    return state


def raise_pending(context: Context) -> None:
    """Raise #MF."""
    if not context.sregs.cr0 & lib.X86_CR0_NE:
        raise Refused("an x87 exception, which CR0.NE says to report by an external interrupt")
    raise Fault(MF)


def _xcr0(context: Context) -> int:
    state: Any = context.vcpu.get_state("XCRS")
    return next((int(row.value) for row in state.xcrs[0 : state.nr_xcrs] if row.xcr == 0), 1)

"""The host's processor executes an instruction for the guest: with its registers, flags and FPU state, on a copy of
its memory operand.

::

    guest                                   host
    pshufb 8(%rax,%rcx), %xmm3     ->       pshufb (%rdi), %xmm3; ret       in a page of code of our own
    16 bytes at 8(%rax,%rcx)       <->      the bounce buffer, to which %rdi points
    general registers, flags       <->      struct kvmpy_native
    KVM_GET_XSAVE, KVM_SET_XSAVE   <->      the XSAVE area

Nothing is executed but what a row of `rows` describes, re-encoded by `decode.relocate`, after every check that it
could fail: this is user mode, where a fault would end the process. Two registers that the instruction does not name
hold the address of its operand and the guest's rsp.

Floor: machine.

Source: Intel SDM vol. 1 §3.4.3.1 (status flags), vol. 3 §6.15 (#AC).
"""

import mmap
import os
import threading
from functools import cache, partial
from typing import Any

from kvmpy._shim import ffi, lib
from kvmpy.machine.assist import fpu
from kvmpy.machine.assist.context import AC, GP, UD, Completion, Context, Fault, Refused
from kvmpy.machine.assist.decode import Instruction, relocate, scratch_registers
from kvmpy.machine.assist.rows import Row, Table, find_row
from kvmpy.units import PAGE_SIZE

NOP, RET = b"\x90", b"\xc3"
RSP = 4
STATUS_FLAGS = 0x8D5  # OF SF ZF AF PF CF
EFLAGS_AC = CR0_AM = 1 << 18
LONGEST = 16
"""Bytes of an instruction and RET."""
BOUNCE_SIZE = 128
"""Of the longest memory operand, FNSAVE's 108 bytes."""

_threads = threading.local()


class Executor:
    """A thread's page of code, its XSAVE area and its bounce buffer. `executor` gives the thread's own.

    Raises:
        Refused: the host gives no executable memory.
    """

    def __init__(self) -> None:
        try:
            with open(os.memfd_create("kvmpy-native", os.MFD_CLOEXEC), "w+b", buffering=0) as file:
                file.truncate(PAGE_SIZE)
                # Mapped twice: what is written to one address is executed at another, and neither allows both.
                self._code = mmap.mmap(file.fileno(), PAGE_SIZE)
                executable = mmap.mmap(file.fileno(), PAGE_SIZE, prot=mmap.PROT_READ | mmap.PROT_EXEC)
        except OSError as error:
            raise Refused(f"the host gives no executable memory: {error}") from None
        pages = mmap.mmap(-1, 2 * PAGE_SIZE)
        self.area = memoryview(pages)[: fpu.AREA_SIZE]
        """The XSAVE area that `execute` loads and leaves, with ``use_fpu``."""
        self.bounce = memoryview(pages)[PAGE_SIZE : PAGE_SIZE + BOUNCE_SIZE]
        """Where the instruction finds its memory operand; aligned."""
        self._held = ffi.from_buffer(executable), ffi.from_buffer(pages)
        self._native: Any = ffi.new("struct kvmpy_native *", {"mask": fpu.COMPONENTS})
        self._places: dict[bytes, int] = {}
        self.code_address = self._first_code = int(ffi.cast("uintptr_t", self._held[0]))
        """Where the last instruction was executed."""
        self.bounce_address = int(ffi.cast("uintptr_t", self._held[1])) + PAGE_SIZE

    def execute(self, code: bytes, registers: list[int], rflags: int, *, use_fpu: bool = False) -> int:
        """Execute the instruction ``code``, change ``registers`` (but rsp), and return the status flags that it left.

        The caller answers for it: no fault, no stack, no memory but what its registers are known to point at.

        Raises:
            Refused: the host's processor has no XSAVE, so it cannot take the guest's FPU state.
        """
        if use_fpu and "xsave" not in host_features():
            raise Refused("the host's processor has no XSAVE")
        native = self._native
        at = self._places.get(code)
        native.is_new = at is None
        if at is None:
            at = self._write(code)
        native.code = self._held[0] + at
        self.code_address = self._first_code + at
        native.registers, native.rflags = registers, rflags & STATUS_FLAGS
        native.xsave = self._held[1] if use_fpu else ffi.NULL
        lib.kvmpy_native(native)
        registers[:] = native.registers
        return int(native.rflags) & STATUS_FLAGS

    def _write(self, code: bytes) -> int:
        """Put ``code`` where none is, or into an empty page when it is full; return where."""
        if len(self._places) == PAGE_SIZE // LONGEST:
            self._places.clear()
        at = self._places[code] = len(self._places) * LONGEST
        self._code[at : at + len(code) + 1] = code + RET
        return at


def executor() -> Executor:
    """Return this thread's executor. Raises Refused."""
    if not hasattr(_threads, "executor"):
        _threads.executor = Executor()
    own: Executor = _threads.executor
    return own


@cache
def host_features() -> frozenset[str]:
    """Return what the host's processor has and its kernel lets programs use, in the words of /proc/cpuinfo."""
    with open("/proc/cpuinfo") as file:
        flags = next((line for line in file if line.startswith("flags")), "")
    return frozenset(flags.partition(":")[2].split())


@cache
def mxcsr_mask() -> int:
    """Return the bits that MXCSR has on this host. The field in the guest's state may be anything."""
    host = executor()
    host.area[:] = bytes(fpu.AREA_SIZE)
    host.area[fpu.MXCSR : fpu.MXCSR + 4] = fpu.MXCSR_INITIAL.to_bytes(4, "little")
    host.execute(NOP, [0] * 16, 0, use_fpu=True)
    return int.from_bytes(host.area[fpu.MXCSR_MASK : fpu.MXCSR_MASK + 4], "little") or 0xFFBF


def find_native(table: Table, instruction: Instruction) -> Completion | None:
    """Return the completion of an instruction that has a row in ``table``."""
    row = find_row(table, instruction)
    return Completion(row.name, partial(run_natively, row)) if row else None


def require(context: Context, row: Row) -> None:
    """Check that the processor has this form of the instruction, and the host the instruction.

    Raises:
        Fault: #UD: it has not.
        Refused: not 64-bit code.
    """
    if context.bits != 64:
        raise Refused(f"{row.name} outside 64-bit code")
    feature = row.feature_of(context.instruction)
    if not row.allows(context.instruction) or (feature != "*" and feature not in host_features()):
        raise Fault(UD)


def run_natively(row: Row, context: Context) -> None:
    """Execute the instruction on the host's processor, on a copy of its memory operand.

    Raises:
        Fault: what the processor would raise; the exception flags in MXCSR are all that may have changed then.
        Refused: not 64-bit code, or the memory operand is not RAM.
    """
    require(context, row)
    state = fpu.load(context, row)
    places = find_operand(context, row)
    bounce = executor().bounce
    at = 0
    for gpa, length in places:
        bounce[at : at + length] = context.memory.read(gpa, length)
        at += length
    registers, rflags = _execute(context, executor().bounce_address, state)
    at = 0
    for gpa, length in places if row.writes_memory else ():
        context.memory.write(gpa, bounce[at : at + length])
        at += length
    if state:
        state.store()
    context.registers[:], context.rflags = registers, rflags


def run_in_place(row: Row, context: Context) -> None:
    """Execute the instruction, which uses no FPU, on its memory operand in guest RAM itself: an atomic access.

    Raises as `run_natively`.
    """
    require(context, row)
    find_operand(context, row)
    address = context.operand_hva(row.size(context.instruction))
    context.registers[:], context.rflags = _execute(context, address, None)


def find_operand(context: Context, row: Row) -> list[tuple[int, int]]:
    """Return where the memory operand is, page by page, as (gpa, bytes); nothing when there is none.

    Raises:
        Fault: it may not be accessed as the instruction does, or is not aligned as it demands.
        Refused: it is not RAM.
    """
    instruction = context.instruction
    if instruction.memory is None:
        return []
    size = row.size(instruction)
    linear = context.operand_address(size)
    if linear % row.alignment(instruction):
        raise Fault(GP, 0)
    checked = context.cpl == 3 and context.sregs.cr0 & CR0_AM and context.rflags & EFLAGS_AC
    if checked and size in (2, 4, 8) and linear % size:
        raise Fault(AC, 0)
    return context.translate(linear, size, write=row.writes_memory)


def _execute(context: Context, operand: int, state: fpu.State | None) -> tuple[list[int], int]:
    """Execute it with its memory operand at the host's address ``operand``; return registers and flags after it."""
    instruction, host = context.instruction, executor()
    stand_in, *free = scratch_registers(instruction, 4)
    base = state.choose_base(free) if state else free[0]
    try:
        code = relocate(instruction, base=base, rsp=stand_in)
    except ValueError as error:
        raise Refused(str(error)) from None
    registers = list(context.registers)
    registers[base], registers[stand_in] = operand, registers[RSP]
    underflow = 0
    if state and state.unmasked_underflow:
        host.area[:] = state.prepare(flush_to_zero=True)
        host.execute(code, list(registers), context.rflags, use_fpu=True)
        underflow = fpu.underflow_in(host.area)
    if state:
        host.area[:] = state.prepare()
    flags = host.execute(code, registers, context.rflags, use_fpu=state is not None)
    if state:
        state.finish(host.area, fpu.Used(code, host.code_address, operand), underflow=underflow)
    registers[RSP] = registers[stand_in]
    registers[base], registers[stand_in] = context.registers[base], context.registers[stand_in]
    return registers, context.rflags & ~STATUS_FLAGS | flags

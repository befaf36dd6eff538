"""One instruction that KVM could not emulate, and the vCPU as it stands before it: what a completion reads and changes.

Nothing here reaches the guest before the completion has ended well, but memory that it wrote: the registers are copies,
and `Assist` writes them back. A completion that raises `Fault` has changed nothing.

Guest memory is reached as the processor would: segment, canonical address, page tables with their rights. What is
no RAM (a device's registers) is refused: no kernel uses such instructions there.

Floor: machine.
"""

from collections.abc import Callable
from typing import NamedTuple

from kvmpy._shim import lib
from kvmpy.errors import GuestMemoryError
from kvmpy.kvm import Vcpu
from kvmpy.kvm.state import Regs, Sregs
from kvmpy.machine import paging, x86
from kvmpy.machine.assist.decode import Instruction, effective_address
from kvmpy.machine.memory import GuestMemory
from kvmpy.units import PAGE_SIZE

# Vectors (Intel SDM vol. 3, table 6-1)
DB, BP, UD, NM, NP, SS, GP, PF, MF, AC, XM = 1, 3, 6, 7, 11, 12, 13, 14, 16, 17, 19

REGISTERS = (
    *("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi"),
    *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"),
)
"""The general registers in the order of their numbers (Intel SDM vol. 2, table 2-2)."""

CR4_LA57 = 1 << 12
MAX_PHYS_ADDR = 52
"""Of any processor so far: bits of a physical address (CPUID 0x80000008)."""


class Fault(Exception):
    """The exception that the instruction raises in the guest. ``address`` is CR2 of a page fault."""

    def __init__(self, vector: int, error_code: int | None = None, address: int | None = None) -> None:
        super().__init__(vector, error_code, address)
        self.vector, self.error_code, self.address = vector, error_code, address


class Refused(Exception):
    """The instruction cannot be completed here: the run ends, and says why."""


class Context:
    """The instruction and the vCPU. To be used from the vCPU's thread.

    ``registers`` are the general registers by number, ``rflags`` the flags; changed, they are written back.
    ``rip`` is where the guest goes on: None is behind the instruction.
    """

    def __init__(
        self, vcpu: Vcpu, memory: GuestMemory, regs: Regs, sregs: Sregs, *, max_phys_addr: int = MAX_PHYS_ADDR
    ) -> None:
        self.vcpu, self.memory, self.regs, self.sregs = vcpu, memory, regs, sregs
        self.registers = [int(getattr(regs, name)) for name in REGISTERS]
        self.rflags = int(regs.rflags)
        self.rip: int | None = None
        self._max_phys_addr = max_phys_addr
        self.instruction: Instruction

    @property
    def cpl(self) -> int:
        """The privilege level: SS.DPL, also in real mode (Intel SDM vol. 3 §5.5, and KVM)."""
        return int(self.sregs.ss.dpl)

    @property
    def bits(self) -> int:
        """Of which size the code is: 64, 32 or 16."""
        if self.sregs.efer & x86.EFER_LMA and self.sregs.cs.l:
            return 64
        return 32 if self.sregs.cs.db else 16

    @property
    def next_rip(self) -> int:
        """The address behind the instruction."""
        return (int(self.regs.rip) + len(self.instruction.raw)) & _mask(self.bits)

    # --- memory -------------------------------------------------------------------------------------------------

    @property
    def paging(self) -> paging.Paging:
        """What address translation depends on."""
        return paging_of(self.sregs, self.rflags, self._max_phys_addr)

    def operand_address(self, size: int) -> int:
        """Return the linear address of the memory operand of ``size`` bytes.

        Raises:
            Fault: #GP(0), or #SS(0) through the stack segment: an address is not canonical.
            Refused: not 64-bit code, or there is no memory operand.
        """
        operand = self.instruction.memory
        if operand is None or self.bits != 64:
            raise Refused("no memory operand of 64-bit code")
        offset = effective_address(self.instruction, self.registers, self.next_rip)
        base = int(getattr(self.sregs, operand.segment).base) if operand.segment in ("fs", "gs") else 0
        linear = (offset + base) & _mask(64)
        for address in (linear, (linear + size - 1) & _mask(64)):
            if not self.is_canonical(address):
                raise Fault(SS if operand.segment == "ss" else GP, 0)
        return linear

    def is_canonical(self, linear: int) -> bool:
        """Tell whether the upper bits of ``linear`` are all one bit (Intel SDM vol. 1 §3.3.7.1)."""
        top = linear >> (56 if self.sregs.cr4 & CR4_LA57 else 47)
        return top in (0, (1 << 64 - (56 if self.sregs.cr4 & CR4_LA57 else 47)) - 1)

    def translate(
        self, linear: int, size: int, *, write: bool = False, fetch: bool = False, system: bool = False
    ) -> list[tuple[int, int]]:
        """Return where [linear, linear+size) is, page by page, as (gpa, bytes). ``system``: as CPL 0 (tables).

        Raises:
            Fault: #PF, with nothing changed but the accessed and dirty bits of pages that may be accessed.
            Refused: some byte is not RAM.
        """
        places, user, tables = [], self.cpl == 3 and not system, self.paging
        if system and self.cpl == 3:  # SMAP asks AC of explicit accesses alone (Intel SDM vol. 3 §4.6)
            tables = tables._replace(rflags=tables.rflags & ~lib.X86_EFLAGS_AC)
        while size:
            length = min(size, PAGE_SIZE - linear % PAGE_SIZE)
            try:
                gpa = paging.translate(self.memory, tables, linear, write=write, fetch=fetch, user=user)
            except paging.PageFault as fault:
                raise Fault(PF, fault.error_code, fault.address) from None
            except (GuestMemoryError, paging.PageUnsupported) as error:
                raise Refused(str(error)) from None
            if not self.memory.contains(gpa, length):
                raise Refused(f"its {'code' if fetch else 'operand'} at gpa 0x{gpa:x} is not RAM")
            places.append((gpa, length))
            linear, size = (linear + length) & _mask(64), size - length
        return places

    def read(self, linear: int, size: int, *, system: bool = False) -> bytes:
        """Copy ``size`` bytes at ``linear``. Raises as `translate`."""
        return b"".join(self.memory.read(gpa, length) for gpa, length in self.translate(linear, size, system=system))

    def fetch(self, offset: int, size: int) -> bytes:
        """Copy ``size`` bytes of code, ``offset`` behind where the instruction begins.

        Raises:
            Fault: #GP(0): the address is not canonical. Else as `translate`.
        """
        linear = (int(self.regs.rip) + offset) & _mask(self.bits)
        if self.bits != 64:
            linear = (linear + int(self.sregs.cs.base)) & _mask(32)
        elif not self.is_canonical(linear):
            raise Fault(GP, 0)
        return b"".join(self.memory.read(gpa, length) for gpa, length in self.translate(linear, size, fetch=True))

    def write(self, linear: int, data: bytes) -> None:
        """Write ``data`` to ``linear``: all of it, or nothing. Raises as `translate`."""
        at = 0
        for gpa, length in self.translate(linear, len(data), write=True):
            self.memory.write(gpa, data[at : at + length])
            at += length

    def read_operand(self, size: int) -> bytes:
        """Copy the memory operand. Raises as `operand_address` and `translate`."""
        return self.read(self.operand_address(size), size)

    def write_operand(self, data: bytes) -> None:
        """Write the memory operand. Raises as `operand_address` and `translate`."""
        self.write(self.operand_address(len(data)), data)

    def operand_hva(self, size: int) -> int:
        """Return where the host has the memory operand, for writing: for an atomic access within one page.

        Raises:
            Refused: it crosses a page. Else as `operand_address` and `translate`.
        """
        places = self.translate(self.operand_address(size), size, write=True)
        if len(places) > 1:
            raise Refused("an atomic operand that crosses a page")
        region = self.memory.region_at(*places[0])
        return region.hva + places[0][0] - region.gpa


class Completion(NamedTuple):
    """How an instruction is completed: its name, as the manuals have it, in small letters, and what does it."""

    name: str
    run: Callable[[Context], None]


def without_lock(completion: Completion | None, instruction: Instruction) -> Completion | None:
    """Return ``completion``; where ``instruction`` has a LOCK prefix, one that raises #UD."""
    if completion is None or not instruction.lock:
        return completion
    return Completion(completion.name, _undefined)


def _undefined(context: Context) -> None:
    raise Fault(UD)


def paging_of(sregs: Sregs, rflags: int, max_phys_addr: int) -> paging.Paging:
    """Return what address translation depends on, from a vCPU's registers."""
    return paging.Paging(int(sregs.cr0), int(sregs.cr3), int(sregs.cr4), int(sregs.efer), rflags, max_phys_addr)


def _mask(bits: int) -> int:
    return (1 << bits) - 1

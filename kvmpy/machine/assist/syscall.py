"""SYSCALL of a user program, on hosts where it goes to the kernel's entry but stays at CPL 3.

There the processor has loaded RCX, R11 and RIP, but CS and SS are still the user's, so that the fetch at the kernel's
entry is a page fault: the handler of vector 14 is entered with RIP = CR2 = IA32_LSTAR and CS of CPL 3.
A breakpoint on that handler brings us the exit Debug, and this is what becomes of it::

    the frame says so, and before RCX stands 0f 05   ->  finish SYSCALL: CS, SS, RIP, RSP, RFLAGS
    any other page fault                             ->  step over the handler's first instruction

The second, because a breakpoint would stop at the same instruction again (KVM's emulator does not honour RF). A jump
to the entry is no system call: it stays the page fault that it is. It could forge RCX, but not R11, which the kernel
takes for RFLAGS: that must fit RFLAGS, and no program can mask its own as SYSCALL does, the interrupt flag for one.

Where the handler is says the IDT at the moment when the guest writes one of the MSRs of SYSCALL: those writes come to
user space until it is known that the host needs none of this. Not seen is a handler that the guest changes later,
unless it writes one of those MSRs again.

csrc/assist.c does the same, for the few first instructions that kernels have there.

Source: Intel SDM vol. 2, SYSCALL; vol. 3 §6.14 (frame), §4.7 (error code). Floor: machine.
"""

import struct

from kvmpy._shim import lib
from kvmpy.kvm import Debug, Vcpu
from kvmpy.kvm.state import Segment
from kvmpy.machine.assist.context import MAX_PHYS_ADDR, PF, Context, Fault, Refused
from kvmpy.machine.guest_debug import ASSIST_SLOT, GuestDebug
from kvmpy.machine.memory import GuestMemory

# MSRs (Intel SDM vol. 4, table 2-2), by the name of the field in struct kvmpy_assist
MSRS = {0xC000_0081: "star", 0xC000_0082: "lstar", 0xC000_0084: "fmask"}

GATE_SIZE = 16
_GATE = struct.Struct("<HHHHI4x")
GATE_PRESENT = 1 << 15
_FRAME = struct.Struct("<6Q")
"""Error code, RIP, CS, RFLAGS, RSP, SS."""

AT_CPL3 = 0x4
MAY_BE_SET = 0x11
"""Present; and fetch, which the processor tells only where NX or SMEP is on."""
SYSCALL = b"\x0f\x05"


class SyscallAssist:
    """One vCPU's; what it finds out stands in the vCPU's ``struct kvmpy_assist``, for C too."""

    def __init__(self, vcpu: Vcpu, memory: GuestMemory, debug: GuestDebug, max_phys_addr: int = MAX_PHYS_ADDR) -> None:
        self._vcpu, self._memory, self._state = vcpu, memory, vcpu.assist
        self.debug, self._max_phys_addr = debug, max_phys_addr

    def written(self, index: int, data: int) -> None:
        """Take note of one of MSRS that the guest has written, and put the breakpoint where the IDT says."""
        setattr(self._state, MSRS[index], data)
        handler = self._page_fault_handler()
        self.debug.set_breakpoint(ASSIST_SLOT, handler)
        self._state.page_fault_handler = handler or 0

    def _page_fault_handler(self) -> int | None:
        sregs = self._vcpu.get_sregs()
        idt = sregs.idt
        if idt.limit < (PF + 1) * GATE_SIZE - 1:
            return None
        try:
            gate = self._context().read(int(idt.base) + PF * GATE_SIZE, GATE_SIZE, system=True)
        except (Fault, Refused):
            return None
        low, _, flags, middle, high = _GATE.unpack(gate)
        return high << 32 | middle << 16 | low if flags & GATE_PRESENT else None

    def _context(self) -> Context:
        regs, sregs = self._vcpu.get_regs(), self._vcpu.get_sregs()
        return Context(self._vcpu, self._memory, regs, sregs, max_phys_addr=self._max_phys_addr)

    def complete(self, exit: Debug) -> str | None:
        """Do what the exit asks for; return what it was, or None: it is not ours."""
        if not self._state.page_fault_handler or exit.pc != self._state.page_fault_handler:
            return None
        context = self._context()
        try:
            frame = _FRAME.unpack(context.read(context.registers[RSP], _FRAME.size, system=True))
        except (Fault, Refused):
            return None
        if not self._is_syscall(context, frame):
            # One instruction, with the breakpoint out of force.
            self.debug.step(True)
            return "page fault"
        self._enter_kernel(context, frame)
        return "syscall"

    def _is_syscall(self, context: Context, frame: tuple[int, ...]) -> bool:
        error_code, rip, cs, rflags = frame[:4]
        entry = int(self._state.lstar)
        if error_code & ~MAY_BE_SET != AT_CPL3 or cs & 3 != 3 or rip != entry or context.sregs.cr2 != entry:
            return False
        if rflags & ~lib.X86_EFLAGS_RF != context.registers[R11] & ~(int(self._state.fmask) | lib.X86_EFLAGS_RF):
            return False  # SYSCALL leaves in R11 the flags, and in RFLAGS those that are not masked
        # The handler runs at CPL 0, and SMAP would not let it read there.
        context.rflags |= lib.X86_EFLAGS_AC
        try:
            before = (context.registers[RCX] - len(SYSCALL)) % (1 << 64)
            return context.read(before, len(SYSCALL), system=True) == SYSCALL
        except (Fault, Refused):
            return False

    def _enter_kernel(self, context: Context, frame: tuple[int, ...]) -> None:
        sregs, regs, state = context.sregs, context.regs, self._state
        selector = int(state.star) >> 32 & 0xFFFC
        _set_flat(sregs.cs, selector, CODE, long=True)
        _set_flat(sregs.ss, selector + 8, DATA, long=False)
        self._vcpu.set_sregs(sregs)
        regs.rip, regs.rsp = state.lstar, frame[4]
        regs.rflags = frame[3] & ~(int(state.fmask) | lib.X86_EFLAGS_RF)
        self._vcpu.set_regs(regs)


RCX, RSP, R11 = 1, 4, 11
CODE, DATA = 11, 3  # read, execute, accessed; read, write, accessed (Intel SDM vol. 3, table 3-1)


def _set_flat(segment: Segment, selector: int, type: int, *, long: bool) -> None:
    segment.base, segment.limit, segment.selector, segment.type = 0, 0xFFFF_FFFF, selector, type
    segment.present, segment.s, segment.g, segment.dpl = 1, 1, 1, 0
    segment.l, segment.db, segment.avl, segment.unusable = int(long), int(not long), 0, 0

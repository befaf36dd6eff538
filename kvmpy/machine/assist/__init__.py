"""Completing in user space what a host's KVM leaves undone, so that unmodified kernels run there too.

Where KVM runs ring 0 by its instruction emulator, it meets instructions that the emulator does not know: an emulation
failure, which is a normal exit from which the guest can go on. `Assist.complete` decodes the instruction, does what
the processor would have done, faults included, and the guest never knows. Each module has a part of the instructions:

    interrupts   int3, int n: through the guest's IDT
    system       rdtscp, lar, invpcid, ...: what only ring 0 or the descriptor tables know
    xsave        the XSAVE family: FPU state to memory and back
    integer, vector, x87    everything that the host's own processor can do for us (`native`)

`syscall` is of another kind: no failure, but a SYSCALL that did not reach ring 0. And `strings` is for speed.

The guest is hostile. Its instruction is decoded from a copy; its operands are reached through its page tables, with
its rights; what this cannot do ends the run with a diagnosis. An instruction that fails without end is an endless
loop of the guest's, like any other.

A host that needs nothing of this never comes here.

Floor: machine.
"""

from collections import Counter
from contextlib import suppress
from functools import lru_cache
from importlib import import_module

from kvmpy._shim import lib
from kvmpy.kvm import Debug, InternalError, Vcpu
from kvmpy.machine.assist.context import MAX_PHYS_ADDR, PF, REGISTERS, UD, Completion, Context, Fault, Refused
from kvmpy.machine.assist.decode import MAXIMUM_LENGTH, DecodeError, Instruction, TooShort, decode
from kvmpy.machine.assist.strings import StringAssist
from kvmpy.machine.assist.syscall import SyscallAssist
from kvmpy.machine.guest_debug import GuestDebug
from kvmpy.machine.memory import GuestMemory

MODULES = ("interrupts", "system", "xsave", "integer", "vector", "x87")
"""Where completions are looked for, in this order."""
FETCH, UNDEFINED = "fetch", "undefined"
"""Names of a fault that is met before the instruction is known, and of what a program may not do."""
USER = 3


class Assist:
    """The assists of a machine with ``memory``. All but `counts` is called in the vCPU's own thread.

    ``max_phys_addr``: bits of a physical address, as CPUID 0x80000008 tells the guest.
    """

    def __init__(self, memory: GuestMemory, *, max_phys_addr: int = MAX_PHYS_ADDR) -> None:
        self._memory, self._max_phys_addr = memory, max_phys_addr
        self._states: dict[int, _VcpuState] = {}

    def _state(self, vcpu: Vcpu) -> "_VcpuState":
        if vcpu.vcpu_id not in self._states:
            self._states[vcpu.vcpu_id] = _VcpuState(vcpu, self._memory, self._max_phys_addr)
        return self._states[vcpu.vcpu_id]

    def complete(self, vcpu: Vcpu, exit: InternalError) -> str | None:
        """Complete the instruction that KVM could not emulate, and return its name; None: the run has to end.

        The next KVM_RUN then goes on behind it, or in the handler of the exception that it raises.
        """
        state = self._state(vcpu)
        if exit.suberror != lib.KVM_INTERNAL_ERROR_EMULATION or not exit.instruction:
            return None
        regs, sregs = vcpu.get_regs(), vcpu.get_sregs()
        context = Context(vcpu, self._memory, regs, sregs, max_phys_addr=self._max_phys_addr)
        state.refusal = ""
        name = FETCH
        try:
            understood = _read(context, exit.instruction)
            if understood is None:
                raise Refused("")
            context.instruction, completion = understood
            name = completion.name
            completion.run(context)
        except Fault as fault:
            _raise(context, fault)
        except Refused as refused:
            if context.cpl != USER:
                state.refusal = str(refused)
                return None
            # A program shall not end its machine: KVM too makes it an invalid opcode, where it is not asked to tell.
            name = UNDEFINED
            _raise(context, Fault(UD))
        else:
            _write_back(context)
        state.counts[name] += 1
        return name

    def complete_debug(self, vcpu: Vcpu, exit: Debug) -> str | None:
        """Do what an exit Debug asks for; return what it was, or None: it is not an assist's."""
        state = self._state(vcpu)
        if state.debug.stepping:
            state.debug.step(False)
            return "step"
        if state.strings.hit(exit.pc):
            return "string"
        name = state.syscall.complete(exit)
        if name is not None:
            state.counts[name] += 1
        return name

    def look(self, vcpu: Vcpu) -> None:
        """Finish a long string instruction, if ``vcpu`` is at one, and look again by and by; for speed."""
        self._state(vcpu).strings.look()

    def msr_written(self, vcpu: Vcpu, index: int, data: int) -> None:
        """Take note of one of `syscall.MSRS`, which has its new value."""
        self._state(vcpu).syscall.written(index, data)

    def refusal(self, vcpu_id: int | None) -> str:
        """Return why the last instruction of a vCPU could not be completed, or nothing."""
        state = self._states.get(vcpu_id if vcpu_id is not None else -1)
        return state.refusal if state else ""

    def counts(self) -> Counter[str]:
        """Return how often each was used by this way, by name, over all vCPUs: C counts its own."""
        total: Counter[str] = Counter()
        for state in list(self._states.values()):
            total += state.counts
            total["string"] += state.strings.finished
        return +total


class _VcpuState:
    """What the assists know of one vCPU."""

    def __init__(self, vcpu: Vcpu, memory: GuestMemory, max_phys_addr: int) -> None:
        self.debug = GuestDebug(vcpu)
        self.syscall = SyscallAssist(vcpu, memory, self.debug, max_phys_addr)
        self.strings = StringAssist(vcpu, memory, self.debug, max_phys_addr)
        self.counts: Counter[str] = Counter()
        self.refusal = ""


def _read(context: Context, code: bytes) -> tuple[Instruction, Completion] | None:
    """Return the instruction that begins with ``code``, or None.

    KVM fetches no page before it needs a byte of it, and an opcode that it does not know ends its need: what is behind
    the edge of a page is fetched here, and its fault is this fetch's. Raises Fault, Refused.
    """
    try:
        return _understand(code, context.bits)
    except TooShort:
        missing = MAXIMUM_LENGTH - len(code)
    if missing <= 0:
        return None
    with suppress(TooShort):
        return _understand(code + context.fetch(len(code), missing), context.bits)
    return None


@lru_cache(maxsize=4096)  # a kernel has the same few again and again
def _understand(code: bytes, bits: int) -> tuple[Instruction, Completion] | None:
    try:
        instruction = decode(code, bits=bits)
    except TooShort:
        raise
    except DecodeError:
        return None
    completion = find(instruction)
    return (instruction, completion) if completion is not None else None


def find(instruction: Instruction) -> Completion | None:
    """Return what completes ``instruction``, or None."""
    for name in MODULES:
        completion: Completion | None = import_module(f"kvmpy.machine.assist.{name}").find(instruction)
        if completion is not None:
            return completion
    return None


def _write_back(context: Context) -> None:
    regs, vcpu = context.regs, context.vcpu
    for name, value in zip(REGISTERS, context.registers, strict=True):
        setattr(regs, name, value)
    regs.rflags = context.rflags & ~lib.X86_EFLAGS_RF
    regs.rip = context.next_rip if context.rip is None else context.rip
    vcpu.set_regs(regs)


def _raise(context: Context, fault: Fault) -> None:
    """Make the guest take an exception: RIP stays at the instruction."""
    vcpu = context.vcpu
    if fault.vector == PF:
        sregs = context.sregs
        sregs.cr2 = fault.address or 0
        vcpu.set_sregs(sregs)
    events = vcpu.get_state("VCPU_EVENTS")
    events.flags = 0  # what else is on its way stays as it is
    events.exception.injected, events.exception.pending = 1, 0
    events.exception.nr = fault.vector
    events.exception.has_error_code = fault.error_code is not None
    events.exception.error_code = fault.error_code or 0
    vcpu.set_state("VCPU_EVENTS", events)

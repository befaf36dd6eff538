"""Single system instructions: RDTSCP, RDPID, INVPCID, MONITOR, MWAIT.

What needs more than a few lines has a module of its own: `selectors` (VERR, VERW, LAR, LSL), `enter`.

Whether the guest's CPUID has them is not asked: where KVM leaves an instruction undone, it may also show features of
the host that the VMM has not given.

Floor: machine.

Source: Intel SDM vol. 2, one page an instruction.
"""

from kvmpy._shim import lib
from kvmpy.machine.assist import enter, selectors
from kvmpy.machine.assist.context import GP, UD, Completion, Context, Fault, Refused, without_lock
from kvmpy.machine.assist.instruction import Instruction, OpcodeMap

# MSRs (Intel SDM vol. 4, table 2-2)
IA32_TIME_STAMP_COUNTER, IA32_TSC_AUX = 0x10, 0xC000_0103

# CR4 (Intel SDM vol. 3 §2.5)
CR4_TSD, CR4_PGE, CR4_PCIDE = 1 << 2, 1 << 7, 1 << 17

RAX, RCX, RDX = 0, 1, 2
LOW_32, ALL_64 = (1 << 32) - 1, (1 << 64) - 1

# INVPCID_TYPE (Intel SDM vol. 2, INVPCID)
INDIVIDUAL_ADDRESS, SINGLE_CONTEXT, ALL_CONTEXTS = 0, 1, 3


def find(instruction: Instruction) -> Completion | None:
    """Return what completes ``instruction``, or None: it is not one of these."""
    found = _find(instruction) or selectors.find(instruction) or enter.find(instruction)
    return without_lock(found, instruction)


def _find(instruction: Instruction) -> Completion | None:
    if instruction.vex:
        return None
    match instruction.map, instruction.opcode, instruction.prefix:
        case OpcodeMap.TWO_0F, 0x01, prefix:
            return _RDTSCP if instruction.modrm == 0xF9 else _WITHOUT_PREFIX.get((instruction.modrm or 0, prefix))
        case OpcodeMap.TWO_0F, 0xC7, 0xF3 if instruction.reg & 7 == 7 and instruction.memory is None:
            return _RDPID
        case OpcodeMap.THREE_0F38, 0x82, 0x66 if instruction.memory is not None:
            return _INVPCID
    return None


def _rdtscp(context: Context) -> None:
    sregs = context.sregs
    if sregs.cr4 & CR4_TSD and sregs.cr0 & lib.X86_CR0_PE and context.cpl != 0:
        raise Fault(GP, 0)
    msrs = context.vcpu.get_msrs([IA32_TIME_STAMP_COUNTER, IA32_TSC_AUX])
    if IA32_TIME_STAMP_COUNTER not in msrs:
        raise Refused("KVM does not tell the TSC")
    tsc = msrs[IA32_TIME_STAMP_COUNTER]
    context.registers[RAX], context.registers[RDX] = tsc & LOW_32, tsc >> 32
    context.registers[RCX] = msrs.get(IA32_TSC_AUX, 0) & LOW_32


def _rdpid(context: Context) -> None:
    """Read IA32_TSC_AUX. Where KVM has no such MSR the guest could not write it either, and it is 0."""
    msrs = context.vcpu.get_msrs([IA32_TSC_AUX])
    context.registers[context.instruction.rm] = msrs.get(IA32_TSC_AUX, 0) & LOW_32


def _invpcid(context: Context) -> None:
    """Check the operands, and forget more than was asked for: all translations, which is allowed."""
    if context.cpl != 0:
        raise Fault(GP, 0)
    kind = context.registers[context.instruction.reg]
    descriptor = context.read_operand(16)
    pcid, linear = int.from_bytes(descriptor[:8], "little"), int.from_bytes(descriptor[8:], "little")
    if kind > ALL_CONTEXTS or pcid >> 12:
        raise Fault(GP, 0)
    if kind in (INDIVIDUAL_ADDRESS, SINGLE_CONTEXT) and pcid and not context.sregs.cr4 & CR4_PCIDE:
        raise Fault(GP, 0)
    if kind == INDIVIDUAL_ADDRESS and not context.is_canonical(linear):
        raise Fault(GP, 0)
    _flush_translations(context)


def _flush_translations(context: Context) -> None:
    """Make this vCPU forget all translations, global ones too, as a change of CR4.PGE does (SDM vol. 3 §4.10.4.1)."""
    sregs, vcpu = context.sregs, context.vcpu
    sregs.cr4 ^= CR4_PGE
    vcpu.set_sregs(sregs)
    sregs.cr4 ^= CR4_PGE
    vcpu.set_sregs(sregs)


def _monitor(context: Context) -> None:
    """Check the operand as a load of one byte, and arm nothing: MWAIT ends at once."""
    if context.cpl != 0:
        raise Fault(UD)
    if context.bits != 64:
        raise Refused("MONITOR outside 64-bit code")
    if context.registers[RCX]:
        raise Fault(GP, 0)
    instruction = context.instruction
    prefixes = instruction.raw[: instruction.modrm_at]
    segment = next((name for byte, name in ((0x64, "fs"), (0x65, "gs")) if byte in prefixes), None)
    offset = context.registers[RAX] & (1 << instruction.address_size) - 1
    linear = (offset + (int(getattr(context.sregs, segment).base) if segment else 0)) & ALL_64
    if not context.is_canonical(linear):
        raise Fault(GP, 0)
    context.read(linear, 1)


def _mwait(context: Context) -> None:
    """Check the operands, and do not wait: a processor may end the wait for reasons of its own."""
    if context.cpl != 0:
        raise Fault(UD)
    if context.registers[RCX] & ~1:
        raise Fault(GP, 0)


_RDTSCP, _RDPID = Completion("rdtscp", _rdtscp), Completion("rdpid", _rdpid)
_INVPCID = Completion("invpcid", _invpcid)
_WITHOUT_PREFIX = {(0xC8, 0): Completion("monitor", _monitor), (0xC9, 0): Completion("mwait", _mwait)}
"""By ModRM and mandatory prefix, of which there is none."""

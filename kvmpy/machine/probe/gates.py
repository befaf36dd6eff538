"""Probes of the ways out of a privilege level: from CPL 3 into the kernel, and from the guest to its hypervisor.

Source: Intel SDM vol. 3 §6.12 (gates), §5.8.8 (SYSCALL); Linux, Documentation/virt/kvm/x86/hypercalls.rst.
"""

from collections.abc import Callable

from kvmpy.machine import x86
from kvmpy.machine.probe import tables
from kvmpy.machine.probe.bench import Bench, Done, Mode, Trap, describe, finish
from kvmpy.machine.probe.finding import Ability, Verdict
from kvmpy.machine.probe.instructions import COMPLETED, INT3, INT_N
from kvmpy.machine.probe.judge import Judgement, Probe, compare, expect

# MSRs of SYSCALL (Intel SDM vol. 4, table 2-2)
IA32_STAR, IA32_LSTAR, IA32_FMASK = 0xC000_0081, 0xC000_0082, 0xC000_0084
SYSCALL_TARGET = tables.CODE + 4

# At SYSCALL_TARGET the kernel begins: it reports its CPL.
SYSCALL = bytes.fromhex(
    "0f05"  # syscall
    "0f0b"  # ud2
    "8cc8"  # mov %cs, %eax
    "83e003"  # and $3, %eax
)
UNKNOWN_CALL = 0x5A5A
VMCALL = bytes.fromhex(
    "b8 5a5a0000"  # mov $0x5a5a, %eax
    "0f01c1"  # vmcall
)
VMMCALL = bytes.fromhex(
    "b8 5a5a0000"  # mov $0x5a5a, %eax
    "0f01d9"  # vmmcall
)
CPUID_1_ECX = bytes.fromhex(
    "b8 01000000"  # mov $1, %eax
    "31c9"  # xor %ecx, %ecx
    "0fa2"  # cpuid
    "89c8"  # mov %ecx, %eax
)
MASKED_ECX = 1 << 31
"""All features of leaf 1 ECX off but "there is a hypervisor"."""
DYNAMIC_ECX = 1 << 27 | 1 << 3
"""OSXSAVE and MONITOR follow CR4 and an MSR, not the table."""


def syscall(bench: Bench) -> Judgement:
    """Judge whether SYSCALL at CPL 3 enters the kernel at CPL 0."""
    with bench.start(SYSCALL, Mode.CPL3) as vcpu:
        selectors = x86.CODE_SELECTOR << 32 | (tables.USER_DATA - 8 | 3) << 48
        vcpu.set_msrs({IA32_STAR: selectors, IA32_LSTAR: SYSCALL_TARGET, IA32_FMASK: 0})
        outcome = finish(vcpu)
    if outcome == Done(3):
        return Verdict.BROKEN, "goes to the kernel's entry but stays at CPL3"
    return compare(outcome, Done(0))


def hypercall(code: bytes, mode: Mode) -> Callable[[Bench], Judgement]:
    """Return the judge of a hypercall with a number that nobody knows: any answer is right."""

    def judge(bench: Bench) -> Judgement:
        outcome = bench.run(code, mode)
        match outcome:
            case Done(value=value) if value == UNKNOWN_CALL:
                return Verdict.BROKEN, "does nothing: no answer in EAX"
            case Done(value=value):
                return Verdict.OK, f"answered: {value - (value >> 31 << 32)}"
            case Trap():
                return Verdict.MISSING, f"refused: {describe(outcome)}"
        return Verdict.BROKEN, describe(outcome)

    return judge


def cpuid_mask(mode: Mode) -> Callable[[Bench], Judgement]:
    """Return the judge of CPUID in ``mode``: are features absent that KVM_SET_CPUID2 took away?"""

    def judge(bench: Bench) -> Judgement:
        masked = [e.replace(ecx=MASKED_ECX) if e.function == 1 else e for e in bench.cpuid]
        with bench.start(CPUID_1_ECX, mode, cpuid=masked) as vcpu:
            outcome = finish(vcpu)
        if not isinstance(outcome, Done):
            return compare(outcome, Done(MASKED_ECX))
        extra = (outcome.value & ~DYNAMIC_ECX) ^ MASKED_ECX
        if extra:
            return Verdict.BROKEN, f"leaf 1 ECX reads 0x{outcome.value:x}, the table says 0x{MASKED_ECX:x}"
        return Verdict.OK, ""

    return judge


_INT3_GATE = "enter the kernel by INT3 through a gate of DPL 3"
_NO_HYPERCALL = "let the guest talk to kvmpy by ports or MMIO"
_CPUID = "let the guest take no feature bit on trust; pass what it must know in the parameter page"

ENTRIES = (
    Probe(Ability.INT3_CPL3, expect(INT3, Trap(3), mode=Mode.CPL3), "enter the kernel by a fault, such as UD2"),
    Probe(Ability.INT_N_CPL3, expect(INT_N, Trap(0x21), mode=Mode.CPL3), _INT3_GATE),
    Probe(Ability.SYSCALL_CPL3, syscall, COMPLETED),
)
HYPERCALLS = (
    Probe(Ability.VMCALL_CPL0, hypercall(VMCALL, Mode.CPL0), _NO_HYPERCALL),
    Probe(Ability.VMMCALL_CPL0, hypercall(VMMCALL, Mode.CPL0), _NO_HYPERCALL),
    Probe(Ability.VMCALL_CPL3, hypercall(VMCALL, Mode.CPL3), _NO_HYPERCALL),
    Probe(Ability.VMMCALL_CPL3, hypercall(VMMCALL, Mode.CPL3), _NO_HYPERCALL),
    Probe(Ability.CPUID_MASK_CPL0, cpuid_mask(Mode.CPL0), _CPUID),
    Probe(Ability.CPUID_MASK_CPL3, cpuid_mask(Mode.CPL3), _CPUID),
)

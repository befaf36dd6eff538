"""Probes of the local APIC: when is an interrupt taken, and does INIT-SIPI start a second processor?

Source: Intel SDM vol. 3 §11.12 (x2APIC), §9.4 (INIT-SIPI); vol. 2, STI.
"""

from kvmpy.kvm import Vcpu
from kvmpy.machine.probe import tables
from kvmpy.machine.probe.bench import Bench, Done, Trap, describe, finish
from kvmpy.machine.probe.finding import Ability, Verdict
from kvmpy.machine.probe.judge import Judgement, Probe, compare

X2APIC_ENABLED = 1 << 10 | 1 << 11  # of IA32_APIC_BASE
SELF_VECTOR = 0x40

# Enable the local APIC, send ourselves vector 0x40, then count the rounds after STI.
COUNT_AFTER_STI = bytes.fromhex(
    "b9 0f080000"  # mov $0x80f, %ecx
    "b8 ff010000"  # mov $0x1ff, %eax
    "31d2"  # xor %edx, %edx
    "0f30"  # wrmsr
    "b9 3f080000"  # mov $0x83f, %ecx
    "b8 40000000"  # mov $0x40, %eax
    "0f30"  # wrmsr
    "31c9"  # xor %ecx, %ecx
    "fb"  # sti
    "90"  # nop
    "ffc1"  # inc %ecx
    "81f9 00100000"  # cmp $0x1000, %ecx
    "75f6"  # jne .-8
)
INSTRUCTIONS_A_ROUND = 3

# The interrupt command register: INIT, then SIPI with page 0x11. RDX holds the APIC id of whom.
START_OTHER = bytes.fromhex(
    "b9 30080000"  # mov $0x830, %ecx
    "b8 00450000"  # mov $0x4500, %eax
    "0f30"  # wrmsr
    "b8 11460000"  # mov $0x4611, %eax
    "0f30"  # wrmsr
)
OTHER_16 = bytes.fromhex(
    "b8 5a00"  # mov $0x5a, %ax
    "e7f4"  # out %ax, $0xf4
)


def irq_after_sti(bench: Bench) -> Judgement:
    """Judge when a pending interrupt is taken: one instruction after STI."""
    with bench.start(COUNT_AFTER_STI) as vcpu:
        _use_x2apic(vcpu)
        outcome = finish(vcpu)
        rounds = vcpu.get_regs().rcx
    if outcome == Trap(SELF_VECTOR) and rounds > 1:
        return Verdict.BROKEN, f"taken about {INSTRUCTIONS_A_ROUND * rounds} instructions after it"
    if isinstance(outcome, Done):
        return Verdict.BROKEN, f"not taken within {INSTRUCTIONS_A_ROUND * 0x1000} instructions"
    return compare(outcome, Trap(SELF_VECTOR))


def smp_start(bench: Bench) -> Judgement:
    """Judge whether a processor that waits for INIT and SIPI starts by them."""
    bench.memory.write(tables.AP_CODE, OTHER_16)
    # In this order: the first vCPU of a VM is the one that waits for nobody.
    with bench.start(START_OTHER) as first, bench.add_vcpu() as other:
        _use_x2apic(first)
        with first.edit_regs() as regs:
            regs.rdx = other.vcpu_id
        sent = finish(first)
        if not isinstance(sent, Done):
            return Verdict.MISSING, f"the interrupt command {describe(sent)}"
        return compare(finish(other), Done(0x5A), ok="INIT-SIPI starts a second vCPU")


def _use_x2apic(vcpu: Vcpu) -> None:
    sregs = vcpu.get_sregs()
    sregs.apic_base |= X2APIC_ENABLED
    vcpu.set_sregs(sregs)


PROBES = (
    Probe(Ability.IRQ_AFTER_STI, irq_after_sti, "wait by STI; HLT: then the interrupt is taken at once"),
    Probe(Ability.SMP_START, smp_start, "run guests with --cores 1"),
)

"""Probes of single instructions at CPL 0 in 64-bit mode: where KVM emulates CPL 0, it knows only some.

Each guest leaves in EAX what the instruction makes of known input.

Source: Intel SDM vol. 2, one page an instruction.
"""

from kvmpy.machine.probe.bench import Bench, Done, Trap, finish
from kvmpy.machine.probe.finding import Ability
from kvmpy.machine.probe.judge import Judgement, Probe, compare, expect

INT3 = bytes.fromhex(
    "cc"  # int3
)
INT_N = bytes.fromhex(
    "cd21"  # int $0x21
)
POPCNT = bytes.fromhex(
    "b8 f0f00000"  # mov $0xf0f0, %eax
    "f30fb8c0"  # popcnt %eax, %eax
)
MOVUPS = bytes.fromhex(
    "c706 5a000000"  # movl $0x5a, (%rsi)
    "0f1006"  # movups (%rsi), %xmm0
    "0f114620"  # movups %xmm0, 0x20(%rsi)
    "8b4620"  # mov 0x20(%rsi), %eax
)
MOVD = bytes.fromhex(
    "b9 5a000000"  # mov $0x5a, %ecx
    "660f6ec1"  # movd %ecx, %xmm0
    "660f7ec0"  # movd %xmm0, %eax
)
FLD1 = bytes.fromhex(
    "dbe3"  # fninit
    "d9e8"  # fld1
    "db1e"  # fistpl (%rsi)
    "8b06"  # mov (%rsi), %eax
)
LDMXCSR = bytes.fromhex(
    "c706 801f0000"  # movl $0x1f80, (%rsi)
    "0fae16"  # ldmxcsr (%rsi)
    "0fae5e04"  # stmxcsr 4(%rsi)
    "8b4604"  # mov 4(%rsi), %eax
)
XGETBV = bytes.fromhex(
    "31c9"  # xor %ecx, %ecx
    "0f01d0"  # xgetbv
    "83e001"  # and $1, %eax
)
RDTSCP = bytes.fromhex(
    "b9 ffffffff"  # mov $-1, %ecx
    "0f01f9"  # rdtscp
    "89c8"  # mov %ecx, %eax
)
# Exchange sixteen zero bytes for RCX:RBX.
CMPXCHG16B = bytes.fromhex(
    "31c0"  # xor %eax, %eax
    "31d2"  # xor %edx, %edx
    "488906"  # mov %rax, (%rsi)
    "48894608"  # mov %rax, 8(%rsi)
    "bb 5a000000"  # mov $0x5a, %ebx
    "f0480fc70e"  # lock cmpxchg16b (%rsi)
    "8b06"  # mov (%rsi), %eax
)
# Report RFLAGS.AC, bit 18.
CLAC_STAC = bytes.fromhex(
    "0f01ca"  # clac
    "0f01cb"  # stac
    "9c"  # pushf
    "58"  # pop %rax
    "c1e812"  # shr $18, %eax
    "83e001"  # and $1, %eax
)
MOVBE = bytes.fromhex(
    "c706 44332211"  # movl $0x11223344, (%rsi)
    "0f38f006"  # movbe (%rsi), %eax
)
RDPID = bytes.fromhex(
    "b8 ffffffff"  # mov $-1, %eax
    "f30fc7f8"  # rdpid %rax
)
# Without the instruction these prefixes mean nothing, and BSR or BSF is what runs.
LZCNT = bytes.fromhex(
    "b8 34120000"  # mov $0x1234, %eax
    "f30fbdc0"  # lzcnt %eax, %eax
)
TZCNT = bytes.fromhex(
    "31c9"  # xor %ecx, %ecx
    "b8 5a000000"  # mov $0x5a, %eax
    "f30fbcc1"  # tzcnt %ecx, %eax
)

CR4_OSXSAVE = 1 << 18  # Intel SDM vol. 3 §2.5


def xgetbv(bench: Bench) -> Judgement:
    """Judge XGETBV, which is there only where the system has said that it knows XSAVE."""
    with bench.start(XGETBV) as vcpu:
        sregs = vcpu.get_sregs()
        sregs.cr4 |= CR4_OSXSAVE
        vcpu.set_sregs(sregs)
        return compare(finish(vcpu), Done(1))


COMPLETED = "none is needed: kvmpy completes the instruction, at the price of an exit"
_UNSEEN = (
    "no exit tells kvmpy of it. Linux does without by clearcpuid=, which kvmpy adds itself; "
    "build another kernel with -march=x86-64"
)

PROBES = (
    Probe(Ability.INT3_CPL0, expect(INT3, Trap(3)), COMPLETED),
    Probe(Ability.INT_N_CPL0, expect(INT_N, Trap(0x21)), COMPLETED),
    Probe(Ability.MOVUPS_CPL0, expect(MOVUPS, Done(0x5A)), COMPLETED),
    Probe(Ability.MOVD_CPL0, expect(MOVD, Done(0x5A)), COMPLETED),
    Probe(Ability.FLD1_CPL0, expect(FLD1, Done(1)), COMPLETED),
    Probe(Ability.LDMXCSR_CPL0, expect(LDMXCSR, Done(0x1F80)), COMPLETED),
    Probe(Ability.POPCNT_CPL0, expect(POPCNT, Done(8)), COMPLETED),
    Probe(Ability.XGETBV_CPL0, xgetbv, COMPLETED),
    Probe(Ability.RDTSCP_CPL0, expect(RDTSCP, Done(0)), COMPLETED),
    Probe(Ability.CMPXCHG16B_CPL0, expect(CMPXCHG16B, Done(0x5A)), COMPLETED),
    Probe(Ability.CLAC_STAC_CPL0, expect(CLAC_STAC, Done(1)), COMPLETED),
    Probe(Ability.MOVBE_CPL0, expect(MOVBE, Done(0x44332211)), _UNSEEN),
    Probe(Ability.RDPID_CPL0, expect(RDPID, Done(0)), _UNSEEN),
    Probe(Ability.LZCNT_CPL0, expect(LZCNT, Done(19)), _UNSEEN),
    Probe(Ability.TZCNT_CPL0, expect(TZCNT, Done(32)), _UNSEEN),
)

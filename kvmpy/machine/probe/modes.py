"""Probes of the processor's modes, and of how fast each privilege level runs.

Source: Intel SDM vol. 3 §9.8 and §9.9 (mode switching), §4.3 to §4.5 (paging).
"""

import time

from kvmpy.machine.probe.bench import Bench, Done, Hang, Mode, Trap, describe, finish
from kvmpy.machine.probe.finding import Ability, Verdict
from kvmpy.machine.probe.judge import Judgement, Probe, expect

# Real mode: by way of the vector table.
REAL_16 = bytes.fromhex(
    "cd21"  # int $0x21
)
PROTECTED_32 = bytes.fromhex(
    "ea 07100000 1000"  # ljmp $0x10, $0x1007
    "b8 5a000000"  # mov $0x5a, %eax
)
# Turn paging on and report CR0.PG.
PAGING_32 = bytes.fromhex(
    "0f20c0"  # mov %cr0, %eax
    "0d 00000080"  # or $0x80000000, %eax
    "0f22c0"  # mov %eax, %cr0
    "eb00"  # jmp .+2
    "0f20c0"  # mov %cr0, %eax
    "c1e81f"  # shr $31, %eax
)
# Report the CPL, by way of a shift that only 64-bit registers survive.
LONG = bytes.fromhex(
    "8cc8"  # mov %cs, %eax
    "83e003"  # and $3, %eax
    "83c850"  # or $0x50, %eax
    "48c1e020"  # shl $32, %rax
    "48c1e820"  # shr $32, %rax
)
# Return from an interrupt that never was, to user code at 0x1015: the frame of SS, RSP, RFLAGS (IOPL 3), CS, RIP.
ENTER_USER = bytes.fromhex(
    "6a33"  # push $0x33
    "68 00f00000"  # push $0xf000
    "68 02300000"  # push $0x3002
    "6a3b"  # push $0x3b
    "68 15100000"  # push $0x1015
    "48cf"  # iretq
)
COUNTDOWN = bytes.fromhex(
    "ffc9"  # dec %ecx
    "75fc"  # jnz .-2
)
COUNTDOWN_INSTRUCTIONS = 2

EMULATED_RATIO = 50
"""CPL 0 slower than CPL 3 by this factor is not the processor's doing. Emulators: above 1000."""
ENOUGH_SECONDS = 0.002
"""Entering and leaving the guest takes microseconds: a loop of this length measures instructions."""


def instructions_per_second(bench: Bench, mode: Mode) -> float | None:
    """Time a counted loop in ``mode``, in the processor time of this thread; None when it does not end."""
    for count in (1_000 << 2 * i for i in range(8)):
        with bench.start(COUNTDOWN, mode, rcx=count) as vcpu:
            started = time.thread_time()
            outcome = finish(vcpu)
            seconds = time.thread_time() - started
        if not isinstance(outcome, Done):
            return None
        if seconds > ENOUGH_SECONDS:
            break
    return COUNTDOWN_INSTRUCTIONS * count / max(seconds, 1e-9)


def native_cpl0(bench: Bench) -> Judgement:
    """Judge by the speeds of CPL 0 and CPL 3."""
    kernel, user = (instructions_per_second(bench, mode) for mode in (Mode.CPL0, Mode.CPL3))
    if kernel is None or user is None:
        return Verdict.UNKNOWN, "the counted loop does not end at both levels: " + describe(Hang())
    speeds = f"CPL0 {_speed(kernel)}, CPL3 {_speed(user)} M instructions/s"
    if user / kernel > EMULATED_RATIO:
        return Verdict.EMULATED, f"KVM emulates CPL0 in software: {speeds}"
    return Verdict.OK, speeds


def _speed(per_second: float) -> str:
    return f"{per_second / 1e6:.1f}" if per_second < 1e8 else f"{per_second / 1e6:.0f}"


PROBES = (
    Probe(
        Ability.REAL_MODE,
        expect(REAL_16, Trap(0x21), mode=Mode.REAL),
        "Intel before Westmere: load kvm_intel with emulate_invalid_guest_state=1",
    ),
    Probe(
        Ability.PROTECTED_MODE,
        expect(PROTECTED_32, Done(0x5A), mode=Mode.PROTECTED),
        "update the host's kernel: a KVM without protected mode boots nothing",
    ),
    Probe(
        Ability.PAGING_32,
        expect(PAGING_32, Done(1), mode=Mode.PROTECTED),
        "boot a 64-bit kernel, or a 32-bit one that leaves paging off",
    ),
    Probe(
        Ability.PAGING_PAE,
        expect(PAGING_32, Done(1), mode=Mode.PROTECTED_PAE),
        "boot a 64-bit kernel, or a 32-bit one that leaves paging off",
    ),
    Probe(
        Ability.LONG_CPL0,
        expect(LONG, Done(0x50)),
        "use a 64-bit processor and kernel",
    ),
    Probe(
        Ability.LONG_CPL3,
        expect(ENTER_USER + LONG, Done(0x53)),
        "stay at CPL0 in the guest",
    ),
    Probe(
        Ability.NATIVE_CPL0,
        native_cpl0,
        "put heavy loops of the guest at CPL3, and let the VMM clear and copy memory",
    ),
)

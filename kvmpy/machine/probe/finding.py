"""What a probe can say: the abilities of a host that are worth asking for, the verdicts, and one finding.

Not here: how an ability is found. Floor: machine.
"""

from dataclasses import dataclass
from enum import StrEnum


class Verdict(StrEnum):
    """How a host does a thing."""

    OK = "ok"
    EMULATED = "emulated"
    """It works, in software: slowly."""
    MISSING = "missing"
    """It is absent or refused, and whoever tries it hears so."""
    BROKEN = "broken"
    """It hangs, or does something else than a processor would."""
    UNKNOWN = "unknown"
    """It could not be tried."""


class Ability(StrEnum):
    """What a host may or may not be able to do. The value is the name that people type."""

    # host
    DEVICE = "device"
    PERMISSION = "permission"
    API_VERSION = "api-version"
    CREATE_VM = "create-vm"
    MODULE = "module"
    CPU_FLAG = "cpu-flag"
    BARE_METAL = "bare-metal"
    # capabilities
    USER_MEMORY = "user-memory"
    IRQCHIP = "irqchip"
    PIT2 = "pit2"
    IMMEDIATE_EXIT = "immediate-exit"
    SYNC_REGS = "sync-regs"
    IRQFD = "irqfd"
    IOEVENTFD = "ioeventfd"
    READONLY_MEM = "readonly-mem"
    BINARY_STATS = "binary-stats"
    EXIT_ON_EMULATION_FAILURE = "exit-on-emulation-failure"
    DISABLE_EXITS = "disable-exits"
    X2APIC_API = "x2apic-api"
    MAX_VCPUS = "max-vcpus"
    # processor modes
    REAL_MODE = "real-mode"
    PROTECTED_MODE = "protected-mode"
    PAGING_32 = "paging-32"
    PAGING_PAE = "paging-pae"
    LONG_CPL0 = "long-cpl0"
    LONG_CPL3 = "long-cpl3"
    NATIVE_CPL0 = "native-cpl0"
    # instructions at CPL0, 64-bit
    INT3_CPL0 = "int3-cpl0"
    INT_N_CPL0 = "int-n-cpl0"
    POPCNT_CPL0 = "popcnt-cpl0"
    MOVUPS_CPL0 = "movups-cpl0"
    MOVD_CPL0 = "movd-cpl0"
    FLD1_CPL0 = "fld1-cpl0"
    LDMXCSR_CPL0 = "ldmxcsr-cpl0"
    XGETBV_CPL0 = "xgetbv-cpl0"
    RDTSCP_CPL0 = "rdtscp-cpl0"
    CMPXCHG16B_CPL0 = "cmpxchg16b-cpl0"
    CLAC_STAC_CPL0 = "clac-stac-cpl0"
    MOVBE_CPL0 = "movbe-cpl0"
    RDPID_CPL0 = "rdpid-cpl0"
    LZCNT_CPL0 = "lzcnt-cpl0"
    TZCNT_CPL0 = "tzcnt-cpl0"
    # from CPL3 into the kernel
    INT3_CPL3 = "int3-cpl3"
    INT_N_CPL3 = "int-n-cpl3"
    SYSCALL_CPL3 = "syscall-cpl3"
    # hypercalls and CPUID
    VMCALL_CPL0 = "vmcall-cpl0"
    VMMCALL_CPL0 = "vmmcall-cpl0"
    VMCALL_CPL3 = "vmcall-cpl3"
    VMMCALL_CPL3 = "vmmcall-cpl3"
    CPUID_MASK_CPL0 = "cpuid-mask-cpl0"
    CPUID_MASK_CPL3 = "cpuid-mask-cpl3"
    # guest debug
    SINGLE_STEP_CPL0 = "single-step-cpl0"
    SINGLE_STEP_CPL3 = "single-step-cpl3"
    SW_BREAKPOINT_CPL0 = "sw-breakpoint-cpl0"
    SW_BREAKPOINT_CPL3 = "sw-breakpoint-cpl3"
    HW_BREAKPOINT_CPL0 = "hw-breakpoint-cpl0"
    HW_BREAKPOINT_CPL3 = "hw-breakpoint-cpl3"
    WATCHPOINT_CPL0 = "watchpoint-cpl0"
    WATCHPOINT_CPL3 = "watchpoint-cpl3"
    # interrupts and cores
    IRQ_AFTER_STI = "irq-after-sti"
    SMP_START = "smp-start"
    # memory and figures
    READONLY_SLOT = "readonly-slot"
    DIRTY_LOG = "dirty-log"
    HUGE_PAGES = "huge-pages"
    EXIT_STATS = "exit-stats"


REQUIRED = frozenset(
    {
        Ability.DEVICE,
        Ability.PERMISSION,
        Ability.API_VERSION,
        Ability.CREATE_VM,
        Ability.USER_MEMORY,
        Ability.IRQCHIP,
        Ability.PIT2,
        Ability.IMMEDIATE_EXIT,
        Ability.REAL_MODE,
        Ability.PROTECTED_MODE,
        Ability.LONG_CPL0,
    }
)
"""Without one of these kvmpy cannot run guests."""


@dataclass(frozen=True, slots=True)
class Finding:
    """How this host does ``name``. ``detail`` says what was seen; ``fix`` what to do about it."""

    name: Ability
    verdict: Verdict
    detail: str = ""
    fix: str | None = None

    @property
    def fails(self) -> bool:
        """Tell whether kvmpy cannot run guests because of this."""
        return self.name in REQUIRED and self.verdict in (Verdict.MISSING, Verdict.BROKEN)

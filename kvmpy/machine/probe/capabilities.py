"""Probes of the capabilities that kvmpy relies on: what KVM_CHECK_EXTENSION says.

Source: KVM API §4.4; §6 to §8 for each capability.
"""

from collections.abc import Callable

from kvmpy._shim import lib
from kvmpy.machine.probe.bench import Bench
from kvmpy.machine.probe.finding import Ability, Verdict
from kvmpy.machine.probe.judge import Judgement, Probe


def capability(number: int, tell: Callable[[int], str] = lambda value: "") -> Callable[[Bench], Judgement]:
    """Return the judge of ``lib.KVM_CAP_*``; ``tell`` makes the detail of what KVM answers."""

    def judge(bench: Bench) -> Judgement:
        value = bench.vm.check_extension(number)
        return (Verdict.OK, tell(value)) if value else (Verdict.MISSING, "this KVM does not have it")

    return judge


def max_vcpus(bench: Bench) -> Judgement:
    """Judge whether there can be more than one vCPU, and tell how many."""
    most = bench.vm.check_extension(lib.KVM_CAP_MAX_VCPUS)
    recommended = bench.vm.check_extension(lib.KVM_CAP_NR_VCPUS)
    detail = f"{most}, recommended {recommended}"
    return (Verdict.OK if most > 1 else Verdict.MISSING), detail


def _exits(mask: int) -> str:
    names = {
        "MWAIT": lib.KVM_X86_DISABLE_EXITS_MWAIT,
        "HLT": lib.KVM_X86_DISABLE_EXITS_HLT,
        "PAUSE": lib.KVM_X86_DISABLE_EXITS_PAUSE,
        "CSTATE": lib.KVM_X86_DISABLE_EXITS_CSTATE,
    }
    return ", ".join(name for name, bit in names.items() if mask & bit)


def _sync_regs(mask: int) -> str:
    names = {
        "regs": lib.KVM_SYNC_X86_REGS,
        "sregs": lib.KVM_SYNC_X86_SREGS,
        "events": lib.KVM_SYNC_X86_EVENTS,
    }
    return ", ".join(name for name, bit in names.items() if mask & bit)


_KERNEL = "update the host's kernel"
_SLOWER = f"{_KERNEL} (Linux {{}} has it); kvmpy works without, more slowly"


PROBES = (
    Probe(Ability.USER_MEMORY, capability(lib.KVM_CAP_USER_MEMORY), _KERNEL),
    Probe(
        Ability.IRQCHIP,
        capability(lib.KVM_CAP_IRQCHIP),
        f"{_KERNEL}: kvmpy's board needs the in-kernel interrupt controllers",
    ),
    Probe(Ability.PIT2, capability(lib.KVM_CAP_PIT2), f"{_KERNEL}: kvmpy's board needs the in-kernel timer"),
    Probe(Ability.IMMEDIATE_EXIT, capability(lib.KVM_CAP_IMMEDIATE_EXIT), f"{_KERNEL} to Linux 4.11 or later"),
    Probe(Ability.SYNC_REGS, capability(lib.KVM_CAP_SYNC_REGS, _sync_regs), _SLOWER.format("4.17")),
    Probe(Ability.IRQFD, capability(lib.KVM_CAP_IRQFD), _SLOWER.format("2.6.32")),
    Probe(Ability.IOEVENTFD, capability(lib.KVM_CAP_IOEVENTFD), _SLOWER.format("2.6.32")),
    Probe(Ability.READONLY_MEM, capability(lib.KVM_CAP_READONLY_MEM), f"{_KERNEL} to Linux 3.7 or later"),
    Probe(
        Ability.BINARY_STATS,
        capability(lib.KVM_CAP_BINARY_STATS_FD),
        f"{_KERNEL} to Linux 5.14 or later, or use what kvmpy counts itself: run --stats",
    ),
    Probe(
        Ability.EXIT_ON_EMULATION_FAILURE,
        capability(lib.KVM_CAP_EXIT_ON_EMULATION_FAILURE),
        f"{_KERNEL} to Linux 5.14 or later: until then a guest may get #UD where KVM's emulator fails",
    ),
    Probe(
        Ability.DISABLE_EXITS,
        capability(lib.KVM_CAP_X86_DISABLE_EXITS, _exits),
        "none: HLT and PAUSE will exit with --dedicated too",
    ),
    Probe(Ability.X2APIC_API, capability(lib.KVM_CAP_X2APIC_API), "stay below 255 vCPUs"),
    Probe(Ability.MAX_VCPUS, max_vcpus, "run guests with --cores 1"),
)

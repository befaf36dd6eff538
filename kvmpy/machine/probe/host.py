"""Probes of the host from outside: KVM's modules and the processor. No guest runs here, nothing raises.

Source: proc(5); Intel SDM vol. 2, CPUID leaf 1.
"""

import os
from dataclasses import dataclass

from kvmpy.machine.probe.finding import Ability, Finding, Verdict

CPUINFO = "/proc/cpuinfo"
MODULES = "/sys/module"
VENDOR_MODULES = {"vmx": "kvm_intel", "svm": "kvm_amd"}
"""The processor's flag, and the module that needs it."""


@dataclass(frozen=True, slots=True)
class Host:
    """What a report begins with: the processor's model name, the kernel's release, KVM's modules."""

    cpu: str
    kernel: str
    modules: tuple[str, ...]


def describe_host() -> Host:
    """Return what this host is, as far as it tells."""
    return Host(_cpuinfo().get("model name", "unknown processor"), os.uname().release, vendor_modules())


def vendor_modules() -> tuple[str, ...]:
    """Return the loaded modules that give KVM a processor: ``kvm_intel``, ``kvm_amd``, or another's."""
    try:
        return tuple(sorted(name for name in os.listdir(MODULES) if name.startswith("kvm_")))
    except OSError:
        return ()


def module(path: str) -> Finding:
    """Find KVM's modules: the common one and the vendor's."""
    found = vendor_modules()
    if found:
        return Finding(Ability.MODULE, Verdict.OK, ", ".join(found))
    if os.path.isdir(f"{MODULES}/kvm"):
        detail = "kvm is there, but no vendor module: it is built in, or missing"
        return Finding(Ability.MODULE, Verdict.UNKNOWN, detail)
    return Finding(Ability.MODULE, Verdict.MISSING, "no kvm module", module_fix())


def cpu_flag(path: str) -> Finding:
    """Find whether the processor says that it has hardware virtualization."""
    info = _cpuinfo()
    if not info:
        return Finding(Ability.CPU_FLAG, Verdict.UNKNOWN, f"{CPUINFO} cannot be read")
    flags = [flag for flag in VENDOR_MODULES if flag in info.get("flags", "").split()]
    if flags:
        return Finding(Ability.CPU_FLAG, Verdict.OK, ", ".join(flags))
    detail = "no vmx (Intel) and no svm (AMD)"
    others = set(vendor_modules()) - set(VENDOR_MODULES.values())
    if others:
        return Finding(Ability.CPU_FLAG, Verdict.UNKNOWN, f"{detail}; {', '.join(sorted(others))} does without")
    return Finding(Ability.CPU_FLAG, Verdict.MISSING, detail, _FLAG_FIX)


def bare_metal(path: str) -> Finding:
    """Find whether this host is itself a guest: KVM is then nested, or does without hardware."""
    info = _cpuinfo()
    if not info:
        return Finding(Ability.BARE_METAL, Verdict.UNKNOWN, f"{CPUINFO} cannot be read")
    if "hypervisor" not in info.get("flags", "").split():
        return Finding(Ability.BARE_METAL, Verdict.OK)
    detail = "this host is itself a guest (CPUID hypervisor bit): exits cost more"
    return Finding(Ability.BARE_METAL, Verdict.MISSING, detail, "take timings on a machine with no hypervisor below it")


_FLAG_FIX = "enable virtualization in the firmware; in a virtual machine, ask its host for nested virtualization"


def module_fix() -> str:
    """Return how to get KVM into the kernel of this host."""
    flags = _cpuinfo().get("flags", "").split()
    for flag, name in VENDOR_MODULES.items():
        if flag in flags:
            return f"sudo modprobe {name}"
    return _FLAG_FIX


def _cpuinfo() -> dict[str, str]:
    """Return the first processor's lines of /proc/cpuinfo, by name."""
    found: dict[str, str] = {}
    try:
        with open(CPUINFO) as file:
            for line in file:
                name, colon, value = line.partition(":")
                if not colon:
                    break
                found[name.strip()] = value.strip()
    except OSError:
        pass
    return found

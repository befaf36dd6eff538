"""One row of a vCPU's CPUID table, as KVM_GET_SUPPORTED_CPUID and KVM_SET_CPUID2 carry it.

Source: KVM API §4.46, §4.20 (struct kvm_cpuid_entry2). Floor: kvm.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CpuidEntry:
    """What CPUID returns for EAX = ``function`` and, with KVM_CPUID_FLAG_SIGNIFCANT_INDEX, ECX = ``index``."""

    function: int
    index: int
    flags: int
    eax: int
    ebx: int
    ecx: int
    edx: int

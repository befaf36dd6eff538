"""One row of a vCPU's CPUID table, as KVM_GET_SUPPORTED_CPUID and KVM_SET_CPUID2 carry it.

Source: KVM API §4.46, §4.20 (struct kvm_cpuid_entry2). Floor: kvm.
"""


class CpuidEntry:
    """What CPUID returns for EAX = ``function`` and, with KVM_CPUID_FLAG_SIGNIFCANT_INDEX, ECX = ``index``."""

    __slots__ = ("function", "index", "flags", "eax", "ebx", "ecx", "edx")

    def __init__(self, function: int, index: int, flags: int, eax: int, ebx: int, ecx: int, edx: int) -> None:
        self.function, self.index, self.flags = function, index, flags
        self.eax, self.ebx, self.ecx, self.edx = eax, ebx, ecx, edx

    def replace(self, **registers: int) -> "CpuidEntry":
        """Return a copy with some fields changed."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        return CpuidEntry(**fields | registers)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CpuidEntry) and all(getattr(self, n) == getattr(other, n) for n in self.__slots__)

    def __hash__(self) -> int:
        return hash(tuple(getattr(self, name) for name in self.__slots__))

    def __repr__(self) -> str:
        values = ", ".join(f"{name}=0x{getattr(self, name):x}" for name in self.__slots__)
        return f"CpuidEntry({values})"

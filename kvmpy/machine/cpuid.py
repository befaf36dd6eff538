"""CPUID for each vCPU: what KVM supports, with the topology of the machine put in.

One package, one thread a core, APIC id = vcpu_id (which is what KVM gives a vCPU). Data in, data out: nothing here
asks the host, so that any host's table can be tried anywhere.

Which leaf says what about topology::

    1            initial APIC id (8 bits), logical processors, HTT          everybody
    4            who shares a cache, cores of the package                   Intel
    0xb, 0x1f    x2APIC id (32 bits), threads and cores by level            Intel; AMD since Zen 2
    8000_0001    CmpLegacy: the logical processors of leaf 1 are cores      AMD
    8000_0008    cores, bits of the APIC id                                 AMD
    8000_001d    who shares a cache                                         AMD
    8000_001e    extended APIC id (32 bits), core id                        AMD

All other leaves stay as KVM gives them.

Source: Intel SDM vol. 2A, CPUID, table 3-8, and vol. 3A §9.9; AMD APM vol. 3, appendix E. Floor: machine.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from kvmpy._shim import lib
from kvmpy.kvm.cpuid_entry import CpuidEntry

EXTENDED_TOPOLOGY = 0xB
V2_EXTENDED_TOPOLOGY = 0x1F
AMD_EXTENDED_TOPOLOGY = 0x8000_0026
REBUILT = (EXTENDED_TOPOLOGY, V2_EXTENDED_TOPOLOGY, AMD_EXTENDED_TOPOLOGY)
"""Leaves of which nothing that the host says is kept. The last stays away: a guest then reads 0xb."""

# Level types of 0xb and 0x1f
SMT_LEVEL, CORE_LEVEL = 1, 2

# Bits of leaf 1, and of 8000_0001 ECX
ECX_TSC_DEADLINE, ECX_HYPERVISOR = 24, 31
EDX_HTT = 28
ECX_CMP_LEGACY = 1

# Leaf 0: EBX, EDX, ECX spell the vendor.
AMD_VENDORS = (b"AuthenticAMD", b"HygonGenuine")


class _Place(NamedTuple):
    """A vCPU in its machine."""

    vcpu_id: int
    cores: int
    tsc_deadline: bool
    is_amd: bool


def apic_id_bits(cores: int) -> int:
    """Return how many bits of the APIC id number ``cores`` cores: 0 for one, 1 for two, 2 for three."""
    return (cores - 1).bit_length()


def cpuid_for(
    supported: Sequence[CpuidEntry], vcpu_id: int, cores: int, *, tsc_deadline: bool = False
) -> list[CpuidEntry]:
    """Return the CPUID table of vCPU ``vcpu_id`` out of ``cores``, made from what KVM supports.

    ``tsc_deadline``: the local APIC has the TSC-deadline timer (KVM_CAP_TSC_DEADLINE_TIMER, which is the word that
    counts, and an in-kernel irqchip).

    Raises:
        ValueError: ``vcpu_id`` is not one of the ``cores``.
    """
    if not 0 <= vcpu_id < cores:
        raise ValueError(f"vcpu_id={vcpu_id}: allowed is 0 to {cores - 1}")
    place = _Place(vcpu_id, cores, tsc_deadline, _vendor(supported) in AMD_VENDORS)
    entries = [_adjust(entry, place) for entry in supported if entry.function not in REBUILT]
    entries += _levels(EXTENDED_TOPOLOGY, place)
    if any(entry.function == V2_EXTENDED_TOPOLOGY for entry in supported):
        entries += _levels(V2_EXTENDED_TOPOLOGY, place)
    return entries


def _vendor(supported: Sequence[CpuidEntry]) -> bytes:
    for entry in supported:
        if entry.function == 0:
            return b"".join(register.to_bytes(4, "little") for register in (entry.ebx, entry.edx, entry.ecx))
    return b""


def _adjust(entry: CpuidEntry, place: _Place) -> CpuidEntry:
    """Return ``entry`` as vCPU ``place`` shall see it."""
    match entry.function:
        case 0:
            return entry.replace(eax=max(entry.eax, EXTENDED_TOPOLOGY))
        case 1:
            return _features(entry, place)
        case 4:
            return _cache(entry, place, package_cores=True)
        case 0x8000_001D:
            return _cache(entry, place, package_cores=False)
        case 0x8000_0001 if place.is_amd:
            return entry.replace(ecx=_bits(entry.ecx, ECX_CMP_LEGACY, ECX_CMP_LEGACY, place.cores > 1))
        case 0x8000_0008 if place.is_amd:
            ecx = _bits(entry.ecx, 7, 0, min(place.cores - 1, 0xFF))
            return entry.replace(ecx=_bits(ecx, 15, 12, apic_id_bits(place.cores)))
        case 0x8000_001E:
            # One thread a core: the core's number is the APIC id. One node, which is number 0.
            return entry.replace(eax=place.vcpu_id, ebx=place.vcpu_id & 0xFF, ecx=0, edx=0)
    return entry


def _features(entry: CpuidEntry, place: _Place) -> CpuidEntry:
    """Return leaf 1. The APIC id has 8 bits here: above 255 its low ones, and leaf 0xb has all."""
    ebx = _bits(entry.ebx, 31, 24, place.vcpu_id & 0xFF)
    ebx = _bits(ebx, 23, 16, min(place.cores, 0xFF))
    ecx = _bits(entry.ecx, ECX_HYPERVISOR, ECX_HYPERVISOR, 1)
    ecx = _bits(ecx, ECX_TSC_DEADLINE, ECX_TSC_DEADLINE, place.tsc_deadline)
    edx = _bits(entry.edx, EDX_HTT, EDX_HTT, place.cores > 1)
    return entry.replace(ebx=ebx, ecx=ecx, edx=edx)


def _cache(entry: CpuidEntry, place: _Place, *, package_cores: bool) -> CpuidEntry:
    """Return a cache of leaf 4 or 8000_001d: levels 1 and 2 are a core's own, all others the package's.

    Both fields count addressable ids, less one: powers of two, not cores.
    """
    cache_type, level = entry.eax & 0x1F, entry.eax >> 5 & 7
    if cache_type == 0:
        return entry
    others = (1 << apic_id_bits(place.cores)) - 1
    eax = _bits(entry.eax, 25, 14, 0 if level <= 2 else min(others, 0xFFF))
    if package_cores:
        eax = _bits(eax, 31, 26, min(others, 0x3F))
    return entry.replace(eax=eax)


def _levels(function: int, place: _Place) -> Iterator[CpuidEntry]:
    """Yield the two levels of leaf 0xb or 0x1f: threads of a core, cores of the package.

    EAX: by how much to shift the x2APIC id to number what is one level up. EBX: logical processors at this level.
    KVM itself answers for the levels above (type 0).
    """
    bits = apic_id_bits(place.cores)
    for index, (level, shift, count) in enumerate(((SMT_LEVEL, 0, 1), (CORE_LEVEL, bits, place.cores))):
        ecx = level << 8 | index
        yield CpuidEntry(
            function, index, lib.KVM_CPUID_FLAG_SIGNIFCANT_INDEX, shift, count & 0xFFFF, ecx, place.vcpu_id
        )


def _bits(register: int, high: int, low: int, value: int) -> int:
    """Return ``register`` with bits [high:low], as the manuals write them, set to ``value``."""
    mask = (1 << high - low + 1) - 1
    return register & ~(mask << low) | (value & mask) << low

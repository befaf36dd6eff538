"""CPUID tables for each vCPU, made from made-up hosts and read back by the manuals' own algorithms."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmpy._shim import lib
from kvmpy.kvm.cpuid_entry import CpuidEntry
from kvmpy.machine.cpuid import apic_id_bits, cpuid_for

INDEXED = lib.KVM_CPUID_FLAG_SIGNIFCANT_INDEX
WORD = st.integers(0, 0xFFFF_FFFF)
CORES = st.integers(1, 1024) | st.sampled_from([1, 2, 3, 4, 255, 256, 257, 1024])
VENDORS = {"intel": b"GenuineIntel", "amd": b"AuthenticAMD", "hygon": b"HygonGenuine"}


def plain(function: int, registers: tuple[int, int, int, int]) -> CpuidEntry:
    return CpuidEntry(function, 0, 0, *registers)


def vendor_leaf(maximum: int, vendor: bytes) -> CpuidEntry:
    ebx, edx, ecx = (int.from_bytes(vendor[i : i + 4], "little") for i in (0, 4, 8))
    return plain(0, (maximum, ebx, ecx, edx))


@st.composite
def caches(draw: st.DrawFn, function: int) -> list[CpuidEntry]:
    """L1d, L1i, L2, L3 and the end, with a host's sharing that must not shine through."""
    rows = []
    for index, (kind, level) in enumerate(((1, 1), (2, 1), (3, 2), (3, 3), (0, 0))):
        eax = draw(WORD) & ~0xFF | level << 5 | kind if kind else 0
        rows.append(CpuidEntry(function, index, INDEXED, eax, draw(WORD), draw(WORD), draw(WORD)))
    return rows


@st.composite
def indexed(draw: st.DrawFn, function: int) -> list[CpuidEntry]:
    count = draw(st.integers(1, 3))
    return [CpuidEntry(function, i, INDEXED, *draw(st.tuples(WORD, WORD, WORD, WORD))) for i in range(count)]


@st.composite
def hosts(draw: st.DrawFn, kinds: Sequence[str] = ("intel", "amd", "hygon")) -> list[CpuidEntry]:
    """What KVM_GET_SUPPORTED_CPUID may return on some host."""
    kind = draw(st.sampled_from(kinds))
    words = st.tuples(WORD, WORD, WORD, WORD)
    table = [vendor_leaf(draw(st.sampled_from([1, 4, 7, 0xD, 0x16, 0x1F])), VENDORS[kind])]
    table += [plain(function, draw(words)) for function in (1, 2, 6, 7, 0xA, 0x15, 0x16)]
    for function in (0xB, 0x1F):
        table += draw(st.just([]) | indexed(function))
    table += [plain(function, draw(words)) for function in (0x4000_0000, 0x4000_0001, 0x8000_0000)]
    table += [plain(function, draw(words)) for function in (0x8000_0001, 0x8000_0008)]
    if kind == "intel":
        return table + draw(st.just([]) | caches(4))
    table += draw(st.just([]) | caches(0x8000_001D))
    table += draw(st.just([]) | st.just([plain(0x8000_001E, draw(words))]))
    return table + draw(st.just([]) | indexed(0x8000_0026))


def leaf(table: Sequence[CpuidEntry], function: int, index: int = 0) -> CpuidEntry:
    (found,) = (entry for entry in table if (entry.function, entry.index) == (function, index))
    return found


def functions(table: Sequence[CpuidEntry]) -> set[int]:
    return {entry.function for entry in table}


@settings(deadline=None, max_examples=25)
@given(hosts(), CORES)
def test_every_vcpu_has_an_x2apic_id_of_its_own(supported: list[CpuidEntry], cores: int) -> None:
    """SDM vol. 2A, CPUID leaf 0BH: EDX is the 32-bit x2APIC id; KVM makes it the vcpu_id."""
    ids = [leaf(cpuid_for(supported, vcpu_id, cores), 0xB).edx for vcpu_id in range(cores)]
    assert ids == list(range(cores))


@settings(deadline=None, max_examples=100)
@given(hosts(), CORES, st.data())
def test_levels_number_one_package_of_single_threaded_cores(
    supported: list[CpuidEntry], cores: int, data: st.DataObject
) -> None:
    """SDM vol. 2A, leaves 0BH and 1FH: level numbers, types, shifts and counts; EDX the same in each."""
    vcpu_id = data.draw(st.integers(0, cores - 1))
    table = cpuid_for(supported, vcpu_id, cores)
    for function in functions(table) & {0xB, 0x1F}:
        threads, package = leaf(table, function, 0), leaf(table, function, 1)
        assert (threads.eax, threads.ebx, threads.ecx) == (0, 1, 0x100)
        assert (package.ebx, package.ecx) == (cores, 0x201)
        assert threads.edx == package.edx == vcpu_id
        assert threads.flags == package.flags == INDEXED
        assert vcpu_id >> package.eax == 0
        assert package.eax == 0 or (cores - 1) >> (package.eax - 1) == 1
        assert not any(entry.index > 1 for entry in table if entry.function == function)


@settings(deadline=None, max_examples=100)
@given(hosts(), CORES, st.data())
def test_no_entry_is_doubled_and_few_are_added(supported: list[CpuidEntry], cores: int, data: st.DataObject) -> None:
    """KVM API §4.20: an entry is found by function and index; the table has room for what the host supports."""
    table = cpuid_for(supported, data.draw(st.integers(0, cores - 1)), cores)
    keys = [(entry.function, entry.index) for entry in table]
    assert len(set(keys)) == len(keys) <= len(supported) + 4
    assert functions(supported) - {0x8000_0026} | {0xB} == functions(table)
    assert all(0 <= value < 1 << 32 for entry in table for value in (entry.eax, entry.ebx, entry.ecx, entry.edx))


@settings(deadline=None, max_examples=100)
@given(hosts(), CORES, st.booleans(), st.data())
def test_leaf_1_places_the_vcpu_and_keeps_the_rest(
    supported: list[CpuidEntry], cores: int, tsc_deadline: bool, data: st.DataObject
) -> None:
    """SDM vol. 2A, leaf 01H: EBX[31:24], EBX[23:16], EDX[28]; ECX[24] and ECX[31] as the machine has them."""
    vcpu_id = data.draw(st.integers(0, cores - 1))
    before = leaf(supported, 1)
    after = leaf(cpuid_for(supported, vcpu_id, cores, tsc_deadline=tsc_deadline), 1)
    assert after.ebx >> 24 == vcpu_id % 256
    assert after.ebx >> 16 & 0xFF == min(cores, 255)
    assert after.edx >> 28 & 1 == (cores > 1)
    assert (after.ecx >> 24 & 1, after.ecx >> 31) == (tsc_deadline, 1)
    changed = ((before.ebx ^ after.ebx) & 0xFFFF, (before.ecx ^ after.ecx) & ~(1 << 24 | 1 << 31))
    assert (before.eax ^ after.eax, *changed, (before.edx ^ after.edx) & ~(1 << 28)) == (0, 0, 0, 0)


@settings(deadline=None, max_examples=60)
@given(hosts(), CORES)
def test_leaf_0_reaches_the_topology_leaf(supported: list[CpuidEntry], cores: int) -> None:
    """SDM vol. 2A, leaf 00H: EAX is the highest basic leaf; one that is higher already stays."""
    before, after = leaf(supported, 0), leaf(cpuid_for(supported, 0, cores), 0)
    assert after.eax == max(before.eax, 0xB)
    assert (after.ebx, after.ecx, after.edx) == (before.ebx, before.ecx, before.edx)


@settings(deadline=None, max_examples=60)
@given(hosts(["intel"]), CORES, st.data())
def test_intel_caches_agree_with_the_levels(supported: list[CpuidEntry], cores: int, data: st.DataObject) -> None:
    """SDM vol. 2A, leaf 04H: EAX[25:14] and EAX[31:26] are ids less one; L1 and L2 a core's own, L3 the package's."""
    table = cpuid_for(supported, data.draw(st.integers(0, cores - 1)), cores)
    ids = 1 << leaf(table, 0xB, 1).eax
    for after in (entry for entry in table if entry.function == 4):
        before = leaf(supported, 4, after.index)
        assert (after.ebx, after.ecx, after.edx) == (before.ebx, before.ecx, before.edx)
        assert after.eax & 0x3FFF == before.eax & 0x3FFF
        if after.eax & 0x1F == 0:
            assert after == before
            continue
        shared_by = (after.eax >> 14 & 0xFFF) + 1
        assert shared_by == (1 if after.eax >> 5 & 7 <= 2 else ids)
        assert (after.eax >> 26) + 1 == min(ids, 64)


@settings(deadline=None, max_examples=60)
@given(hosts(["amd", "hygon"]), CORES, st.data())
def test_amd_leaves_agree_with_the_levels(supported: list[CpuidEntry], cores: int, data: st.DataObject) -> None:
    """APM vol. 3 §E.4: CmpLegacy, NC and ApicIdSize, NumSharingCache, ExtendedApicId, CoreId, one node."""
    vcpu_id = data.draw(st.integers(0, cores - 1))
    table = cpuid_for(supported, vcpu_id, cores)
    assert leaf(table, 0x8000_0001).ecx >> 1 & 1 == (cores > 1)
    size = leaf(table, 0x8000_0008)
    apic_id_size = size.ecx >> 12 & 0xF
    assert size.ecx & 0xFF == min(cores - 1, 255)
    assert apic_id_size == leaf(table, 0xB, 1).eax == apic_id_bits(cores)
    assert size.ecx & 0xFFFF_0F00 == leaf(supported, 0x8000_0008).ecx & 0xFFFF_0F00
    if 0x8000_001E in functions(table):
        place = leaf(table, 0x8000_001E)
        assert (place.eax, place.ebx & 0xFF, place.ebx >> 8, place.ecx) == (vcpu_id, vcpu_id % 256, 0, 0)
    for after in (entry for entry in table if entry.function == 0x8000_001D and entry.eax & 0x1F):
        before = leaf(supported, 0x8000_001D, after.index)
        assert (after.eax >> 14 & 0xFFF) + 1 == (1 if after.eax >> 5 & 7 <= 2 else 1 << apic_id_size)
        assert after.eax & 0xFC00_3FFF == before.eax & 0xFC00_3FFF


@settings(deadline=None, max_examples=60)
@given(hosts(["intel"]), CORES)
def test_intel_reserved_bits_stay_reserved(supported: list[CpuidEntry], cores: int) -> None:
    """SDM vol. 2A, leaves 80000001H and 80000008H: what AMD defines there is not Intel's."""
    table = cpuid_for(supported, 0, cores)
    for function in (0x8000_0001, 0x8000_0008):
        assert leaf(table, function) == leaf(supported, function)


@settings(deadline=None, max_examples=60)
@given(hosts(), CORES)
def test_leaves_that_say_nothing_of_topology_stay(supported: list[CpuidEntry], cores: int) -> None:
    """KVM API §4.46: what KVM reports is what it can do; leaves 6, 0xa, 0x15, 0x16 and 0x4000_0000 are as given."""
    table = cpuid_for(supported, cores - 1, cores)
    for function in (2, 6, 7, 0xA, 0x15, 0x16, 0x4000_0000, 0x4000_0001, 0x8000_0000):
        assert leaf(table, function) == leaf(supported, function)


@settings(deadline=None, max_examples=60)
@given(hosts(), CORES)
def test_vcpus_differ_in_their_ids_alone(supported: list[CpuidEntry], cores: int) -> None:
    """SDM vol. 3A §9.9: processors of one package report the same but for their APIC ids."""
    first, last = cpuid_for(supported, 0, cores), cpuid_for(supported, cores - 1, cores)
    differing = {a.function for a, b in zip(first, last, strict=True) if a != b}
    assert differing <= {1, 0xB, 0x1F, 0x8000_001E}


def test_apic_id_bits_number_every_core() -> None:
    """SDM vol. 3A §9.9.5: the width of a field is the ceiling of the binary logarithm."""
    widths = {1: 0, 2: 1, 3: 2, 4: 2, 5: 3, 255: 8, 256: 8, 257: 9, 1024: 10}
    assert {cores: apic_id_bits(cores) for cores in widths} == widths


@pytest.mark.parametrize(("vcpu_id", "cores"), [(-1, 1), (1, 1), (0, 0), (1024, 1024)])
def test_vcpu_outside_the_machine_is_refused(vcpu_id: int, cores: int) -> None:
    """A vCPU is one of its machine's."""
    with pytest.raises(ValueError, match=f"vcpu_id={vcpu_id}"):
        cpuid_for([], vcpu_id, cores)


def test_empty_table_gets_its_topology_leaf() -> None:
    """A host that reports nothing: no leaf is invented but 0xb."""
    assert functions(cpuid_for([], 0, 1)) == {0xB}

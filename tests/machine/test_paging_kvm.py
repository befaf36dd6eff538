"""The page walker against KVM: KVM_TRANSLATE, and the page faults that guests take at CPL 0 and CPL 3."""

import random
from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

import pytest
from page_tables import FIRST_TABLE, NXE, PG, PS, RW, SMAP, SMEP, US, WP, XD, P, Tables

from kvmpy import Kvm
from kvmpy.errors import GuestMemoryError, KvmError
from kvmpy.kvm import Vcpu
from kvmpy.machine import x86
from kvmpy.machine.paging import PageFault, Paging, translate
from kvmpy.machine.probe.bench import FINISH, Bench, Done, Mode, Trap, finish

pytestmark = pytest.mark.kvm

AC = 1 << 18
LINEAR = 1 << 39 | 0x20_123
"""Entry 1 of the PML4, entry 0x20 of the page table; the page is where a large one would have it too."""

# Entry 0 of the PML4: supervisor pages 1:1, which CPL 0 runs in, and the same memory for CPL 3, 2 MiB up.
CODE_PDPT, CODE_PD = 0x16_000, 0x17_000
USER_ALIAS = 0x20_0000

VCPUS = 24
"""So many vCPUs a VM gets, one after the other: hosts have limits."""


@pytest.fixture
def bench(kvm: Kvm) -> Iterator[Bench]:
    with Bench(kvm) as bench:
        yield bench


def width(bench: Bench) -> int:
    """MAXPHYADDR of the guest (CPUID 0x80000008)."""
    return next((entry.eax & 0xFF for entry in bench.cpuid if entry.function == 0x8000_0008), 36)


def registers(vcpu: Vcpu, max_phys_addr: int) -> Paging:
    sregs = vcpu.get_sregs()
    return Paging(sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer, vcpu.get_regs().rflags, max_phys_addr)


def load(vcpu: Vcpu, paging: Paging) -> bool:
    """Put ``paging`` into the vCPU; False where this host does not take all of it."""
    sregs = vcpu.get_sregs()
    sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = paging.cr0, paging.cr3, paging.cr4, paging.efer
    if paging.efer & x86.EFER_LMA:
        sregs.efer |= x86.EFER_LME
    else:
        sregs.cs.l, sregs.cs.db = 0, 1
    try:
        vcpu.set_sregs(sregs)
    except KvmError:
        return False
    sregs = vcpu.get_sregs()
    return (sregs.cr0 & PG, sregs.cr4) == (PG, paging.cr4)


# --- KVM_TRANSLATE ------------------------------------------------------------------------------------------------


def random_tables(rng: random.Random, bench: Bench, mode: str) -> Tables:
    """Return a path with rights, reserved and missing bits by chance, and now and then a table outside RAM."""
    linear = rng.getrandbits(46 if mode == "4-level" else 32)
    made = Tables(bench.memory, mode, linear, leaf=rng.choice((1, 1, 2)))
    if made.leaf == 2:
        made.page = 0x40_0000
    made.write()
    for level in range(made.leaf, made.levels + 1):
        if (mode, level) != ("PAE", 3) and rng.random() < 0.3:
            at = rng.choice((0, 1, 2, 3, 6, 7, 8, 12, 13, 20, 21, 22, 30, 31, 45, 48, 51, 52, 62, 63))
            made.set(level, made.entry(level) ^ 1 << at % (8 * made.entry_size))
    return made


def read_by_supervisor(bench: Bench, paging: Paging, linear: int) -> int | None:
    try:
        return translate(bench.memory, paging, linear)
    except (PageFault, GuestMemoryError):
        return None


@pytest.mark.parametrize("mode", ["32-bit", "PAE", "4-level", "5-level"])
def test_kvm_translate_says_the_same(bench: Bench, mode: str) -> None:
    """KVM_TRANSLATE is a read by the supervisor: the same address, or none where we have a fault. KVM API §4.17."""
    rng = random.Random(11)
    vcpu = bench.start(b"", Mode.CPL0)
    none = some = 0
    for _ in range(400):
        made = random_tables(rng, bench, mode)
        paging = made.paging(efer=rng.choice((0, NXE)), width=width(bench))
        if not load(vcpu, paging):
            pytest.skip(f"this host has no {mode} paging")
        for linear in (made.linear, made.linear ^ 0x123, made.linear ^ 1 << 21, made.linear ^ 1 << 12):
            theirs = vcpu.translate(linear)
            ours = read_by_supervisor(bench, registers(vcpu, width(bench)), linear)
            assert ours == (theirs.physical_address if theirs.valid else None), (made, hex(linear), made.entries())
            none, some = none + (ours is None), some + (ours is not None)
    assert min(none, some) > 100


# --- faults that guests take --------------------------------------------------------------------------------------

ALL = P | RW | US
PATHS: dict[str, dict[int, int]] = {
    "all rights": {},
    "read-only page": {1: P | US},
    "read-only table": {3: P | US},
    "supervisor page": {1: P | RW},
    "supervisor table": {4: P | RW},
    "read-only supervisor page": {1: P},
    "no page": {1: 0},
    "no page, but all other bits": {1: ALL & ~P},
    "no table": {2: 0},
    "no PDPT": {4: 0},
    "XD page": {1: ALL | XD},
    "XD table": {3: ALL | XD},
    "reserved bit in the page": {1: ALL | 1 << 51},
    "reserved bit in a table, no page": {2: ALL | 1 << 51, 1: 0},
    "PS in the PML4": {4: ALL | PS},
    "reserved bit of a large page": {2: ALL | 1 << 13},
}
ACCESSES = {
    "read": b"\x8a\x03",
    "write": b"\x88\x03",
    "fetch": b"\xff\xe3",
}  # mov (%rbx), %al; mov %al, (%rbx); jmp *%rbx


class Case(NamedTuple):
    """How a guest accesses LINEAR."""

    path: str
    access: str
    user: bool
    cr0: int
    cr4: int
    efer: int
    rflags: int


def prepare(bench: Bench, path: str) -> Tables:
    """Write the tables of ``path``, and those that the guest's own code needs."""
    bits = PATHS[path]
    large = path == "reserved bit of a large page"
    made = Tables(
        bench.memory, "4-level", LINEAR, bits=bits, leaf=2 if large else 1, page=0 if large else 0x20_000
    ).write()
    for gpa, entries in (
        (FIRST_TABLE + 0x4000, [CODE_PDPT | ALL]),
        (CODE_PDPT, [CODE_PD | ALL]),
        (CODE_PD, [P | RW | PS, ALL | PS]),
    ):
        bench.memory.write(gpa, b"".join(entry.to_bytes(8, "little") for entry in entries))
    bench.memory.write(0x20_123, FINISH)
    # We write tables as no guest does, unseen by KVM, which may have their shadows: a new slot ends all of these.
    bench.vm.delete_user_memory_region(0)
    bench.memory.map_into(bench.vm)
    return made


def start(bench: Bench, case: Case, made: Tables) -> Vcpu | None:
    """Return a vCPU before the access, or None where the processor has not what the case needs."""
    vcpu = bench.start(ACCESSES[case.access], Mode.CPL3 if case.user else Mode.CPL0, rbx=LINEAR)
    sregs = vcpu.get_sregs()
    cr4 = sregs.cr4 | case.cr4
    wanted = made.paging(cr0=sregs.cr0 & ~WP | case.cr0, cr4=cr4, efer=sregs.efer & ~NXE | case.efer)
    if not load(vcpu, wanted):
        vcpu.close()
        return None
    with vcpu.edit_regs() as regs:
        regs.rflags |= case.rflags
        if case.user:
            regs.rip += USER_ALIAS
    return vcpu


def what_happens(vcpu: Vcpu, bench: Bench) -> tuple[int, int] | None:
    """Run to the guest's end and return (CR2, error code) of its page fault; None if it had none."""
    outcome = finish(vcpu)
    if isinstance(outcome, Done):
        return None
    assert isinstance(outcome, Trap), outcome
    assert (outcome.vector, outcome.cpl) == (14, 0)
    # The handler has pushed nothing: the error code is on the top of its stack (Intel SDM vol. 3, figure 6-9).
    error_code = bench.memory.read(vcpu.get_regs().rsp, 4)
    return vcpu.get_sregs().cr2, int.from_bytes(error_code, "little")


def what_we_say(bench: Bench, case: Case, paging: Paging) -> tuple[int, int] | None:
    try:
        access = {"write": case.access == "write", "fetch": case.access == "fetch", "user": case.user}
        translate(bench.memory, paging, LINEAR, **access)
    except PageFault as fault:
        return fault.address, fault.error_code
    return None


def compare(kvm: Kvm, cases: Sequence[Case]) -> int:
    """Run each case, compare with `translate`, and return how many there were."""
    return sum(compare_in(kvm, cases[at : at + VCPUS]) for at in range(0, len(cases), VCPUS))


def compare_in(kvm: Kvm, cases: Sequence[Case]) -> int:
    """The same for a few cases, one VM for all, one vCPU each."""
    compared = 0
    with Bench(kvm) as bench:
        for case in cases:
            made = prepare(bench, case.path)
            vcpu = start(bench, case, made)
            if vcpu is None:
                continue
            paging = registers(vcpu, width(bench))
            theirs, after = what_happens(vcpu, bench), made.entries()
            vcpu.close()
            prepare(bench, case.path)
            ours = what_we_say(bench, case, paging)
            assert ours == theirs, case
            if ours is None:  # what a processor marks on the way to a fault, it may choose
                assert made.entries() == after, case
            compared += 1
    return compared


def test_guests_take_the_faults_that_we_say(kvm: Kvm) -> None:
    """Each access at each privilege level with each kind of entry: CR2, error code, and the bits A and D."""
    cases = [Case(path, access, user, WP, 0, NXE, 0) for path, access, user in product(PATHS, ACCESSES, (False, True))]
    assert compare(kvm, cases) == len(cases)


def test_the_supervisor_writes_where_it_pleases_without_wp(kvm: Kvm) -> None:
    """CR0.WP = 0: R/W does not count at CPL 0, and the page gets dirty."""
    paths = ("all rights", "read-only page", "read-only table", "read-only supervisor page")
    cases = [Case(path, "write", user, 0, 0, NXE, 0) for path, user in product(paths, (False, True))]
    assert compare(kvm, cases) == len(cases)


def test_xd_is_reserved_without_nxe(kvm: Kvm) -> None:
    """EFER.NXE = 0: any access faults with RSVD, and no error code has I/D."""
    paths = ("all rights", "XD page", "XD table", "supervisor page", "no page")
    cases = [Case(path, access, user, WP, 0, 0, 0) for path, access, user in product(paths, ACCESSES, (False, True))]
    assert compare(kvm, cases) == len(cases)


@pytest.mark.parametrize("bit", [SMEP, SMAP])
@pytest.mark.parametrize("efer", [0, NXE])
def test_smep_and_smap_keep_the_supervisor_out_of_user_pages(kvm: Kvm, bit: int, efer: int) -> None:
    """SMEP for fetches, SMAP for data while RFLAGS.AC is 0. A processor without them compares nothing."""
    paths = ("all rights", "read-only page", "supervisor page", "supervisor table", "no page")
    accesses = product(paths, ACCESSES, (False, True), (0, AC))
    cases = [Case(path, access, user, WP, bit, efer, ac) for path, access, user, ac in accesses]
    assert compare(kvm, cases) in (0, len(cases))

"""Probes of memory slots: read-only, dirty log, huge pages; and of what KVM counts.

Source: KVM API §4.35 (slots), §4.8 (dirty log), §4.133 (statistics).
"""

from collections.abc import Iterator
from contextlib import contextmanager

from kvmpy._shim import lib
from kvmpy.kvm import MmioWrite
from kvmpy.machine.memory import HUGE_PAGE_SIZE, MINIMUM_SIZE, GuestMemory
from kvmpy.machine.probe.bench import Bench, Ended, Mode, describe, finish
from kvmpy.machine.probe.finding import Ability, Verdict
from kvmpy.machine.probe.judge import Judgement, Probe
from kvmpy.units import PAGE_SIZE, MiB

SLOT = 8
SLOT_GPA = 4 * MiB
NOWHERE_GPA = 12 * MiB
"""Mapped by the guest's page tables, and no RAM there."""

LOAD_AND_STORE = bytes.fromhex(
    "8b07"  # mov (%rdi), %eax
    "8907"  # mov %eax, (%rdi)
)
STORE = bytes.fromhex(
    "c707 5a000000"  # movl $0x5a, (%rdi)
)
EXIT_STATS = ("exits", "io_exits", "mmio_exits")
EXITS_MADE = 2  # the store to nowhere, and the report that each guest ends with


@contextmanager
def slot(bench: Bench, memory: GuestMemory, flags: int = 0) -> Iterator[GuestMemory]:
    """Give the bench one slot more for the length of the block, and close ``memory`` after it."""
    with memory:
        bench.vm.set_user_memory_region(slot=SLOT, guest_phys_addr=SLOT_GPA, memory=memory, flags=flags)
        try:
            yield memory
        finally:
            bench.vm.delete_user_memory_region(SLOT)


def readonly_slot(bench: Bench) -> Judgement:
    """Judge a slot that the guest reads as RAM and writes as MMIO."""
    word = b"\x5a\x01\x02\x03"
    with slot(bench, GuestMemory(MINIMUM_SIZE), lib.KVM_MEM_READONLY) as memory:
        memory.write(0, word)
        outcome = bench.run(LOAD_AND_STORE, rdi=SLOT_GPA)
    if outcome == Ended(MmioWrite(SLOT_GPA, word)):
        return Verdict.OK, ""
    return Verdict.BROKEN, "the write gives no MmioWrite: the guest " + describe(outcome)


def dirty_log(bench: Bench) -> Judgement:
    """Judge whether the log names exactly the page that was written."""
    page = 3
    with slot(bench, GuestMemory(MINIMUM_SIZE), lib.KVM_MEM_LOG_DIRTY_PAGES):
        bench.run(STORE, rdi=SLOT_GPA + page * PAGE_SIZE)
        logged = int.from_bytes(bench.vm.get_dirty_log(SLOT), "little")
    if logged == 1 << page:
        return Verdict.OK, ""
    return Verdict.BROKEN, f"page {page} was written, the log says 0x{logged:x}"


def huge_pages(bench: Bench) -> Judgement:
    """Judge whether guest memory on huge pages reaches the guest as pages of 2 MiB."""
    before = bench.vm.get_stats().get("pages_2m")
    if before is None:
        return Verdict.UNKNOWN, "this KVM does not count pages_2m"
    with slot(bench, GuestMemory(HUGE_PAGE_SIZE, hugepages=True)) as memory:
        bench.run(STORE, Mode.CPL3, rdi=SLOT_GPA + PAGE_SIZE)
        gained = bench.vm.get_stats()["pages_2m"] - before
        backing = memory.backing
    if gained > 0:
        return Verdict.OK, backing
    return Verdict.MISSING, f"{backing}, but the guest got pages of 4 KiB"


def exit_stats(bench: Bench) -> Judgement:
    """Judge whether KVM's own counters of exits count."""
    with bench.start(STORE, rdi=NOWHERE_GPA) as vcpu:
        finish(vcpu)
        finish(vcpu)
        stats = vcpu.get_stats()
    dead = [name for name in EXIT_STATS if name in stats and stats[name] == 0]
    if dead:
        return Verdict.BROKEN, f"stay 0 after {EXITS_MADE} exits: {', '.join(dead)}"
    return Verdict.OK, ""


PROBES = (
    Probe(Ability.READONLY_SLOT, readonly_slot, "keep ROM in ordinary RAM, and trust the guest not to write it"),
    Probe(Ability.DIRTY_LOG, dirty_log, "compare memory to find what changed"),
    Probe(
        Ability.HUGE_PAGES,
        huge_pages,
        "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled",
    ),
    Probe(Ability.EXIT_STATS, exit_stats, "let kvmpy count: run --stats"),
)

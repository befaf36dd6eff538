"""A string instruction finished by us leaves what KVM would have left: memory, registers, rights, and the fault."""

import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest

from kvmpy import Kvm
from kvmpy._shim import ffi, lib
from kvmpy.kvm import Debug, Vcpu
from kvmpy.machine import paging, x86
from kvmpy.machine.assist import Assist, strings
from kvmpy.machine.assist.strings import INSTRUCTIONS, StringAssist, StringInstruction
from kvmpy.machine.guest_debug import GuestDebug
from kvmpy.machine.memory import GuestMemory
from kvmpy.machine.probe import tables
from kvmpy.machine.probe.bench import Bench, Mode, finish
from kvmpy.units import PAGE_SIZE, MiB

pytestmark = pytest.mark.kvm

WINDOW = 2 * MiB
"""Linear address of sixteen pages that a table of 4 KiB pages maps; what is behind them is absent."""
PAGES = 16
TABLE = 0x13000
FRAMES = 0x80000
READ_ONLY = (6, 11)
ABSENT = 13
DEVICE = 14
NO_RAM = 0x0F00_0000
DF = 1 << 10


class Left(NamedTuple):
    """What a guest left: its registers, how it ended, and the pages of the window."""

    outcome: object
    registers: tuple[int, ...]
    memory: bytes
    marks: tuple[int, ...]


@pytest.fixture
def bench() -> Iterator[Bench]:
    """A VM with the window in its page tables."""
    with Kvm() as kvm, Bench(kvm) as bench:
        yield bench


def lay_out(memory: GuestMemory, seed: int) -> None:
    """Write the window's table, and known bytes into its pages."""
    flags = x86.PRESENT | x86.WRITABLE
    memory.write(tables.PAGES_64 + 0x2008, (TABLE | flags).to_bytes(8, "little"))
    memory.fill(TABLE, PAGE_SIZE)
    for page in range(PAGES):
        frame = NO_RAM if page == DEVICE else FRAMES + page * PAGE_SIZE
        entry = frame | (x86.PRESENT if page in READ_ONLY else flags)
        if page != ABSENT:
            memory.write(TABLE + 8 * page, entry.to_bytes(8, "little"))
    memory.write(FRAMES, random.Random(seed).randbytes(PAGES * PAGE_SIZE))


def run(bench: Bench, instruction: StringInstruction, seed: int, *, assisted: bool, **registers: int) -> Left:
    """Run one instruction to its end, with the help of a look before it or without."""
    lay_out(bench.memory, seed)
    with bench.start(instruction.code, Mode.CPL0, **registers) as vcpu:
        if assisted:
            StringAssist(vcpu, bench.memory, GuestDebug(vcpu)).look()
            vcpu.set_deadline(None)
        outcome = finish(vcpu)
        regs = vcpu.get_regs()
        values = tuple(int(getattr(regs, name)) for name in ("rcx", "rdi", "rsi", "rbx", "rdx"))
        memory = bench.memory.read(FRAMES, PAGES * PAGE_SIZE)
        used = paging.ACCESSED | paging.DIRTY
        marks = [bench.memory.read(TABLE + 8 * page, 1)[0] & used for page in range(PAGES)]
    return Left(str(outcome), values, memory, tuple(marks))


@pytest.mark.parametrize("instruction", INSTRUCTIONS, ids=lambda i: i.code.hex())
def test_finished_instruction_leaves_what_kvm_leaves(bench: Bench, instruction: StringInstruction) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    choose = random.Random(seed)
    for _ in range(25):
        registers = {
            "rdi": WINDOW + choose.randrange(0, 12 * PAGE_SIZE),
            "rsi": WINDOW + choose.randrange(0, 12 * PAGE_SIZE),
            "rcx": choose.choice((0, 1, 63, 64, 65, 200, choose.randrange(1, 3000))),
            "rax": choose.choice((0, 0x5A5A_5A5A_5A5A_5A5A, 0x0102_0304_0506_0708)),
        }
        mine, kvms = (run(bench, instruction, seed, assisted=assisted, **registers) for assisted in (True, False))
        assert mine == kvms, registers


@pytest.mark.parametrize("page", [*READ_ONLY, ABSENT])
def test_page_without_the_right_faults_where_kvm_faults(bench: Bench, page: int) -> None:
    start = WINDOW + page * PAGE_SIZE - 200
    registers = {"rdi": start, "rcx": 1000, "rax": 0x77}
    mine, kvms = (run(bench, INSTRUCTIONS[0], 1, assisted=assisted, **registers) for assisted in (True, False))
    assert mine == kvms
    assert mine.registers[:2] == (800, WINDOW + page * PAGE_SIZE)
    assert "Trap(vector=14" in str(mine.outcome)


def test_device_is_left_to_kvm(bench: Bench) -> None:
    lay_out(bench.memory, 1)
    with bench.start(INSTRUCTIONS[0].code, Mode.CPL0, rdi=WINDOW + DEVICE * PAGE_SIZE, rcx=100) as vcpu:
        assist = StringAssist(vcpu, bench.memory, GuestDebug(vcpu))
        assist.look()
        assert assist.finished == 0
        assert vcpu.get_regs().rcx == 100


@pytest.mark.parametrize("levels", [4, 5])
def test_page_table_is_found_among_all_that_cr3_leads_to(bench: Bench, levels: int) -> None:
    lay_out(bench.memory, 1)
    memory = bench.memory
    top = tables.PAGES_64
    if levels == 5:
        top = 0x14000
        memory.write(top, (tables.PAGES_64 | 3).to_bytes(8, "little"))
    in_use = {top, *(tables.PAGES_64 + at for at in (0, 0x1000, 0x2000)), TABLE}
    found = {
        gpa for gpa in range(0, tables.RAM_SIZE, PAGE_SIZE) if lib.kvmpy_is_table(memory.table, top, levels, gpa + 8)
    }
    assert found == in_use


def test_search_for_page_tables_is_bounded(bench: Bench) -> None:
    """A table whose entries all lead to itself: too many to tell."""
    bench.memory.write(0x14000, (0x14000 | 3).to_bytes(8, "little") * 512)
    assert lib.kvmpy_is_table(bench.memory.table, 0x14000, 5, 0x15000)
    assert not lib.kvmpy_is_table(bench.memory.table, 1 << 40, 4, 0x15000)


def test_page_table_is_left_to_kvm_which_keeps_a_shadow_of_it(bench: Bench) -> None:
    lay_out(bench.memory, 1)
    bench.memory.write(TABLE, (TABLE | 3).to_bytes(8, "little"))
    with bench.start(INSTRUCTIONS[2].code, Mode.CPL0, rdi=WINDOW + 256, rcx=400) as vcpu:
        assist = StringAssist(vcpu, bench.memory, GuestDebug(vcpu))
        assist.look()
        assert assist.finished == 0


def test_two_instructions_have_a_breakpoint_each(bench: Bench) -> None:
    lay_out(bench.memory, 1)
    debug_exits = []
    code = INSTRUCTIONS[0].code * 3
    sites = [tables.CODE + 2 * i for i in range(3)]
    with bench.start(code, Mode.CPL0) as vcpu:
        debug = GuestDebug(vcpu)
        for slot, site in enumerate(sites, 1):
            debug.set_breakpoint(slot, site)
        for slot, site in enumerate(sites, 1):
            exit = vcpu.next_exit()
            assert isinstance(exit, Debug)
            debug_exits.append(exit.pc)
            debug.set_breakpoint(slot, None)
            assert debug.breakpoint(slot) is None
            assert site == exit.pc
    assert debug_exits == sites


def test_direction_down_is_left_to_kvm(bench: Bench) -> None:
    flags = {"rflags": 2 | DF, "rdi": WINDOW + 5000, "rcx": 500}
    mine, kvms = (run(bench, INSTRUCTIONS[0], 2, assisted=assisted, **flags) for assisted in (True, False))
    assert mine == kvms


def test_overlap_that_repeats_a_pattern_is_left_to_kvm(bench: Bench) -> None:
    registers = {"rsi": WINDOW, "rdi": WINDOW + 3, "rcx": 2000}
    mine, kvms = (run(bench, INSTRUCTIONS[3], 3, assisted=assisted, **registers) for assisted in (True, False))
    assert mine == kvms


def test_endless_count_is_bounded(bench: Bench) -> None:
    lay_out(bench.memory, 1)
    memory = bench.memory
    for page in range(512):  # a gigabyte of one frame
        memory.write(TABLE + 8 * page, (FRAMES | 3).to_bytes(8, "little"))
        memory.write(tables.PAGES_64 + 0x2000 + 8 * max(page, 1), (TABLE | 3).to_bytes(8, "little"))
    with bench.start(INSTRUCTIONS[0].code, Mode.CPL0, rdi=WINDOW, rcx=(1 << 64) - 1) as vcpu:
        StringAssist(vcpu, memory, GuestDebug(vcpu)).look()
        done = (1 << 64) - 1 - int(vcpu.get_regs().rcx)
        assert 0 < done <= strings.MOST_PAGES * PAGE_SIZE


@pytest.mark.parametrize("mode", [Mode.CPL3, Mode.PROTECTED])
def test_only_ring_0_of_long_mode_is_finished(bench: Bench, mode: Mode) -> None:
    with bench.start(INSTRUCTIONS[0].code, mode, rdi=FRAMES, rcx=500) as vcpu:
        assist = StringAssist(vcpu, bench.memory, GuestDebug(vcpu))
        assist.look()
        assert assist.finished == 0


def test_exception_on_its_way_is_not_overtaken(bench: Bench) -> None:
    lay_out(bench.memory, 1)
    with bench.start(INSTRUCTIONS[0].code, Mode.CPL0, rdi=WINDOW, rcx=500) as vcpu:
        events = vcpu.get_state("VCPU_EVENTS")
        events.exception.injected, events.exception.nr = 1, 6
        vcpu.set_state("VCPU_EVENTS", events)
        assist = StringAssist(vcpu, bench.memory, GuestDebug(vcpu))
        assist.look()
        assert assist.finished == 0


# --- breakpoints ------------------------------------------------------------------------------------------------

# rbx times: fill rdx bytes; then r9 times r8 bytes
LOOP = bytes.fromhex(
    "4889d1"  # 1: mov %rdx, %rcx
    "bf00002000"  # mov $WINDOW, %edi
    "f3aa"  # rep stosb
    "ffcb"  # dec %ebx
    "75f2"  # jnz 1b
    "4c89c2"  # mov %r8, %rdx
    "4489cb"  # mov %r9d, %ebx
    "4531c9"  # xor %r9d, %r9d
    "85db"  # test %ebx, %ebx
    "75e5"  # jnz 1b
)
SITE = tables.CODE + 8
Run = Callable[..., tuple[Vcpu, Assist]]


@pytest.fixture
def assisted(bench: Bench) -> Run:
    """Return a function that runs LOOP to its end, its instruction having been met often enough for a breakpoint."""

    def go(times: int, size: int, *then: int) -> tuple[Vcpu, Assist]:
        lay_out(bench.memory, 1)
        assist = Assist(bench.memory)
        vcpu = bench.start(LOOP, Mode.CPL0, rbx=times, rdx=size, **dict(zip(("r9", "r8"), then, strict=False)))
        vcpu.use_assist(ffi.new("struct kvmpy_assist *", {"memory": bench.memory.table}))
        for _ in range(strings.MEETINGS):
            with vcpu.edit_regs() as regs:
                regs.rip, regs.rdi, regs.rcx = SITE, WINDOW, 200
            assist.look(vcpu)
        with vcpu.edit_regs() as regs:
            regs.rip = tables.CODE
        vcpu.set_budget(timeout=10)
        while isinstance(exit := vcpu.next_exit(), Debug):
            assert assist.complete_debug(vcpu, exit)
        assert getattr(exit, "port", None) == tables.DONE_PORT, exit
        return vcpu, assist

    return go


def test_instruction_met_often_gets_a_breakpoint(assisted: Run) -> None:
    vcpu, assist = assisted(20, 4096)
    assert assist.counts()["string"] == 20 + strings.MEETINGS
    assert vcpu.exits_by_reason()["DEBUG"] == 20


def test_breakpoint_that_is_not_worth_it_is_given_up(assisted: Run) -> None:
    vcpu, _ = assisted(3 * strings.TRIAL, 8)
    assert vcpu.exits_by_reason()["DEBUG"] == strings.TRIAL


def test_breakpoint_that_is_no_longer_worth_it_is_given_up(assisted: Run) -> None:
    """A kernel's memcpy moves whole pages while it boots, and a few bytes ever after."""
    vcpu, _ = assisted(strings.TRIAL + 3, 4096, 5 * strings.TRIAL, 8)
    assert vcpu.exits_by_reason()["DEBUG"] == 3 * strings.TRIAL


def test_what_cannot_be_finished_at_a_breakpoint_is_stepped(assisted: Run) -> None:
    """With nothing to store, KVM executes the instruction itself, and the run comes to its end."""
    vcpu, assist = assisted(3, 0)
    assert vcpu.get_regs().rbx == 0
    assert assist.counts()["string"] == strings.MEETINGS

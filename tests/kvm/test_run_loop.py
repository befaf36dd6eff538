"""What C does without Python: ranges, counts, budgets, the ring of last exits, time stamps."""

import pytest

from kvmpy._shim import ffi, lib
from kvmpy.devices.output import SerialOutput
from kvmpy.kvm import (
    Action,
    BudgetSpent,
    ExitPort,
    FastRange,
    Hlt,
    IoIn,
    IoOut,
    MmioWrite,
    RangeTable,
    Space,
)

pytestmark = pytest.mark.kvm

NOWHERE = 0xD000_0000


def table(*rows: tuple[Space, int, FastRange]) -> RangeTable:
    return RangeTable(rows)


def test_constant_answers_each_size(start):
    """The low bytes of the value, in C; only what another range or nobody owns comes to Python."""
    vcpu = start("inl $0x10, %eax\n movl %eax, %ebx\n inb $0x12, %al\n movb %al, %cl\n inb $0x20, %al\n hlt")
    fast = FastRange(0, 4, on_read=Action.CONSTANT, value=0x8877_6655_4433_2211)
    vcpu.use_ranges(table((Space.PIO, 0x10, fast)))
    assert vcpu.next_exit() == IoIn(0x20, 1)
    regs = vcpu.get_regs()
    assert (regs.rbx, regs.rcx) == (0x4433_2211, 0x11)
    assert vcpu.range_counts() == [(2, 0)]
    assert vcpu.exits_total == 3


def test_constant_may_change_while_the_guest_runs(start):
    vcpu = start("1: inb $0x10, %al\n outb %al, $1\n jmp 1b")
    fast = FastRange(0, 1, on_read=Action.CONSTANT, value=1)
    vcpu.use_ranges(table((Space.PIO, 0x10, fast)))
    assert vcpu.next_exit() == IoOut(1, 1, b"\x01")
    fast.value = 2
    assert vcpu.next_exit() == IoOut(1, 1, b"\x02")
    fast.on_read = Action.TO_PYTHON
    assert vcpu.next_exit() == IoIn(0x10, 1)


def test_sink_swallows_and_counts(start):
    vcpu = start("movw $500, %cx\n 1: outb %al, $0x10\n loop 1b\n hlt")
    vcpu.use_ranges(table((Space.PIO, 0x10, FastRange(0, 1, on_write=Action.SINK))))
    assert vcpu.next_exit() == Hlt()
    assert vcpu.range_counts() == [(0, 500)]
    assert vcpu.exits_by_reason() == {"IO": 500, "HLT": 1}


def test_counter_counts_elements_and_reads_back(start):
    """String I/O is one element after the other, however KVM bundles them."""
    vcpu = start("cld\n movw $37, %cx\n movw $0x10, %dx\n rep outsb\n outl %eax, %dx\n inw %dx, %ax\n hlt")
    counter = FastRange(0, 4, on_read=Action.COUNT, on_write=Action.COUNT)
    vcpu.use_ranges(table((Space.PIO, 0x10, counter)))
    assert vcpu.next_exit() == Hlt()
    assert (vcpu.get_regs().rax & 0xFFFF, counter.value) == (38, 38)
    assert vcpu.range_counts() == [(1, 38)]


def test_serial_range_hands_over_the_text_in_order(start, memory):
    text = bytes(range(32, 127)) * 4
    memory.write(0x4000, text)
    vcpu = start(f"cld\n movw $0x4000, %si\n movw ${len(text)}, %cx\n movw $0xe9, %dx\n rep outsb\n hlt")
    with SerialOutput() as output:
        fast = FastRange(0, 1, on_write=Action.SERIAL, serial=output.pointer)
        vcpu.use_ranges(table((Space.PIO, 0xE9, fast)))
        assert vcpu.next_exit() == Hlt()
        assert output.drain() == text
    assert vcpu.range_counts() == [(0, len(text))]


def test_serial_range_that_is_full_or_wide_is_for_python(start):
    """Nothing is lost in C: what does not fit comes as an exit."""
    vcpu = start("movb $0x41, %al\n outb %al, $0xe9\n outb %al, $0xe9\n outb %al, $0xe9\n outw %ax, $0xe9\n hlt")
    with SerialOutput(2) as output:
        fast = FastRange(0, 2, on_write=Action.SERIAL, serial=output.pointer)
        vcpu.use_ranges(table((Space.PIO, 0xE9, fast)))
        assert vcpu.next_exit() == IoOut(0xE9, 1, b"A")
        assert output.drain() == b"AA"
        assert vcpu.next_exit() == IoOut(0xE9, 2, b"A\0")
        assert vcpu.range_counts() == [(0, 2)]


def test_exit_port_ends_with_its_value(start):
    vcpu = start("movl $0x12345678, %eax\n outl %eax, $0xf4\n hlt")
    vcpu.use_ranges(table((Space.PIO, 0xF4, FastRange(0, 4, on_write=Action.EXIT))))
    assert vcpu.next_exit() == ExitPort(0x1234_5678)
    assert vcpu.range_counts() == [(0, 1)]
    assert vcpu.next_exit() == Hlt()


def test_memory_ranges_have_addresses_of_their_own(start):
    """The same number in the other space is another place."""
    accesses = "movl %eax, (%rdi)\n movl 4(%rdi), %ebx\n outl %eax, $0\n movl %eax, 8(%rdi)\n hlt"
    vcpu = start(f"movl ${NOWHERE}, %edi\n {accesses}", "long")
    rows = (
        (Space.MMIO, NOWHERE, FastRange(0, 4, on_write=Action.SINK)),
        (Space.MMIO, NOWHERE, FastRange(4, 4, on_read=Action.CONSTANT, value=0x99)),
    )
    vcpu.use_ranges(table(*rows))
    assert vcpu.next_exit() == IoOut(0, 4, b"\0" * 4)
    assert vcpu.get_regs().rbx == 0x99
    assert vcpu.next_exit() == MmioWrite(NOWHERE + 8, b"\0" * 4)
    assert vcpu.range_counts() == [(0, 1), (1, 0)]


def test_ranges_that_overlap_are_refused():
    one, two = FastRange(0, 4), FastRange(2, 1)
    with pytest.raises(ValueError, match="overlap at 0x12"):
        table((Space.PIO, 0x10, one), (Space.PIO, 0x10, two))
    table((Space.PIO, 0x10, FastRange(0, 4)), (Space.MMIO, 0x10, FastRange(0, 4)))


def test_trace_brings_every_exit_to_python(start):
    vcpu = start("1: outb %al, $0x10\n jmp 1b")
    sink = FastRange(0, 1, on_write=Action.SINK)
    vcpu.use_ranges(table((Space.PIO, 0x10, sink)))
    vcpu.trace_exits(True)
    for _ in range(3):
        assert vcpu.next_exit() == IoOut(0x10, 1, b"\0")
    assert vcpu.range_counts() == [(0, 0)]
    vcpu.trace_exits(False)
    vcpu.set_budget(max_exits=10)
    assert vcpu.next_exit() == BudgetSpent(13)
    assert vcpu.range_counts() == [(0, 10)]


# --- budgets ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_exits", [0, 1, 7, 1000])
def test_budget_counts_exits_that_c_answered(start, max_exits):
    """`Vcpu.set_budget`: exactly ``max_exits`` more, and then no other."""
    vcpu = start("1: outb %al, $0x10\n jmp 1b")
    vcpu.use_ranges(table((Space.PIO, 0x10, FastRange(0, 1, on_write=Action.SINK))))
    vcpu.set_budget(max_exits=max_exits)
    for _ in range(2):
        assert vcpu.next_exit() == BudgetSpent(max_exits)
    assert vcpu.exits_total == max_exits
    vcpu.set_budget(max_exits=5)
    assert vcpu.next_exit() == BudgetSpent(max_exits + 5)


def test_budget_ends_a_run_after_its_last_exit_was_yielded(start):
    vcpu = start("1: outb %al, $0x10\n outb %al, $0x20\n jmp 1b")
    vcpu.use_ranges(table((Space.PIO, 0x10, FastRange(0, 1, on_write=Action.SINK))))
    assert list(vcpu.run(max_exits=4)) == [IoOut(0x20, 1, b"\0")] * 2 + [BudgetSpent(4)]


# --- the ring, stamps, time -------------------------------------------------------------------------------------


def test_ring_keeps_the_last_64_exits_in_order(start):
    """What C answered stands in it too, with the reply for a read."""
    vcpu = start("movb $0, %al\n 1: outb %al, $0x10\n incb %al\n jmp 1b")
    vcpu.use_ranges(table((Space.PIO, 0x10, FastRange(0, 1, on_write=Action.SINK))))
    vcpu.set_budget(max_exits=5)
    vcpu.next_exit()
    assert [(r.number, r.data) for r in vcpu.last_exits()] == [(n + 1, n) for n in range(5)]
    vcpu.set_budget(max_exits=95)
    vcpu.next_exit()
    last = vcpu.last_exits()
    assert [(r.number, r.data) for r in last] == [(n + 1, n) for n in range(36, 100)]
    assert {(r.reason, r.address, r.size, r.elements, r.is_write, r.rip) for r in last} == {
        (lib.KVM_EXIT_IO, 0x10, 1, 1, True, last[0].rip)
    }
    assert last[0].rip in (0x1002, 0x1004)  # at the instruction or behind it, as the host's KVM completes an OUT


def test_ring_has_the_replies_of_c(start):
    vcpu = start("inw $0x10, %ax\n hlt")
    vcpu.use_ranges(table((Space.PIO, 0x10, FastRange(0, 2, on_read=Action.CONSTANT, value=0xABCD))))
    vcpu.next_exit()
    first, second = vcpu.last_exits()
    assert (first.data, first.is_write, first.size) == (0xABCD, False, 2)
    assert second.reason == lib.KVM_EXIT_HLT


def test_stamps_are_pairs_in_order_and_end_at_the_capacity(start):
    vcpu = start("1: outb %al, $0x10\n jmp 1b")
    vcpu.use_ranges(table((Space.PIO, 0x10, FastRange(0, 1, on_write=Action.SINK))))
    stamps = ffi.new("uint64_t[]", 2 * 9)
    vcpu.record_stamps(stamps, 8)
    vcpu.set_budget(max_exits=20)
    vcpu.next_exit()
    recorded = list(stamps)
    assert recorded[:16] == sorted(recorded[:16])
    assert len(set(recorded[:16])) == 16
    assert recorded[16:] == [0, 0]
    vcpu.record_stamps(ffi.NULL, 0)
    vcpu.set_budget(max_exits=5)
    vcpu.next_exit()
    assert list(stamps) == recorded


def test_time_in_the_guest_is_counted_on_request(start):
    vcpu = start("1: outb %al, $0x10\n jmp 1b")
    vcpu.next_exit()
    assert vcpu.cycles_in_run == 0
    vcpu.measure_time(True)
    vcpu.next_exit()
    counted = vcpu.cycles_in_run
    assert counted > 0
    vcpu.measure_time(False)
    vcpu.next_exit()
    assert vcpu.cycles_in_run == counted

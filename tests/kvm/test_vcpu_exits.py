"""Each kind of exit that a host can be made to produce arrives as its own type, with its fields right."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kvmpy import GuestMemory
from kvmpy._shim import lib
from kvmpy.errors import KvmError
from kvmpy.kvm import (
    BudgetSpent,
    Debug,
    Exit,
    Hlt,
    InternalError,
    IoIn,
    IoOut,
    IrqWindowOpen,
    MmioRead,
    MmioWrite,
    Shutdown,
    Vcpu,
    Vm,
)

pytestmark = pytest.mark.kvm
Start = Callable[..., Vcpu]

NOWHERE = 0xD000_0000  # no RAM in any test's machine


def exits_of(vcpu: Vcpu, count: int) -> Iterator[Exit]:
    """Return the next ``count`` exits."""
    return (vcpu.next_exit() for _ in range(count))


def test_out_gives_port_size_and_data(start: Start) -> None:
    """KVM API §5, KVM_EXIT_IO: direction, size, port, count and the data at data_offset."""
    vcpu = start("movl $0x44332211, %eax\n outb %al, $0xe9\n movw $0x1234, %dx\n outw %ax, %dx\n outl %eax, %dx\n hlt")
    assert list(exits_of(vcpu, 4)) == [
        IoOut(0xE9, 1, b"\x11"),
        IoOut(0x1234, 2, b"\x11\x22"),
        IoOut(0x1234, 4, b"\x11\x22\x33\x44"),
        Hlt(),
    ]


@pytest.mark.parametrize(("instruction", "size"), [("inb %dx, %al", 1), ("inw %dx, %ax", 2), ("inl %dx, %eax", 4)])
def test_in_takes_the_reply(start: Start, instruction: str, size: int) -> None:
    """KVM API §5: for KVM_EXIT_IO_IN user space stores the data, and the next KVM_RUN gives them to the guest."""
    vcpu = start(f"xorl %eax, %eax\n movw $0x5678, %dx\n {instruction}\n hlt")
    exit = vcpu.next_exit()
    assert exit == IoIn(0x5678, size)
    assert isinstance(exit, IoIn)
    exit.reply(bytes(range(1, 1 + size)))
    assert vcpu.next_exit() == Hlt()
    assert vcpu.get_regs().rax == int.from_bytes(bytes(range(1, 1 + size)), "little")


def test_reply_of_another_size_is_refused(start: Start) -> None:
    exit = start("inb $0x60, %al\n hlt").next_exit()
    assert isinstance(exit, IoIn)
    with pytest.raises(ValueError, match=r"^a reply of 2 bytes: 1 are wanted$"):
        exit.reply(b"ab")


def test_rep_insb_fills_the_buffer_of_the_guest(start: Start, memory: GuestMemory) -> None:
    """KVM API §5: count elements of size bytes. How many come in one exit is KVM's business; all of them come."""
    vcpu = start("cld\n movw $0x3000, %di\n movw $16, %cx\n movw $0x60, %dx\n rep insb\n hlt")
    sent = bytearray()
    while isinstance(exit := vcpu.next_exit(), IoIn):
        assert (exit.port, exit.size) == (0x60, 1)
        data = bytes(range(len(sent), len(sent) + exit.count))
        exit.reply(data)
        sent += data
    assert exit == Hlt()
    assert memory.read(0x3000, 16) == sent == bytes(range(16))


def test_rep_insw_comes_in_elements(start: Start, memory: GuestMemory) -> None:
    vcpu = start("cld\n movw $0x3000, %di\n movw $8, %cx\n movw $0x60, %dx\n rep insw\n hlt")
    given = b""
    while isinstance(exit := vcpu.next_exit(), IoIn):
        data = b"".join((0xAA00 + len(given) // 2 + i).to_bytes(2, "little") for i in range(exit.count))
        assert exit.size == 2
        exit.reply(data)
        given += data
    assert memory.read(0x3000, 16) == given


@pytest.mark.parametrize(("suffix", "size"), [("b", 1), ("w", 2), ("l", 4)])
def test_rep_outs_hands_over_every_element(start: Start, memory: GuestMemory, suffix: str, size: int) -> None:
    text = bytes(range(64, 64 + 8 * size))
    memory.write(0x3000, text)
    vcpu = start(f"cld\n movw $0x3000, %si\n movw $8, %cx\n movw $0xe9, %dx\n rep outs{suffix}\n hlt")
    seen = b""
    while isinstance(exit := vcpu.next_exit(), IoOut):
        assert (exit.port, exit.size, len(exit.data)) == (0xE9, size, size * exit.count)
        seen += exit.data
    assert exit == Hlt()
    assert seen == text


STORES = {1: "movb %al, (%rdi)", 2: "movw %ax, (%rdi)", 4: "movl %eax, (%rdi)", 8: "movq %rax, (%rdi)"}
LOADS = {1: "movb (%rdi), %al", 2: "movw (%rdi), %ax", 4: "movl (%rdi), %eax", 8: "movq (%rdi), %rax"}


@pytest.mark.parametrize("size", STORES)
def test_mmio_write_gives_address_and_data(start: Start, size: int) -> None:
    """KVM API §5, KVM_EXIT_MMIO: phys_addr, data, len, is_write."""
    value = 0x8877665544332211
    vcpu = start(f"movq ${value}, %rax\n movl ${NOWHERE + 8}, %edi\n {STORES[size]}\n hlt", "long")
    assert list(exits_of(vcpu, 2)) == [MmioWrite(NOWHERE + 8, value.to_bytes(8, "little")[:size]), Hlt()]


@pytest.mark.parametrize("size", LOADS)
def test_mmio_read_takes_the_reply(start: Start, size: int) -> None:
    vcpu = start(f"xorl %eax, %eax\n movl ${NOWHERE}, %edi\n {LOADS[size]}\n hlt", "long")
    exit = vcpu.next_exit()
    assert exit == MmioRead(NOWHERE, size)
    assert isinstance(exit, MmioRead)
    exit.reply(bytes(range(1, 1 + size)))
    assert vcpu.next_exit() == Hlt()
    assert vcpu.get_regs().rax == int.from_bytes(bytes(range(1, 1 + size)), "little")


def test_hlt_without_an_irqchip_exits(start: Start) -> None:
    """KVM API §5, KVM_EXIT_HLT; each HLT anew."""
    assert list(exits_of(start("1: hlt\n jmp 1b"), 3)) == [Hlt()] * 3


def test_triple_fault_is_shutdown(start: Start) -> None:
    """Intel SDM vol. 3 §6.15, interrupt 8: an exception while delivering a double fault shuts down."""
    vcpu = start("lidt (empty)\n movl $1, %eax\n ud2\n empty: .word 0, 0, 0", "protected")
    assert vcpu.next_exit() == Shutdown()


def test_instruction_fetch_from_nowhere_is_an_internal_error(start: Start) -> None:
    """KVM API §5, KVM_EXIT_INTERNAL_ERROR: suberror 1, emulation; there is nothing to fetch there."""
    exit = start(f"movl ${NOWHERE}, %eax\n jmp *%eax", "protected").next_exit()
    assert isinstance(exit, InternalError)
    assert exit.suberror == lib.KVM_INTERNAL_ERROR_EMULATION


def test_internal_error_tells_the_instruction(vm: Vm, start: Start) -> None:
    """KVM API §5: with KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES the instruction is in the exit."""
    vm.enable_cap(lib.KVM_CAP_EXIT_ON_EMULATION_FAILURE, 1)
    # A store to a device by an instruction that no emulator of KVM has: it must emulate, for there is no RAM.
    code = f"movl ${NOWHERE}, %edi\n fnstenv (%rdi)\n hlt"
    exit = start(code, "long").next_exit()
    assert isinstance(exit, InternalError)
    assert exit.suberror == lib.KVM_INTERNAL_ERROR_EMULATION
    assert exit.instruction.startswith(bytes.fromhex("d937"))


def test_single_step_is_a_debug_exit_after_each_instruction(start: Start) -> None:
    """KVM API §4.87: KVM_GUESTDBG_SINGLESTEP; DR6.BS (bit 14) says that it was a step."""
    vcpu = start("nop\n nop\n nop\n hlt", "protected")
    vcpu.set_guest_debug(lib.KVM_GUESTDBG_ENABLE | lib.KVM_GUESTDBG_SINGLESTEP)
    vcpu.set_budget(timeout=2.0)
    exit = vcpu.next_exit()
    if not isinstance(exit, Debug):
        pytest.skip(f"this host does not single-step guests: {exit}")
    steps = [exit, *exits_of(vcpu, 2)]
    assert [step.pc for step in steps if isinstance(step, Debug)] == [0x10_0001, 0x10_0002, 0x10_0003]
    assert exit.dr6 & 1 << 14
    assert exit.exception == 1
    vcpu.set_guest_debug(0)
    assert vcpu.next_exit() == Hlt()


def test_hardware_breakpoint_is_a_debug_exit(start: Start) -> None:
    """KVM API §4.87: KVM_GUESTDBG_USE_HW_BP with DR0 and DR7 (Intel SDM vol. 3 §18.2.4)."""
    vcpu = start("nop\n nop\n nop\n hlt", "protected")
    control = lib.KVM_GUESTDBG_ENABLE | lib.KVM_GUESTDBG_USE_HW_BP
    vcpu.set_guest_debug(control, [0x10_0002, 0, 0, 0, 0, 0, 0, 0x402])
    vcpu.set_budget(timeout=2.0)
    exit = vcpu.next_exit()
    if not isinstance(exit, Debug):
        pytest.skip(f"this host has no hardware breakpoints for guests: {exit}")
    assert (exit.pc, exit.dr6 & 0xF) == (0x10_0002, 1)


def test_interrupt_window_opens_when_the_guest_allows_interrupts(start: Start) -> None:
    """KVM API §5, request_interrupt_window: KVM_EXIT_IRQ_WINDOW_OPEN, without an in-kernel irqchip."""
    vcpu = start("movb $1, %al\n outb %al, $0xe9\n sti\n nop\n 1: nop\n jmp 1b")
    assert vcpu.next_exit() == IoOut(0xE9, 1, b"\x01")
    vcpu.request_interrupt_window(True)
    assert vcpu.next_exit() == IrqWindowOpen()


def test_queued_interrupt_runs_its_handler(start: Start, memory: GuestMemory) -> None:
    """KVM API §4.16, KVM_INTERRUPT: the vector is delivered when the guest can take it."""
    vcpu = start("sti\n nop\n 1: hlt\n jmp 1b\n .org 0x100\n movb $0x77, %al\n outb %al, $0xe9\n iret")
    memory.write(0x21 * 4, bytes.fromhex("00110000"))
    assert vcpu.next_exit() == Hlt()
    vcpu.interrupt(0x21)
    assert vcpu.next_exit() == IoOut(0xE9, 1, b"\x77")


def test_nmi_runs_handler_2(start: Start, memory: GuestMemory) -> None:
    """KVM API §4.64; Intel SDM vol. 3 §6.7: interrupts that are off do not hold an NMI back."""
    vcpu = start("cli\n 1: hlt\n jmp 1b\n .org 0x100\n movb $0x22, %al\n outb %al, $0xe9\n iret")
    memory.write(2 * 4, bytes.fromhex("00110000"))
    assert vcpu.next_exit() == Hlt()
    vcpu.nmi()
    assert vcpu.next_exit() == IoOut(0xE9, 1, b"\x22")


def test_exits_are_counted_by_reason(start: Start) -> None:
    vcpu = start(f"outb %al, $1\n outb %al, $2\n inb $3, %al\n movb %al, {NOWHERE}\n hlt", "protected")
    list(exits_of(vcpu, 5))
    assert vcpu.exits_by_reason() == {"IO": 3, "MMIO": 1, "HLT": 1}
    assert vcpu.exits_total == 5


def test_run_yields_exits_until_the_caller_leaves(start: Start) -> None:
    vcpu = start("1: outb %al, $1\n jmp 1b")
    seen: list[Any] = []
    for exit in vcpu.run(max_exits=3):
        seen.append(exit)
    assert seen == [IoOut(1, 1, b"\0")] * 3 + [BudgetSpent(3)]


def test_kvm_run_that_fails_is_a_kvm_error(start: Start, vm: Vm) -> None:
    """KVM API §4.10: KVM_RUN refuses with EINVAL what cannot be run; here a field that KVM does not know."""
    vcpu = start("hlt")
    vcpu._page[1].kvm_valid_regs = 1 << 63
    with pytest.raises(KvmError, match=r"^KVM_RUN: EINVAL \(vcpu_id=0\)$"):
        vcpu.next_exit()

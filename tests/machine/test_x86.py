"""The three ways to start a processor: what a guest finds when it looks."""

from collections.abc import Callable
from itertools import permutations

import pytest
from guest_code import assemble, entry_of, set_up

from kvmpy import GuestMemory
from kvmpy._shim import lib
from kvmpy.kvm import Hlt, IoOut, MmioRead, Vcpu, Vm
from kvmpy.machine import layout, x86
from kvmpy.units import PAGE_SIZE, GiB, MiB

pytestmark = pytest.mark.kvm
Start = Callable[..., Vcpu]

# How each mode is recognised from inside: 66-prefixed code differs by D, and REX exists in 64-bit code only.
WHICH = {
    "real": "smsw %ax\n outw %ax, $1\n movw %cs, %ax\n outw %ax, $2\n hlt",
    "protected": "smsw %ax\n outw %ax, $1\n movw %cs, %ax\n outw %ax, $2\n hlt",
    "long": "smsw %ax\n outw %ax, $1\n movw %cs, %ax\n outw %ax, $2\n movq $-1, %rax\n hlt",
}


def test_real_mode_starts_at_the_entry_with_segments_zero(start: Start) -> None:
    """CR0.PE is clear; cs:ip = 0:entry."""
    vcpu = start(WHICH["real"])
    assert vcpu.get_regs().rip == 0x1000
    exit = vcpu.next_exit()
    assert isinstance(exit, IoOut)
    assert not exit.data[0] & lib.X86_CR0_PE
    assert vcpu.next_exit() == IoOut(2, 2, b"\0\0")


def test_real_mode_can_start_in_another_segment(vm: Vm, memory: GuestMemory) -> None:
    """cs = 0x1234 means base 0x12340 (Intel SDM vol. 3 §20.1.1)."""
    vcpu = vm.create_vcpu(0)
    memory.write(0x1_2345, assemble("movw %cs, %ax\n outw %ax, $2\n hlt"))
    x86.real_mode(vcpu, 5, segment=0x1234)
    assert vcpu.next_exit() == IoOut(2, 2, b"\x34\x12")


def test_real_mode_takes_interrupts_through_its_table(start: Start, memory: GuestMemory) -> None:
    """The table at 0: IDTR.base 0. A division by zero is interrupt 0 (Intel SDM vol. 3 §20.1.4)."""
    vcpu = start("movw $0x2000, %sp\n xorw %dx, %dx\n divw %dx\n .org 0x100\n movb $7, %al\n outb %al, $1\n hlt")
    memory.write(0, bytes.fromhex("00110000"))
    assert vcpu.next_exit() == IoOut(1, 1, b"\x07")


def test_protected_mode_has_flat_segments(start: Start) -> None:
    """CR0.PE is set, PG is not; the last byte of 4 GiB can be addressed, and is nobody's."""
    vcpu = start("smsw %ax\n outw %ax, $1\n movb 0xffff0000, %al\n movb %ss:0xffff0000, %al\n hlt", "protected")
    exit = vcpu.next_exit()
    assert isinstance(exit, IoOut)
    assert exit.data[0] & lib.X86_CR0_PE
    assert vcpu.next_exit() == vcpu.next_exit() == MmioRead(0xFFFF_0000, 1)
    assert vcpu.next_exit() == Hlt()
    assert not vcpu.get_sregs().cr0 & lib.X86_CR0_PG


RELOAD = "sgdt 0x3000\n lgdt 0x3000\n movw $0x18, %ax\n movw %ax, %ds\n movw %ax, %es\n movw %ax, %ss\n movw %ax, %fs\n"


def test_protected_mode_segments_can_be_reloaded(start: Start) -> None:
    """A guest that reloads a segment register reads the GDT: there is one where GDTR points."""
    code = RELOAD + "ljmp $0x10, $1f\n 1: movl $0x5000, %esp\n pushl %eax\n movb $9, %al\n outb %al, $1\n hlt"
    vcpu = start(code, "protected")
    assert vcpu.next_exit() == IoOut(1, 1, b"\x09")


def test_long_mode_segments_can_be_reloaded(start: Start) -> None:
    """A far return to the code selector of the boot GDT stays in 64-bit code."""
    code = RELOAD + "movl $0x5000, %esp\n pushq $0x10\n pushq $1f\n lretq\n 1: movq $-1, %rax\n outb %al, $1\n hlt"
    vcpu = start(code, "long")
    assert vcpu.next_exit() == IoOut(1, 1, b"\xff")
    assert vcpu.get_regs().rax == (1 << 64) - 1


def test_long_mode_is_64_bit_code_with_paging(start: Start) -> None:
    """Intel SDM vol. 3 §10.8.5: LMA is set, and the registers have 64 bits."""
    vcpu = start("movq $-1, %rax\n movq %rax, %r15\n hlt", "long")
    assert vcpu.next_exit() == Hlt()
    assert vcpu.get_regs().r15 == (1 << 64) - 1
    sregs = vcpu.get_sregs()
    assert sregs.efer & x86.EFER_LMA
    assert sregs.cr0 & lib.X86_CR0_PG
    assert sregs.cr3 == layout.BOOT_PAGE_TABLES


def test_long_mode_maps_4_gib_one_to_one(start: Start) -> None:
    vcpu = start("hlt", "long")
    for address in (0, 0x1234, 2 * MiB, 1 * GiB - 1, 1 * GiB, 3 * GiB + 0x567, 4 * GiB - 1):
        found = vcpu.translate(address)
        assert (found.physical_address, found.valid, found.writeable) == (address, True, True)
    for address in (4 * GiB, 1 << 39, 1 << 46):
        assert not vcpu.translate(address).valid


def test_page_tables_stand_on_their_own() -> None:
    """Six pages: each entry present and writable, pointing at the next level or at 2 MiB of memory."""
    tables = x86.page_tables(0x10_0000)
    assert len(tables) == 6 * PAGE_SIZE
    entries = [int.from_bytes(tables[i : i + 8], "little") for i in range(0, len(tables), 8)]
    assert entries[0] == 0x10_1000 | x86.PRESENT | x86.WRITABLE
    assert [entry & ~0xFFF for entry in entries[512:516]] == [0x10_2000 + i * PAGE_SIZE for i in range(4)]
    assert not any(entries[1:512] + entries[516:1024])
    flags = x86.PRESENT | x86.WRITABLE | x86.PAGE_SIZE_BIT
    assert entries[1024:] == [address | flags for address in range(0, 4 * GiB, 2 * MiB)]


@pytest.mark.parametrize("mode", ["real", "protected", "long"])
def test_every_mode_starts_with_interrupts_off_and_flags_clear(vm: Vm, memory: GuestMemory, mode: str) -> None:
    vcpu = vm.create_vcpu(0)
    set_up(vcpu, memory, assemble("hlt", mode), mode)
    assert vcpu.get_regs().rflags == lib.X86_EFLAGS_FIXED
    assert vcpu.get_regs().rip == entry_of(mode)
    assert vcpu.next_exit() == Hlt()


@pytest.mark.parametrize("order", list(permutations(["real", "protected", "long"])))
def test_every_mode_can_follow_every_other(vm: Vm, memory: GuestMemory, order: tuple[str, ...]) -> None:
    """A vCPU that ran in one mode can be started in another, as after a reset."""
    vcpu = vm.create_vcpu(0)
    for mode in (*order, order[0]):
        set_up(vcpu, memory, assemble(WHICH[mode], mode), mode)
        exit = vcpu.next_exit()
        assert isinstance(exit, IoOut)
        assert bool(exit.data[0] & lib.X86_CR0_PE) is (mode != "real")
        assert isinstance(vcpu.next_exit(), IoOut)
        assert vcpu.next_exit() == Hlt()
        assert bool(vcpu.get_sregs().efer & x86.EFER_LMA) is (mode == "long")


def test_triple_fault_in_real_mode_after_protected_mode_is_none(vm: Vm, memory: GuestMemory) -> None:
    """Protected mode begins without an IDT; real mode has its table again."""
    vcpu = vm.create_vcpu(0)
    set_up(vcpu, memory, assemble("hlt", "protected"), "protected")
    vcpu.next_exit()
    memory.write(0, bytes.fromhex("00110000"))
    code = "movw $0x2000, %sp\n xorw %dx, %dx\n divw %dx\n .org 0x100\n movb $7, %al\n outb %al, $1\n hlt"
    set_up(vcpu, memory, assemble(code), "real")
    assert (vcpu.get_sregs().idt.base, vcpu.get_sregs().idt.limit) == (0, 0x3FF)
    assert vcpu.next_exit() == IoOut(1, 1, b"\x07")

"""Registers, and when they are true: sync regs, completion, and the other structures of a vCPU's state."""

from collections.abc import Callable

import pytest

from kvmpy import GuestMemory, Kvm
from kvmpy._shim import ffi, lib
from kvmpy.errors import KvmError
from kvmpy.kvm import BudgetSpent, Hlt, IoIn, IoOut, MmioRead, MmioWrite, Vcpu, Vm
from kvmpy.kvm.cpuid_entry import CpuidEntry
from kvmpy.kvm.ioctl import ioctl
from kvmpy.kvm.state import GENERAL_REGISTERS, Regs

pytestmark = pytest.mark.kvm
Start = Callable[..., Vcpu]

NOWHERE = 0xD000_0000
SSE = "movq %cr4, %rax\n orq $0x600, %rax\n movq %rax, %cr4\n"  # OSFXSR, OSXMMEXCPT


def values(regs: Regs) -> dict[str, int]:
    return {name: getattr(regs, name) for name in GENERAL_REGISTERS}


def by_ioctl(vcpu: Vcpu) -> dict[str, int]:
    """Return what KVM_GET_REGS says, past the run page."""
    regs = ffi.new("struct kvm_regs *")
    ioctl(vcpu.fd, "KVM_GET_REGS", regs)
    return values(regs)


def test_registers_of_a_fresh_vcpu_are_those_of_reset(vm: Vm) -> None:
    """Intel SDM vol. 3, table 10-1: EIP 0xfff0, EFLAGS 2."""
    regs = vm.create_vcpu(0).get_regs()
    assert (regs.rip, regs.rflags) == (0xFFF0, lib.X86_EFLAGS_FIXED)


def test_sync_regs_are_what_get_regs_says(start: Start) -> None:
    """KVM API, KVM_CAP_SYNC_REGS: the run page has the registers at each exit."""
    vcpu = start("movl $0x1234567, %eax\n movl $0x89abcdef, %esi\n std\n outb %al, $1\n incl %eax\n outb %al, $2\n hlt")
    for expected in (IoOut(1, 1, b"\x67"), IoOut(2, 1, b"\x68"), Hlt()):
        assert vcpu.next_exit() == expected
        assert values(vcpu.get_regs()) == by_ioctl(vcpu)


def test_registers_are_right_before_any_entry(start: Start) -> None:
    """A budget or deadline that is over at once enters no guest: the run page says nothing then."""
    vcpu = start("hlt")
    fresh = vcpu.vm.create_vcpu(1)
    regs = fresh.get_regs()
    regs.rbx = 0x77
    fresh.set_regs(regs)
    fresh.set_budget(max_exits=0)
    assert fresh.next_exit() == BudgetSpent(0)
    assert fresh.get_regs().rbx == 0x77


def test_a_copy_does_not_change_with_the_guest(start: Start) -> None:
    vcpu = start("movw $1, %bx\n outb %al, $1\n movw $2, %bx\n outb %al, $1\n hlt")
    vcpu.next_exit()
    before = vcpu.get_regs()
    vcpu.next_exit()
    assert (before.rbx, vcpu.get_regs().rbx) == (1, 2)


def test_edit_regs_is_seen_by_the_guest(start: Start) -> None:
    vcpu = start("movb $1, %bl\n outb %al, $1\n movb %bl, %al\n outb %al, $2\n hlt")
    vcpu.next_exit()
    with vcpu.edit_regs() as regs:
        regs.rbx = 0x55
    assert vcpu.next_exit() == IoOut(2, 1, b"\x55")


def test_edit_regs_completes_an_in_first(start: Start) -> None:
    """KVM API §5, pending operations: without the completion the reply would come later, over what is set here."""
    vcpu = start("inb $0x60, %al\n outb %al, $1\n hlt")
    exit = vcpu.next_exit()
    assert isinstance(exit, IoIn)
    exit.reply(b"\x11")
    with vcpu.edit_regs() as regs:
        assert (regs.rax & 0xFF, regs.rip) == (0x11, 0x1002)
        regs.rax = 0x22
    assert vcpu.next_exit() == IoOut(1, 1, b"\x22")


def test_set_regs_survives_a_completion_and_a_kick(start: Start) -> None:
    vcpu = start("outb %al, $1\n movb %bl, %al\n outb %al, $2\n hlt")
    vcpu.next_exit()
    vcpu.complete()
    regs = vcpu.get_regs()
    regs.rbx = 0x66
    vcpu.set_regs(regs)
    vcpu.complete()
    vcpu.kick()
    vcpu.next_exit()
    assert vcpu.next_exit() == IoOut(2, 1, b"\x66")


def test_complete_finishes_an_mmio_read(start: Start) -> None:
    vcpu = start(f"movl ${NOWHERE}, %edi\n movq (%rdi), %rax\n hlt", "long")
    exit = vcpu.next_exit()
    assert isinstance(exit, MmioRead)
    exit.reply(bytes(range(8)))
    assert vcpu.complete() is False
    assert vcpu.get_regs().rax == int.from_bytes(bytes(range(8)), "little")
    assert vcpu.complete() is False
    assert vcpu.next_exit() == Hlt()
    assert vcpu.exits_total == 2


def test_a_wide_write_is_two_exits_and_complete_says_so(start: Start, memory: GuestMemory) -> None:
    """KVM API §5, KVM_EXIT_MMIO: at most 8 bytes an exit; 16 bytes go on after re-entry, and that makes an exit."""
    memory.write(0x3000, bytes(range(16)))
    vcpu = start(SSE + f"movl ${NOWHERE}, %edi\n movups 0x3000, %xmm0\n movups %xmm0, (%rdi)\n hlt", "long")
    assert vcpu.next_exit() == MmioWrite(NOWHERE, bytes(range(8)))
    assert vcpu.complete() is True
    assert vcpu.complete() is True
    assert vcpu.exits_total == 1
    with pytest.raises(ValueError, match="take that first"), vcpu.edit_regs():
        pass
    assert vcpu.next_exit() == MmioWrite(NOWHERE + 8, bytes(range(8, 16)))
    assert vcpu.complete() is False
    assert vcpu.next_exit() == Hlt()
    assert vcpu.exits_total == 3


def test_a_wide_read_is_put_together(start: Start, memory: GuestMemory) -> None:
    vcpu = start(SSE + f"movl ${NOWHERE}, %edi\n movups (%rdi), %xmm0\n movups %xmm0, 0x3000\n hlt", "long")
    for at in (0, 8):
        exit = vcpu.next_exit()
        assert exit == MmioRead(NOWHERE + at, 8)
        assert isinstance(exit, MmioRead)
        exit.reply(bytes(range(at, at + 8)))
    assert vcpu.next_exit() == Hlt()
    assert memory.read(0x3000, 16) == bytes(range(16))


def test_sregs_can_be_read_and_changed(start: Start) -> None:
    vcpu = start("nop\n hlt")
    with vcpu.edit_sregs() as sregs:
        assert (sregs.cs.base, sregs.cs.selector, sregs.cr0 & lib.X86_CR0_PE) == (0, 0, 0)
        sregs.ds.base, sregs.ds.selector = 0x1230, 0x123
    assert (vcpu.get_sregs().ds.base, vcpu.get_sregs().ds.selector) == (0x1230, 0x123)


def test_impossible_sregs_are_refused(start: Start) -> None:
    """KVM API §4.14: PG without PE cannot be."""
    vcpu = start("hlt")
    sregs = vcpu.get_sregs()
    sregs.cr0 = lib.X86_CR0_PG
    with pytest.raises(KvmError, match=r"^KVM_SET_SREGS: EINVAL"):
        vcpu.set_sregs(sregs)


@pytest.mark.parametrize("name", ["FPU", "VCPU_EVENTS", "DEBUGREGS", "XSAVE", "XCRS"])
def test_state_that_was_read_can_be_set(start: Start, name: str) -> None:
    vcpu = start("hlt")
    state = vcpu.get_state(name)
    vcpu.set_state(name, state)
    size = ffi.sizeof(ffi.typeof(state).item)
    assert bytes(ffi.buffer(vcpu.get_state(name), size)) == bytes(ffi.buffer(state, size))


def test_msrs_can_be_read_and_set(start: Start) -> None:
    """KVM API §4.18, §4.19: SYSENTER_CS and _ESP (Intel SDM vol. 4, 0x174, 0x175)."""
    vcpu = start("hlt")
    vcpu.set_msrs({0x174: 0x10, 0x175: 0x1234_5678})
    assert vcpu.get_msrs([0x174, 0x175]) == {0x174: 0x10, 0x175: 0x1234_5678}


def test_get_msrs_ends_at_one_that_is_not_there(start: Start) -> None:
    assert list(start("hlt").get_msrs([0x174, 0x4000_1234, 0x175])) == [0x174]


def test_a_refused_msr_is_named(start: Start) -> None:
    """KVM API §4.19: KVM_SET_MSRS returns how many it set. EFER has reserved bits."""
    vcpu = start("hlt")
    with pytest.raises(KvmError, match=r"^KVM_SET_MSRS: EINVAL \(msr 0xc0000080 = 0xffffffffffffffff\)$"):
        vcpu.set_msrs({0x174: 0x20, 0xC000_0080: (1 << 64) - 1, 0x175: 1})
    assert vcpu.get_msrs([0x174, 0x175]) == {0x174: 0x20, 0x175: 0}


def test_msr_index_list_is_what_a_vcpu_can_read(start: Start, kvm: Kvm) -> None:
    """KVM API §4.3. Two of them are on every host: TSC (0x10) and SYSENTER_CS (0x174)."""
    indices = kvm.get_msr_index_list()
    assert {0x10, 0x174} <= set(indices)
    assert set(start("hlt").get_msrs([0x10, 0x174])) == {0x10, 0x174}


def test_cpuid_leaf_of_ours_is_what_the_guest_reads(start: Start, kvm: Kvm) -> None:
    """KVM API §4.20, KVM_SET_CPUID2. A leaf above 0x40000100 is nobody's: no host mixes its own into it."""
    vcpu = start("movl $0x40000200, %eax\n xorl %ecx, %ecx\n cpuid\n hlt", "protected")
    vcpu.set_cpuid2([*kvm.get_supported_cpuid(), CpuidEntry(0x4000_0200, 0, 0, 0x11, 0x22, 0x33, 0x44)])
    assert vcpu.next_exit() == Hlt()
    regs = vcpu.get_regs()
    assert (regs.rax, regs.rbx, regs.rcx, regs.rdx) == (0x11, 0x22, 0x33, 0x44)


def test_translate_walks_the_guests_page_tables(start: Start) -> None:
    """KVM API §4.17."""
    vcpu = start("hlt", "long")
    found = vcpu.translate(0x12_3456)
    assert (found.physical_address, found.valid) == (0x12_3456, True)
    assert not vcpu.translate(0x80_0000_0000).valid


def test_tsc_frequency_is_known(start: Start) -> None:
    assert start("hlt").get_tsc_khz() > 100_000


def test_statistics_have_names(start: Start) -> None:
    """KVM API §4.133. Their set is the host's; a count of exits is on every x86."""
    vcpu = start("outb %al, $1\n hlt")
    if not vcpu.vm.kvm.check_extension(lib.KVM_CAP_BINARY_STATS_FD):
        pytest.skip("this host's KVM has no KVM_CAP_BINARY_STATS_FD")
    before = vcpu.get_stats()
    vcpu.next_exit()
    after = vcpu.get_stats()
    assert before.keys() == after.keys()
    assert "exits" in after
    assert after["exits"] > before["exits"]
    assert {"pages_4k", "pages_2m"} <= set(vcpu.vm.get_stats())

"""Interrupts into the guest and notifications out of it, without an exit to Python."""

import os
from collections.abc import Callable, Iterator

import pytest

from kvmpy import GuestMemory
from kvmpy._shim import lib
from kvmpy.errors import KvmError
from kvmpy.kvm import Exit, Hlt, IoOut, MmioWrite, Vcpu, Vm
from kvmpy.kvm.vm import IrqchipRoute, MsiRoute

pytestmark = pytest.mark.kvm

LONG = 20.0  # seconds
APIC = 0xFEE0_0000
MSI_VECTOR_40 = (APIC, 0x40)  # address: APIC id 0; data: fixed, edge (Intel SDM vol. 3 §11.11)

WAIT = f"""
        movl $handler, %eax                     # a 64-bit interrupt gate, its selector the boot GDT's code
        movl $0x7000 + 0x40 * 16, %edi
        movw %ax, (%rdi)
        shrl $16, %eax
        movl $0x8e000010, 2(%rdi)               # selector 0x10, then the type: bytes 4 and 5
        movw %ax, 6(%rdi)
        lidt idtr
        movl $0x80000, %esp
        movl ${APIC}, %ebx
        movl $0x1ff, 0xF0(%rbx)                 # spurious vector 0xff, APIC on
        outb %al, $1                            # ready
1:      sti
        hlt
        jmp 1b
handler:
        movb $0x77, %al
        outb %al, $0xe9
        movl $0, 0xB0(%rbx)                     # EOI
        iretq
idtr:   .word 0x41 * 16 - 1
        .quad 0x7000
"""
RANG = IoOut(0xE9, 1, b"\x77")


@pytest.fixture
def eventfd() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    yield fd
    os.close(fd)


@pytest.fixture
def waiting(vm: Vm, start: Callable[..., Vcpu]) -> Vcpu:
    """A vCPU that waits in HLT, in the kernel, for vector 0x40 and answers it with `RANG`."""
    vm.create_irqchip()
    vcpu = start(WAIT, "long")
    vcpu.set_budget(timeout=LONG)
    assert vcpu.next_exit() == IoOut(1, 1, b"\x10")
    return vcpu


def test_signal_msi_interrupts_the_guest(vm: Vm, waiting: Vcpu) -> None:
    """KVM API §4.70, KVM_SIGNAL_MSI: above 0 when it was delivered."""
    for _ in range(3):
        assert vm.signal_msi(*MSI_VECTOR_40)
        assert waiting.next_exit() == RANG


def test_signal_msi_without_a_taker_says_so(vm: Vm, waiting: Vcpu) -> None:
    """Nobody has APIC id 9."""
    assert not vm.signal_msi(APIC | 9 << 12, 0x40)


def test_irqfd_through_an_msi_route(vm: Vm, waiting: Vcpu, eventfd: int) -> None:
    """KVM API §4.75 and §4.52: a write of the eventfd raises the GSI, which here is a message."""
    vm.set_gsi_routing([MsiRoute(24, *MSI_VECTOR_40)])
    vm.irqfd(eventfd, 24)
    for _ in range(3):
        os.eventfd_write(eventfd, 1)
        assert waiting.next_exit() == RANG
    vm.remove_irqfd(eventfd, 24)
    os.eventfd_write(eventfd, 1)
    waiting.set_budget(timeout=0.02)
    assert waiting.next_exit() != RANG


def test_irq_line_reaches_the_pin_that_the_table_says(vm: Vm, start: Callable[..., Vcpu], memory: GuestMemory) -> None:
    """KVM API §4.52: GSI 7 is wired to pin 1 of the master PIC; initialised to 0x40, that is vector 0x41."""
    vm.create_irqchip()
    vm.set_gsi_routing([IrqchipRoute(7, lib.KVM_IRQCHIP_PIC_MASTER, 1)])
    initialise = "".join(
        f"movb ${value}, %al\n outb %al, ${port}\n"
        for port, value in ((0x20, 0x11), (0x21, 0x40), (0x21, 4), (0x21, 1), (0x21, 0))
    )
    vcpu = start(initialise + "outb %al, $1\n 1: sti\n hlt\n jmp 1b\n .org 0x100\n outb %al, $0xe9\n iret")
    lapic = vcpu.get_state("LAPIC")
    lapic.regs[0x351] = b"\x07"  # LINT0: ExtINT, not masked
    lapic.regs[0x352] = b"\0"
    vcpu.set_state("LAPIC", lapic)
    memory.write(0x41 * 4, bytes.fromhex("00110000"))
    vcpu.set_budget(timeout=LONG)
    assert vcpu.next_exit() == IoOut(1, 1, b"\0")
    vm.irq_line(7, True)
    vm.irq_line(7, False)
    assert vcpu.next_exit() == IoOut(0xE9, 1, b"\0")


def test_irqfd_with_resampling_is_level_triggered(
    vm: Vm, start: Callable[..., Vcpu], memory: GuestMemory, eventfd: int
) -> None:
    """KVM API §4.75: the pin stays up until the guest's EOI, which lowers it and writes the resamplefd."""
    vm.create_irqchip()
    resamplefd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    handler = "outb %al, $0xe9\n movb $0x20, %al\n outb %al, $0x20\n outb %al, $2\n iret"
    edges = "movw $0x4d0, %dx\n movb $0x20, %al\n outb %al, %dx\n"  # ELCR: IRQ 5 by level
    initialise = "".join(
        f"movb ${value}, %al\n outb %al, ${port}\n"
        for port, value in ((0x20, 0x11), (0x21, 0x40), (0x21, 4), (0x21, 1), (0x21, 0))
    )
    vcpu = start(f"{edges} {initialise} outb %al, $1\n 1: sti\n hlt\n jmp 1b\n .org 0x100\n {handler}")
    lapic = vcpu.get_state("LAPIC")
    lapic.regs[0x351], lapic.regs[0x352] = b"\x07", b"\0"  # LINT0: ExtINT, not masked
    vcpu.set_state("LAPIC", lapic)
    memory.write(0x45 * 4, bytes.fromhex("00110000"))
    vcpu.set_budget(timeout=LONG)
    assert vcpu.next_exit() == IoOut(1, 1, b"\0")
    vm.irqfd(eventfd, 5, resamplefd=resamplefd)
    for _ in range(3):
        os.eventfd_write(eventfd, 1)
        exit = vcpu.next_exit()
        assert isinstance(exit, IoOut)
        assert exit.port == 0xE9
        with pytest.raises(BlockingIOError):
            os.eventfd_read(resamplefd)
        assert vcpu.next_exit() == IoOut(2, 1, b"\x20")
        assert os.eventfd_read(resamplefd) == 1
    vm.remove_irqfd(eventfd, 5)
    os.close(resamplefd)


def outs(vcpu: Vcpu) -> list[Exit]:
    """Return the exits up to the HLT."""
    seen: list[Exit] = []
    while (exit := vcpu.next_exit()) != Hlt():
        seen.append(exit)
    return seen


def test_ioeventfd_takes_writes_without_an_exit(vm: Vm, start: Callable[..., Vcpu], eventfd: int) -> None:
    """KVM API §4.59: the size must fit too."""
    vcpu = start("movl $0xd0000000, %edi\n movl %eax, (%edi)\n movl %eax, (%edi)\n movw %ax, (%edi)\n hlt", "protected")
    vm.ioeventfd(eventfd, 0xD000_0000, 4)
    assert outs(vcpu) == [MmioWrite(0xD000_0000, b"\0\0")]
    assert os.eventfd_read(eventfd) == 2


def test_ioeventfd_with_datamatch_takes_only_that_value(vm: Vm, start: Callable[..., Vcpu], eventfd: int) -> None:
    code = "".join(f"movl ${value}, (%edi)\n" for value in (1, 2, 1))
    vcpu = start(f"movl $0xd0000000, %edi\n {code} hlt", "protected")
    vm.ioeventfd(eventfd, 0xD000_0000, 4, datamatch=1)
    assert outs(vcpu) == [MmioWrite(0xD000_0000, b"\x02\0\0\0")]
    assert os.eventfd_read(eventfd) == 2


def test_ioeventfd_of_a_port_can_be_taken_away(vm: Vm, start: Callable[..., Vcpu], eventfd: int) -> None:
    vcpu = start("movw $0x600, %dx\n outb %al, %dx\n outb %al, $1\n outb %al, %dx\n hlt")
    vm.ioeventfd(eventfd, 0x600, 1, pio=True, datamatch=0)
    assert vcpu.next_exit() == IoOut(1, 1, b"\0")
    assert os.eventfd_read(eventfd) == 1
    vm.remove_ioeventfd(eventfd, 0x600, 1, pio=True, datamatch=0)
    assert vcpu.next_exit() == IoOut(0x600, 1, b"\0")
    with pytest.raises(BlockingIOError):
        os.eventfd_read(eventfd)


def test_ioeventfd_twice_is_refused(vm: Vm, eventfd: int) -> None:
    vm.ioeventfd(eventfd, 0x600, 1, pio=True)
    with pytest.raises(KvmError, match=r"^KVM_IOEVENTFD: EEXIST \(address=0x600 size=1\)$"):
        vm.ioeventfd(eventfd, 0x600, 1, pio=True)


def test_mp_state_can_be_set(vm: Vm, memory: GuestMemory) -> None:
    """KVM API §4.39: an AP waits for INIT, and may be made runnable without."""
    vm.create_irqchip()
    vm.create_vcpu(0)
    other = vm.create_vcpu(1)
    assert other.get_mp_state() == lib.KVM_MP_STATE_UNINITIALIZED
    other.set_mp_state(lib.KVM_MP_STATE_RUNNABLE)
    assert other.get_mp_state() == lib.KVM_MP_STATE_RUNNABLE


def test_irqchip_state_can_be_read_and_set(vm: Vm) -> None:
    vm.create_irqchip()
    for chip_id in (lib.KVM_IRQCHIP_PIC_MASTER, lib.KVM_IRQCHIP_PIC_SLAVE, lib.KVM_IRQCHIP_IOAPIC):
        vm.set_irqchip(vm.get_irqchip(chip_id))


def test_clock_can_be_set(vm: Vm) -> None:
    """KVM API §4.29, §4.30, in nanoseconds."""
    vm.set_clock(1_000_000_000_000)
    assert 1_000_000_000_000 <= vm.get_clock() < 2_000_000_000_000

"""Memory slots: what is RAM, what may only be read, what was written, and what is gone."""

import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest

from kvmpy import GuestMemory, MiB, real_mode
from kvmpy._shim import lib
from kvmpy.errors import KvmError
from kvmpy.kvm import Hlt, IoOut, MmioRead, MmioWrite, Vcpu, Vm

pytestmark = pytest.mark.kvm
Start = Callable[..., Vcpu]

SLOT = 0x20_0000  # above the 2 MiB of the fixture


@pytest.fixture
def extra():
    """1 MiB more, for a slot of its own; closed after the VM."""
    with GuestMemory(1 * MiB) as extra:
        yield extra


def touch(instructions: str) -> str:
    return f"movl ${SLOT}, %edi\n {instructions}\n hlt"


def test_guest_and_host_see_the_same_bytes(start: Start, memory: GuestMemory) -> None:
    memory.write(0x3000, b"host")
    vcpu = start("movl 0x3000, %eax\n movl %eax, 0x4000\n movl $0x74736567, 0x4004\n hlt", "protected")
    assert vcpu.next_exit() == Hlt()
    assert memory.read(0x4000, 8) == b"hostgest"


def test_read_only_slot_reads_as_ram_and_writes_as_mmio(extra: GuestMemory, vm: Vm, start: Start) -> None:
    """KVM API §4.35, KVM_MEM_READONLY: writes are reported as KVM_EXIT_MMIO, and RAM stays as it is."""
    extra.write(0, b"\x11\x22\x33\x44")
    vcpu = start(touch("movl (%edi), %eax\n movl %eax, %ebx\n movl $5, (%edi)\n movl (%edi), %ecx"), "protected")
    vm.set_user_memory_region(slot=1, guest_phys_addr=SLOT, memory=extra.regions[0], flags=lib.KVM_MEM_READONLY)
    assert vcpu.next_exit() == MmioWrite(SLOT, b"\x05\0\0\0")
    assert vcpu.next_exit() == Hlt()
    assert (vcpu.get_regs().rbx, vcpu.get_regs().rcx) == (0x4433_2211, 0x4433_2211)
    assert extra.read(0, 4) == b"\x11\x22\x33\x44"


def test_deleted_slot_is_mmio(extra: GuestMemory, vm: Vm, start: Start) -> None:
    vcpu = start(touch("movl $7, (%edi)\n outb %al, $1\n movl $8, (%edi)\n movl (%edi), %eax"), "protected")
    vm.set_user_memory_region(slot=1, guest_phys_addr=SLOT, memory=extra.regions[0])
    assert isinstance(vcpu.next_exit(), IoOut)
    vm.delete_user_memory_region(1)
    assert vcpu.next_exit() == MmioWrite(SLOT, b"\x08\0\0\0")
    assert vcpu.next_exit() == MmioRead(SLOT, 4)
    assert extra.read(0, 4) == b"\x07\0\0\0"


def test_slot_may_come_back_elsewhere(extra: GuestMemory, vm: Vm, start: Start) -> None:
    vcpu = start(touch("movb $1, (%edi)\n outb %al, $1\n movl 0x100000(%edi), %eax"), "protected")
    vm.set_user_memory_region(slot=1, guest_phys_addr=SLOT, memory=extra.regions[0])
    vcpu.next_exit()
    vm.delete_user_memory_region(1)
    vm.set_user_memory_region(slot=1, guest_phys_addr=SLOT + 0x10_0000, memory=extra.regions[0])
    assert vcpu.next_exit() == Hlt()
    assert vcpu.get_regs().rax == 1


def test_dirty_log_has_the_pages_written_since_the_last_call(extra: GuestMemory, vm: Vm, start: Start) -> None:
    """KVM API §4.8, KVM_GET_DIRTY_LOG: one bit a page; reading it clears it."""
    stores = "movb $1, 0x3000(%edi)\n movb $1, 0x9fff(%edi)\n movl 0x5000(%edi), %eax\n outb %al, $1\n"
    vcpu = start(touch(stores + "movb $2, 0x9000(%edi)"), "protected")
    flags = lib.KVM_MEM_LOG_DIRTY_PAGES
    vm.set_user_memory_region(slot=1, guest_phys_addr=SLOT, memory=extra.regions[0], flags=flags)
    vcpu.next_exit()
    log = vm.get_dirty_log(1)
    assert len(log) == 1 * MiB // 4096 // 8
    assert int.from_bytes(log, "little") == 1 << 3 | 1 << 9
    assert not any(vm.get_dirty_log(1))
    vcpu.next_exit()
    assert int.from_bytes(vm.get_dirty_log(1), "little") == 1 << 9


@pytest.mark.parametrize(
    ("gpa", "name", "detail"),
    [
        (0x10_0000, "EEXIST", "slot=1 gpa=0x100000 size=0x100000"),
        (0x30_0800, "EINVAL", "slot=1 gpa=0x300800 size=0x100000"),
    ],
)
def test_impossible_slot_is_refused(
    vm: Vm, memory: GuestMemory, extra: GuestMemory, gpa: int, name: str, detail: str
) -> None:
    """KVM API §4.35: slots do not overlap; addresses are page-aligned."""
    with pytest.raises(KvmError, match=rf"^KVM_SET_USER_MEMORY_REGION: {name} \({detail}\)$"):
        vm.set_user_memory_region(slot=1, guest_phys_addr=gpa, memory=extra.regions[0])


def test_access_across_the_end_of_ram_is_split(start: Start) -> None:
    """The part in RAM is RAM, the part beyond is MMIO; nothing is lost, nothing doubled."""
    vcpu = start(f"movl ${SLOT - 2}, %edi\n movl $0x44332211, (%edi)\n movl (%edi), %eax\n hlt", "protected")
    assert vcpu.next_exit() == MmioWrite(SLOT, b"\x33\x44")
    exit = vcpu.next_exit()
    assert exit == MmioRead(SLOT, 2)
    assert isinstance(exit, MmioRead)
    exit.reply(b"\xaa\xbb")
    assert vcpu.next_exit() == Hlt()
    assert vcpu.get_regs().rax == 0xBBAA_2211


@pytest.mark.parametrize("by_region", [False, True])
def test_vm_keeps_the_memory_of_its_slots(vm: Vm, by_region: bool) -> None:
    """Lifetimes: nobody else need hold what the guest runs in. Else it would run in what is mapped there next."""
    memory = GuestMemory(1 * MiB)
    memory.write(0x1000, b"\xf4")
    mapped = f"{memory.hva:x}-"
    if by_region:
        memory.map_into(vm)
    else:
        vm.set_user_memory_region(slot=0, guest_phys_addr=0, memory=memory)
    dropped = weakref.ref(memory)
    del memory
    gc.collect()
    assert mapped in Path("/proc/self/maps").read_text()
    vcpu = vm.create_vcpu(0)
    real_mode(vcpu, 0x1000)
    assert vcpu.next_exit() == Hlt()
    vm.close()
    gc.collect()
    assert dropped() is None

"""A hundred machines in one process leave no descriptor, no thread and no memory behind."""

import gc
import os
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from guest_code import assemble, set_up

from kvmpy import GuestMemory, Kvm, MiB
from kvmpy.kvm import IoIn
from kvmpy.machine.boot.plan import BootOptions
from kvmpy.pc import MachineSpec, Pc

pytestmark = pytest.mark.kvm

FINISH = "movw $0x3f8, %dx\n outb %al, %dx\n outb %al, $0xe9\n outb %al, $0x80\n outb %al, $0xf4\n hlt"
WARM_UP, MACHINES = 10, 100


class Held(NamedTuple):
    """What this process holds."""

    descriptors: list[str]
    threads: int
    maps: int
    resident: int


def held() -> Held:
    gc.collect()
    return Held(
        sorted(os.listdir("/proc/self/fd")),
        threading.active_count(),
        len(Path("/proc/self/maps").read_text().splitlines()),
        int(Path("/proc/self/statm").read_text().split()[1]) * 4096,
    )


@pytest.fixture
def image(tmp_path: Path) -> str:
    path = tmp_path / "guest.bin"
    path.write_bytes(assemble(FINISH))
    return str(path)


def spec(image: str, **options: object) -> MachineSpec:
    return MachineSpec(image, memory=8 * MiB, boot_options=BootOptions(format="flat"), **options)


def run_once(image: str, **options: object) -> None:
    with Pc(spec(image, **options)) as pc:
        assert pc.run(timeout=20.0).status == 0


def check(work: Callable[[], object]) -> None:
    """Do ``work`` often, and compare what is held before and after; what the first times load is no leak."""
    for _ in range(WARM_UP):
        work()
    before = held()
    for _ in range(MACHINES):
        work()
    after = held()
    assert after.descriptors == before.descriptors
    assert after.threads == before.threads
    assert after.maps <= before.maps + 8  # the allocators' own, which do not grow with the count
    assert after.resident <= before.resident + 8 * MiB


def test_hundred_pcs_leave_nothing_behind(image: str) -> None:
    check(lambda: run_once(image, cores=2))


def test_hundred_pcs_that_never_ran_leave_nothing_behind(image: str) -> None:
    check(lambda: Pc(spec(image)).close())


def test_hundred_pcs_that_cannot_be_made_leave_nothing_behind(tmp_path: Path) -> None:
    """The image is found bad when the VM and its memory are there already."""
    path = tmp_path / "empty"
    path.touch()

    def fail() -> None:
        with pytest.raises(Exception, match="empty"):
            Pc(spec(str(path)))

    check(fail)


def test_hundred_vms_of_level_1_leave_nothing_behind(kvm: Kvm) -> None:
    """Also when an exit, which shares the run page, outlives its vCPU for a while."""
    kept: list[object] = []

    def work() -> None:
        with kvm.create_vm() as vm, GuestMemory(1 * MiB) as memory:
            memory.map_into(vm)
            vcpu = vm.create_vcpu(0)
            set_up(vcpu, memory, assemble("inb $1, %al\n hlt"), "real")
            exit = vcpu.next_exit()
            assert isinstance(exit, IoIn)
            kept[:] = [exit]
            vm.close()

    for _ in range(WARM_UP):
        work()
    check(work)


def test_closed_pc_is_garbage(image: str) -> None:
    """Nothing global holds it: neither the loop nor a thread."""
    pc = Pc(spec(image))
    pc.run(timeout=20.0)
    pc.close()
    gone = weakref.ref(pc)
    del pc
    gc.collect()
    assert gone() is None

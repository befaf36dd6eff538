"""Type-1 style: host CPUs of its own for each vCPU, memory locked, exits left to the guest; or refused."""

import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvmpy import Kvm, MiB
from kvmpy._shim import lib
from kvmpy.machine.machine import EndReason
from kvmpy.pc import Pc
from kvmpy.pc.dedicated import Dedication, dedicate, describe_exits

pytestmark = pytest.mark.kvm

FINISH = "xorl %eax, %eax\n outb %al, $KVMPY_PORT_EXIT\n hlt"


@contextmanager
def host_cpus(count: int) -> Iterator[list[int]]:
    """Let this thread use only ``count`` host CPUs; skip where there are fewer."""
    before = os.sched_getaffinity(0)
    if len(before) < count:
        pytest.skip(f"this process may use {len(before)} host CPUs, {count} are needed")
    chosen = sorted(before)[:count]
    os.sched_setaffinity(0, chosen)
    try:
        yield chosen
    finally:
        os.sched_setaffinity(0, before)


def test_one_core_gets_the_last_cpu_and_we_the_rest(kvm: Kvm) -> None:
    with host_cpus(2) as cpus:
        dedication = dedicate(kvm, 1)
    assert (dedication.vcpu_cpus, dedication.host_cpus) == ((cpus[1],), frozenset(cpus[:1]))
    assert not dedication.disable_exits & ~kvm.check_extension(lib.KVM_CAP_X86_DISABLE_EXITS)


@pytest.mark.parametrize(("cores", "missing"), [(2, 1), (5, 4), (100, 99)])
def test_too_few_host_cpus_are_refused_with_what_is_missing(kvm: Kvm, cores: int, missing: int) -> None:
    with host_cpus(2), pytest.raises(ValueError, match="--dedicated needs") as caught:
        dedicate(kvm, cores)
    assert str(caught.value) == (
        f"--dedicated needs {cores + 1} host CPUs ({cores} for vCPUs, 1 for the host): "
        f"{missing} missing, this process may use 2"
    )


def test_refused_pc_leaves_the_affinity_alone(make_pc: Callable[..., Pc]) -> None:
    with host_cpus(1) as cpus:
        with pytest.raises(ValueError, match="1 missing"):
            make_pc(FINISH, dedicated=True)
        assert os.sched_getaffinity(0) == set(cpus)


def test_dedicated_pc_runs_on_cpus_that_nobody_of_ours_shares(make_pc: Callable[..., Pc]) -> None:
    """Its vCPU's thread has one CPU, ours have the others; memory is there and locked before the guest begins."""
    with host_cpus(2) as cpus:
        pc = make_pc(FINISH, dedicated=True)
        own = pc.machine.threads[0].call(lambda vcpu: os.sched_getaffinity(0))
        assert own == {cpus[1]}
        assert os.sched_getaffinity(0) == {cpus[0]}
        assert os.fstat(pc.memory.fd).st_blocks * 512 == 4 * MiB
        locked = re.search(r"^VmLck:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
        assert locked is not None
        assert int(locked[1]) >= 4 * 1024
        assert pc.run(timeout=20.0).status == 0
        pc.close()
        assert os.sched_getaffinity(0) == set(cpus)


def test_dedicated_pc_can_be_closed_by_another_thread(make_pc: Callable[..., Pc]) -> None:
    """It gives the CPUs back to the thread from which it took them."""
    with host_cpus(2) as cpus:
        pc = make_pc(FINISH, dedicated=True)
        closer = threading.Thread(target=pc.close)
        closer.start()
        closer.join()
        assert os.sched_getaffinity(0) == set(cpus)


def test_dedicated_pc_may_be_closed_after_its_maker_has_ended(make_pc: Callable[..., Pc]) -> None:
    with host_cpus(2):
        made: list[Pc] = []
        maker = threading.Thread(target=lambda: made.append(make_pc(FINISH, dedicated=True)))
        maker.start()
        maker.join()
        made[0].close()


def test_halted_dedicated_guest_ends_by_its_time(make_pc: Callable[..., Pc]) -> None:
    """HLT may be the guest's own here: nobody can see that it halted, and the limit still holds."""
    with host_cpus(2):
        result = make_pc("cli\n 1: hlt\n jmp 1b", dedicated=True).run(timeout=0.2)
    assert result.reason is EndReason.TIMEOUT


def test_two_dedicated_pcs_after_each_other(make_pc: Callable[..., Pc]) -> None:
    with host_cpus(2):
        for _ in range(2):
            pc = make_pc(FINISH, dedicated=True)
            assert pc.run(timeout=20.0).status == 0
            pc.close()


def test_disabled_exits_have_names() -> None:
    mask = lib.KVM_X86_DISABLE_EXITS_HLT | lib.KVM_X86_DISABLE_EXITS_MWAIT
    assert describe_exits(mask) == "HLT, MWAIT"
    assert describe_exits(0) == "none"
    assert Dedication((1,), frozenset({0}), mask).disable_exits == mask

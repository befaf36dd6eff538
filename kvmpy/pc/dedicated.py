"""Type-1 style: a guest whose vCPUs share nothing with the host.

A type-1 hypervisor gives a guest its own processors; a process under Linux competes for them. This mode takes the
competition away: one host CPU for each vCPU thread and none of them shared with our own other threads, memory
populated and locked, and HLT, PAUSE and MWAIT left to the guest instead of the host's scheduler.
"""

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from kvmpy._shim import lib
from kvmpy.kvm import Kvm


class Dedication(NamedTuple):
    """Which host CPUs the vCPUs get, which remain for our other threads, and which exits are disabled."""

    vcpu_cpus: tuple[int, ...]
    host_cpus: frozenset[int]
    disable_exits: int


def dedicate(kvm: Kvm, cores: int) -> Dedication:
    """Choose host CPUs for ``cores`` vCPUs: the highest-numbered, because interrupts prefer the lowest.

    Raises:
        ValueError: this process may use too few; the message says how many are missing.
    """
    available = sorted(os.sched_getaffinity(0))
    needed = cores + 1
    if len(available) < needed:
        raise ValueError(
            f"--dedicated needs {needed} host CPUs ({cores} for vCPUs, 1 for the host): "
            f"{needed - len(available)} missing, this process may use {len(available)}"
        )
    wanted = lib.KVM_X86_DISABLE_EXITS_HLT | lib.KVM_X86_DISABLE_EXITS_PAUSE | lib.KVM_X86_DISABLE_EXITS_MWAIT
    possible = kvm.check_extension(lib.KVM_CAP_X86_DISABLE_EXITS)
    return Dedication(tuple(available[-cores:]), frozenset(available[:-cores]), wanted & possible)


def restore_affinity() -> Callable[[], None]:
    """Return a function that gives the calling thread back the host CPUs which it may use now. From any thread."""
    thread, cpus = threading.get_native_id(), os.sched_getaffinity(0)

    def restore() -> None:
        with suppress(ProcessLookupError):  # the thread has ended
            os.sched_setaffinity(thread, cpus)

    return restore


def describe_exits(mask: int) -> str:
    """Return the names of the exits that ``mask`` disables, for people."""
    names = {
        "HLT": lib.KVM_X86_DISABLE_EXITS_HLT,
        "PAUSE": lib.KVM_X86_DISABLE_EXITS_PAUSE,
        "MWAIT": lib.KVM_X86_DISABLE_EXITS_MWAIT,
    }
    return ", ".join(name for name, bit in names.items() if mask & bit) or "none"

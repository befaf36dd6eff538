"""What all tests share: the ``kvm`` marker, and machines for a few lines of assembly.

A test that is marked ``kvm`` is skipped where ``/dev/kvm`` cannot be used, with the reason; the closing summary says
how many were.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import guest_code
import pytest
from guest_code import assemble, set_up

from kvmpy import Kvm, KvmUnavailable, MiB
from kvmpy.kvm import Vcpu, Vm
from kvmpy.machine.boot.plan import BootOptions, CpuMode
from kvmpy.machine.memory import GuestMemory
from kvmpy.pc import MachineSpec, Pc, RunResult

NO_KVM = "no usable /dev/kvm: "


@cache
def why_no_kvm() -> str:
    """Return why this host cannot run guests, or nothing when it can."""
    try:
        Kvm().close()
    except KvmUnavailable as error:
        return str(error)
    return ""


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("kvm") and why_no_kvm():
        pytest.skip(NO_KVM + why_no_kvm())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = [report for report in terminalreporter.stats.get("skipped", []) if NO_KVM in str(report.longrepr)]
    if skipped:
        terminalreporter.write_line(f"{len(skipped)} kvm tests were skipped: {NO_KVM}{why_no_kvm()}", yellow=True)


def pytest_configure(config: pytest.Config) -> None:
    cache_plugin = getattr(config, "cache", None)
    if cache_plugin is not None:
        guest_code.keep_in(cache_plugin.mkdir("kvmpy-guests"))


# --- level 1 ----------------------------------------------------------------------------------------------------


@pytest.fixture
def kvm() -> Iterator[Kvm]:
    """An open /dev/kvm."""
    with Kvm() as kvm:
        yield kvm


@pytest.fixture
def vm(kvm: Kvm) -> Iterator[Vm]:
    """A VM without memory, irqchip or vCPUs."""
    with kvm.create_vm() as vm:
        yield vm


@pytest.fixture
def memory(vm: Vm) -> Iterator[GuestMemory]:
    """2 MiB of guest memory, which are slot 0 of ``vm``; closed after it."""
    with GuestMemory(2 * MiB) as memory:
        memory.map_into(vm)
        yield memory
        vm.close()


@pytest.fixture
def start(vm: Vm, memory: GuestMemory) -> Callable[..., Vcpu]:
    """Return a function that gives a vCPU about to run some assembly: ``start(text, mode="real")``."""

    def start(text: str, mode: str = "real") -> Vcpu:
        vcpu = vm.create_vcpu(0)
        set_up(vcpu, memory, assemble(text, mode), mode)
        return vcpu

    return start


# --- level 2 ----------------------------------------------------------------------------------------------------

OF_PC = ("tracer", "serial", "debugcon", "virtio_console", "on_restart")


@pytest.fixture
def make_pc(tmp_path: Path) -> Iterator[Callable[..., Pc]]:
    """Return a function that makes a `Pc` which boots some assembly; the test's end closes it.

    ``make_pc(text, mode="real", **fields of MachineSpec)``; what is in OF_PC goes to the Pc.
    """
    with ExitStack() as stack:
        numbers = iter(range(10_000))

        def make(text: str, mode: str = "real", **options: Any) -> Pc:
            image = tmp_path / f"guest{next(numbers)}.bin"
            image.write_bytes(assemble(text, mode))
            of_pc = {name: options.pop(name) for name in OF_PC if name in options}
            boot_options = BootOptions(format="flat", mode=CpuMode(mode))
            spec = {"memory": 4 * MiB, "boot_options": boot_options} | options
            return stack.enter_context(Pc(MachineSpec(os.fspath(image), **spec), **of_pc))

        yield make


@pytest.fixture
def run_guest(make_pc: Callable[..., Pc]) -> Callable[..., RunResult]:
    """Return a function that runs some assembly in a `Pc` to its end: as ``make_pc``, and ``timeout`` in seconds."""

    def run(text: str, mode: str = "real", *, timeout: float = 10.0, **options: Any) -> RunResult:
        return make_pc(text, mode, **options).run(timeout=timeout)

    return run

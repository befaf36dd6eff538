"""A guest whose instructions our completions execute, and the oracle that executes the same."""

from collections.abc import Iterator

import pytest
from assist_guest import AssistedBench
from native_state import COMPONENTS, Guest, Oracle

from kvmpy import Kvm
from kvmpy.kvm import Vcpu
from kvmpy.machine.assist.fpu import CR4_OSXSAVE
from kvmpy.machine.probe.bench import Bench


@pytest.fixture(scope="session")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    """The host's processor by way of signal frames."""
    return Oracle(tmp_path_factory.mktemp("oracle"))


@pytest.fixture
def bench() -> Iterator[AssistedBench]:
    """A VM whose emulation failures are completed."""
    with Kvm() as kvm, AssistedBench(kvm) as made:
        yield made


@pytest.fixture
def vcpu(bench: AssistedBench) -> Iterator[Vcpu]:
    """A vCPU of it, at CPL 0."""
    with bench.start(b"") as made:
        yield made


@pytest.fixture
def guest() -> Iterator[Guest]:
    """A vCPU in 64-bit code at CPL 0, with its first 16 MiB mapped, and AVX in use."""
    with Kvm() as kvm, Bench(kvm) as bench, bench.start(b"") as vcpu:
        sregs = vcpu.get_sregs()
        sregs.cr4 |= CR4_OSXSAVE
        vcpu.set_sregs(sregs)
        xcrs = vcpu.get_state("XCRS")
        xcrs.xcrs[0].value = COMPONENTS
        vcpu.set_state("XCRS", xcrs)
        yield Guest(vcpu, bench.memory, lambda instruction: None)

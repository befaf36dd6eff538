"""AVX registers of a program survive when the kernel runs another, also where KVM leaves XSAVE to kvmpy."""

from pathlib import Path

import linux_runs
import pytest
from linux_runs import initramfs, kernel, run

from kvmpy.machine.probe import has
from kvmpy.pc.result import ExitStatus

pytestmark = linux_runs.pytestmark


@pytest.fixture(scope="module")
def survival(tmp_path_factory: pytest.TempPathFactory) -> linux_runs.Run:
    """Two processes that look after their registers, under a kernel that then ends by a triple fault."""
    folder = tmp_path_factory.mktemp("avx")
    append = "console=ttyS0 quiet panic=-1 reboot=t"
    return run(kernel("vmlinux"), "--initrd", initramfs(folder / "i.cpio", "avx_pair"), append=append)


def test_avx_registers_survive_a_switch_of_processes(survival: linux_runs.Run) -> None:
    if "avx_pair: no AVX" in survival.output:
        pytest.skip("this processor has no AVX")
    assert survival.line("^avx_pair: ") == "avx_pair: 0 of 300 rounds corrupt"


def test_reboot_by_triple_fault_ends_the_run_as_one(survival: linux_runs.Run) -> None:
    assert survival.status == ExitStatus.CRASH, survival
    assert survival.line(r"reboot: Restarting system")
    assert survival.line("^kvmpy: vCPU 0: triple fault, last known rip 0x")
    assert "panicked" not in survival.said


def test_without_xsave_that_program_sees_them_corrupt(tmp_path: Path) -> None:
    """So it can tell: here AVX works in user programs though the kernel has not turned it on, and saves nothing."""
    if has("xgetbv-cpl0"):
        pytest.skip("here no program has AVX when its kernel has not turned it on")
    initrd = initramfs(tmp_path / "i.cpio", "avx_pair")
    done = run(kernel("vmlinux"), "--initrd", initrd, append="console=ttyS0 quiet panic=-1 noxsave -- anyway")
    assert int(done.line("^avx_pair: .* of 300 rounds corrupt").split()[1]) > 0
    assert done.status == ExitStatus.RESET

"""Every way in which a kernel leaves the machine, on every kernel: too many boots for each day's tests."""

from pathlib import Path

import linux_runs
import pytest
from linux_runs import CAMPAIGN, command, initramfs, kernel, run
from linux_terminal import PROMPT, Terminal

from kvmpy.pc.result import ExitStatus

pytestmark = [*linux_runs.pytestmark, pytest.mark.skipif(not CAMPAIGN, reason="a part of make campaign-linux")]

KERNELS = ("vmlinux", "vmlinux-smp", "vmlinux-full")
WAYS = {"k": ExitStatus.RESET, "t": ExitStatus.CRASH, "a": ExitStatus.RESET}
"""reboot=: the keyboard controller, a triple fault, and ACPI or whatever the kernel has in its place."""


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", KERNELS)
def test_reboot_ends_the_run(tmp_path: Path, name: str, way: str) -> None:
    initrd = initramfs(tmp_path / "i.cpio", "init_tiny")
    cores = "1" if name == "vmlinux" else "2"
    append = f"console=ttyS0 quiet panic=-1 reboot={way}"
    done = run(kernel(name), "--cores", cores, "--initrd", initrd, append=append)
    assert done.status == WAYS[way], done
    assert done.line("^init: up ")
    assert "panicked" not in done.said


def test_reboot_by_acpi_is_the_write_of_its_register(tmp_path: Path) -> None:
    initrd = initramfs(tmp_path / "i.cpio", "init_tiny")
    append = "console=ttyS0 quiet panic=-1 reboot=a"
    done = run(kernel("vmlinux-full"), "--stats", "--initrd", initrd, append=append)
    assert done.status == ExitStatus.RESET, done
    assert int(done.line("^  reset ").split()[-1]) > 0
    assert "keyboard" not in done.said


def test_power_off_ends_the_run(tmp_path: Path) -> None:
    initrd = initramfs(tmp_path / "i.cpio", "init_tiny")
    done = run(kernel("vmlinux-full"), "--initrd", initrd, append="console=ttyS0 quiet panic=-1 -- poweroff")
    assert done.status == 0, done
    assert done.line("reboot: Power down")


def test_reboot_boots_again_where_that_is_wanted(tmp_path: Path) -> None:
    initrd = initramfs(tmp_path / "i.cpio", "busybox")
    options = ("-i", "--initrd", initrd, "--on-reboot", "restart", "-v")
    with Terminal(command(kernel("vmlinux-full"), *options, append="console=ttyS0 quiet panic=-1")) as terminal:
        terminal.until(PROMPT)
        terminal.type("reboot -f\r")
        terminal.until("restart 1")
        terminal.until(PROMPT)
        terminal.type("poweroff -f\r")
        assert terminal.end() == 0

"""Somebody sits at the guest's shell: ``kvmpy run -i``."""

from pathlib import Path

import linux_runs
from linux_runs import command, initramfs, kernel
from linux_terminal import CTRL_C, PROMPT, Terminal

from kvmpy.pc.result import ExitStatus

pytestmark = linux_runs.pytestmark


def test_keys_reach_the_shell_and_ctrl_c_its_program(tmp_path: Path) -> None:
    """Ctrl-C ends the guest's program, not kvmpy; the end of the guest is the end of the run."""
    initrd = initramfs(tmp_path / "i.cpio", "busybox")
    words = command(kernel("vmlinux"), "-i", "--initrd", initrd, append="console=ttyS0 quiet panic=-1")
    with Terminal(words) as terminal:
        terminal.until(PROMPT)
        assert terminal.obey("echo $((6*7))") == "42\n"
        terminal.type("echo begun; sleep 1000\r")
        terminal.until("\nbegun\n")
        terminal.type(CTRL_C)
        terminal.until(PROMPT)
        assert terminal.obey("echo status $?") == "status 130\n"
        terminal.type("reboot -f\r")
        assert terminal.end() == ExitStatus.RESET
    assert "the guest reset the machine" in terminal.screen

"""An unmodified Linux boots with no more than ``console=ttyS0``, whatever the host's KVM leaves undone."""

from pathlib import Path

import linux_runs
from linux_runs import PLAIN, ext4, initramfs, kernel, run

from kvmpy.machine.boot.plan import BootOptions
from kvmpy.machine.probe import has
from kvmpy.pc.linux import NATIVE_RING_0, host_words
from kvmpy.pc.result import ExitStatus
from kvmpy.storage.convert import import_disk

pytestmark = linux_runs.pytestmark


def test_pvh_kernel_boots_to_its_init(tmp_path: Path) -> None:
    """It is told what this host demands, and all that the host left undone was counted."""
    done = run(kernel("vmlinux"), "--initrd", initramfs(tmp_path / "i.cpio", "init_tiny"), "--stats", "-v")
    assert done.status == ExitStatus.RESET, done
    assert done.line(r"^init: up \d+\.\d\d \d+\.\d\d$")
    assert done.said.count("kvmpy: the guest reset the machine\n") == 1
    assert "kvm-clock: Using msrs" in done.output
    assert ", starts in protected mode at " in done.line("vmlinux: PVH")

    words = host_words(has, BootOptions())
    told = " ".join([PLAIN, *(word.text for word in words)])
    assert done.line("kvmpy: command line: ") == f"kvmpy: command line: {told}"
    assert done.line(r"\] Command line: ").endswith(f"Command line: {told}")
    added = [line for line in done.said.splitlines() if "added to it" in line]
    assert added == [f"kvmpy: added to it: {word.text}: {word.why}" for word in words]

    completed = "completed for the host's KVM" in done.said
    assert completed == (not has(NATIVE_RING_0))
    for name, ability in (("int3", "int3-cpl0"), ("syscall", "syscall-cpl3")):
        if not has(ability):
            assert int(done.line(rf"^  {name} +\d+$").split()[1]) > 0


def test_bzimage_on_two_cores_has_a_shell_on_ext4_that_a_pipe_feeds(tmp_path: Path) -> None:
    """Both processors run programs; nothing of the pipe is lost, though it is there before the guest."""
    ext4(tmp_path / "root.img", with_shell=True)
    import_disk(str(tmp_path / "root.img"), str(tmp_path / "root.blob"), format="raw")
    script = (
        "echo first $((6 * 7))",
        "grep -c ^processor /proc/cpuinfo",
        "for cpu in 1 2; do taskset $cpu awk '{ print \"on processor \" $39 }' /proc/self/stat; done",
        "grep ' / ext4 rw' /proc/mounts",
        "exit",
    )
    append = "console=ttyS0 panic=-1 reboot=a root=/dev/vda rw"
    options = ("--cores", "2", "--disk", tmp_path / "root.blob")
    done = run(kernel("bzImage-smp"), *options, append=append, typed="".join(f"{line}\n" for line in script))
    assert done.status == ExitStatus.RESET, done
    assert "smp: Brought up 1 node, 2 CPUs" in done.output
    assert done.line("^first 42$")
    assert done.line("^2$")
    assert done.line("^on processor 0$")
    assert done.line("^on processor 1$")
    assert done.line("^/dev/root / ext4 rw")


def test_panic_is_reported_with_its_last_lines_and_exact_words_stay_alone() -> None:
    exact = f"{PLAIN} root=/dev/vda kvmpy.test=1"
    done = run(kernel("vmlinux"), "--append-exact", "-v", append=exact)
    assert done.status == ExitStatus.CRASH, done
    assert done.line("kvmpy: command line: ") == f"kvmpy: command line: {exact}"
    assert done.line(r"\] Command line: ").endswith(f"] Command line: {exact}")
    assert "added to it" not in done.said

    said = done.said.splitlines()
    why = next(line for line in said if line.startswith("kvmpy: the guest's kernel panicked: "))
    assert "Unable to mount root fs" in why
    last_words = [line for line in said[said.index(why) :] if line.startswith("  [")]
    assert any("Kernel panic - not syncing: VFS: Unable to mount root fs" in line for line in last_words)

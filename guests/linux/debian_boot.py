"""Boot Debian's stock kernel, unmodified, and say how far it came: ``make debian-guest``.

``build/debian`` gets the package, the kernel as ``vmlinuz``, ``initramfs.cpio`` (`debian_initramfs`), a disk with an
ext4 file system, and the console of the last boot, each line with its time, as ``console.txt``.

    debian_boot.py              its init looks around, reads a file of the disk, and powers off; milestones with times
    debian_boot.py --shell      a shell, for somebody who types
    debian_boot.py --words      the command line, word by word, with reasons
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import debian
import debian_image
import debian_initramfs
import debian_words
import newc
import rootfs
from debian_milestones import Line, Progress

ROOT = Path(__file__).resolve().parents[2]
OUTPUT = ROOT / "build" / "debian"
BUSYBOX = "busybox-static"
TIME_LIMIT = 1500
MEMORY = "128M"
LOOK_AROUND = "uname -sr; cat /mnt/hello; cat /proc/loadavg"
GREETING = b"hello from a disk\n"


def prepare() -> tuple[Path, Path, Path]:
    """Return kernel, initial root file system and disk, made anew: that takes a few seconds."""
    packages = OUTPUT / "packages"
    image = debian_image.unpack(debian.fetch(debian_image.newest(), packages))
    busybox = debian.member(debian.fetch(debian.choose(BUSYBOX, packages), packages), "./bin/busybox")
    vmlinuz, initramfs, disk = (OUTPUT / name for name in ("vmlinuz", "initramfs.cpio", "disk.img"))
    vmlinuz.write_bytes(image.vmlinuz)
    initramfs.write_bytes(debian_initramfs.archive(busybox, image.modules))
    rootfs.make_ext4(disk, [newc.program("hello", GREETING)], size=16 * rootfs.MiB)
    print(f"debian-guest: Linux {image.release}, modules {' '.join(image.modules)}", flush=True)
    return vmlinuz, initramfs, disk


def ring_0_is_slow() -> bool:
    """Tell whether this host's KVM emulates ring 0. Needs kvmpy, which is why nothing else here asks."""
    from kvmpy.pc import linux

    return linux.ring_0_is_slow()


def kvmpy_run(files: tuple[Path, Path, Path], *options: str, command: str) -> list[str]:
    """Return the command that boots; ``command`` is what init runs, or nothing: a shell."""
    vmlinuz, initramfs, disk = map(str, files)
    append = debian_words.command_line(slow=ring_0_is_slow(), command=command)
    run = [sys.executable, "-m", "kvmpy", "run", vmlinuz, "--initrd", initramfs, "--mem", MEMORY]
    # The kernel has no virtio_mmio.device= (CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES): it learns of the disk by ACPI.
    return [*run, "--virtio", "acpi", "--rng", "--disk", f"{disk},format=raw", "--append", append, *options]


def console(process: "subprocess.Popen[bytes]", started: float) -> Iterator[Line]:
    """Yield what the guest prints, line by line; a line without an end when nothing more comes."""
    assert process.stdout is not None
    for raw in process.stdout:
        yield Line(time.monotonic() - started, raw.decode(errors="replace").rstrip())


def watch(command: list[str], log: Path) -> tuple[int, Progress]:
    """Run ``command`` to its end; show each milestone as it comes, and write all lines to ``log``."""
    progress, started = Progress(), time.monotonic()
    with log.open("w") as file, subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        for line in console(process, started):
            file.write(f"{line.at:8.2f} {line.text}\n")
            file.flush()
            for name in progress.take(line):
                print(f"{line.at:8.1f} s  {name}", flush=True)
    print(f"{time.monotonic() - started:8.1f} s  the end, with status {process.returncode}")
    return process.returncode, progress


def main() -> int:
    """Do what the command line says; 0: the guest came to its shell and powered itself off."""
    parser = argparse.ArgumentParser(description="Boot Debian's stock kernel and say how far it came.")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--shell", action="store_true", help="give a shell on this terminal")
    how.add_argument(
        "--words", action="store_true", help="show the kernel's command line, word by word, and boot nothing"
    )
    parser.add_argument("--timeout", type=int, default=TIME_LIMIT, help=f"seconds for the boot ({TIME_LIMIT})")
    arguments = parser.parse_args()
    if arguments.words:
        print(debian_words.explained(slow=ring_0_is_slow()))
        return 0
    OUTPUT.mkdir(parents=True, exist_ok=True)
    files = prepare()
    if arguments.shell:
        command = kvmpy_run(files, "-i", command="")
        os.execv(command[0], command)
    log = OUTPUT / "console.txt"
    status, progress = watch(kvmpy_run(files, "--timeout", str(arguments.timeout), "--stats", command=LOOK_AROUND), log)
    print(f"{progress.report()}\nall of the console: {log.relative_to(ROOT)}")
    return 0 if status == 0 and "shell" in progress.reached else 1


if __name__ == "__main__":
    sys.exit(main())

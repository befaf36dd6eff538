"""Compile the programs of this folder, and put them and Debian's busybox into initial root file systems and a disk."""

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import newc
import rootfs
from newc import Entry, folder, link, program

HERE = Path(__file__).resolve().parent
COMPILE = [
    *("gcc", "-static", "-nostdlib", "-O2", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-march=x86-64"),
    *("-mgeneral-regs-only", "-ffreestanding", "-fno-pic", "-no-pie", "-fno-stack-protector"),
    *("-fno-asynchronous-unwind-tables", "-fcf-protection=none", "-s"),
    "-Wl,--build-id=none,-z,noexecstack,-z,max-page-size=0x1000",
]
PROGRAMS = ("init_tiny", "bench", "avx_pair", "ext4_writer")
INITRAMFS = {"tiny": "init_tiny", "bench": "bench", "avx": "avx_pair", "ext4": "ext4_writer"}
ON_PATH = ("bench", "avx_pair", "ext4_writer")

FOLDERS = [folder(name) for name in ("dev", "proc", "sys", "mnt", "tmp")]
CONSOLE = newc.character_device("dev/console", 5, 1)
POWER_BUTTON = "etc/acpi/PWRF/00000080"  # what busybox's acpid runs at the event of that name
ROOTFS_SIZE = 16 * rootfs.MiB


def compile_program(name: str, target: Path) -> None:
    """Make the static program ``name`` from its one file."""
    command: list[str | Path] = [*COMPILE, HERE / f"{name}.c", "-o", target]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{result.stderr}".rstrip())


def user_space(busybox: bytes, programs: dict[str, bytes]) -> list[Entry]:
    """Return what a shell needs: busybox, which is its own applets, and the programs of this folder."""
    etc = [folder("etc"), folder("etc/acpi"), folder("etc/acpi/PWRF")]
    script = b"#!/bin/sh\nsync\nexec poweroff -f\n"
    shell = [folder("bin"), folder("sbin"), program("bin/busybox", busybox), link("bin/sh", "busybox")]
    return [*FOLDERS, *etc, program(POWER_BUTTON, script), *shell, *(program(f"bin/{n}", programs[n]) for n in ON_PATH)]


def make_initramfs(target: Path, init: bytes, rest: Iterable[Entry] = ()) -> None:
    """Write an initial root file system with ``init`` as its first program."""
    target.write_bytes(newc.archive([*(rest or FOLDERS), CONSOLE, program("init", init)]))


def make_all(target: Path, busybox: bytes) -> None:
    """Put every program, archive and disk into the folder ``target``."""
    for name in PROGRAMS:
        compile_program(name, target / name)
    programs = {name: (target / name).read_bytes() for name in PROGRAMS}
    for kind, name in INITRAMFS.items():
        make_initramfs(target / f"initramfs-{kind}.cpio", programs[name])
    shell = (HERE / "init.sh").read_bytes()
    rest = user_space(busybox, programs)
    make_initramfs(target / "initramfs-busybox.cpio", shell, rest)
    inits = [
        program("sbin/init", programs["init_tiny"]),
        program("sbin/init.sh", shell),
        program("sbin/bench", programs["bench"]),
    ]
    rootfs.make_ext4(target / "rootfs.ext4", [*rest, *inits], size=ROOTFS_SIZE)


def outputs() -> tuple[str, ...]:
    """Return the names of what `make_all` makes."""
    archives = (f"initramfs-{kind}.cpio" for kind in (*INITRAMFS, "busybox"))
    return (*PROGRAMS, *archives, "rootfs.ext4")

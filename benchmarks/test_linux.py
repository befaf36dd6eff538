"""Linux: from the start of the process to the kernel's first byte, to its init and to the end; what its services cost.

Beside QEMU's microvm, with the kernel `vmlinux-patched` where it is there: the same one with three small changes for
VMMs that complete nothing (an unpatched one does not boot under QEMU on hosts that emulate ring 0). kvmpy boots both.
QEMU gets its small firmware and no devices but the serial port and, for reads, a disk. Where its microvm has no reset
for the guest, its process is ended when the kernel says that it restarts, and the end is not compared.

The kernels are those of `make linux-guest`, or of the folder that KVMPY_TEST_LINUX names.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from statistics import median

import pytest
from conftest import OUTPUT, ROOT
from process import KVMPY_RUN, plain_environment
from sampling import Row, figure, ratio

sys.path.insert(0, str(ROOT / "tests"))
import linux_guest

BOOTS, FIRST_BYTES, MEASUREMENTS = 7, 15, 3
MEBIBYTES = 128
DISK_SIZE = 64 << 20
HELLO, RESTARTS = b"init: up", b"estarting system"
TUNED = (
    "console=ttyS0 panic=-1 reboot=k mitigations=off rodata=off noxsave nofsgsbase lpj=10000000 "
    "clearcpuid=141,308,297,580,288,158,306,151,311,312,534,514"
)
"""Features whose use costs time where ring 0 is emulated, and calibration: what makes the figures comparable."""
SERVICES = {
    "getppid": ("system call (getppid)", 1),
    "page_fault": ("page fault, anonymous", 1),
    "pipe_round_trip": ("context switch (half a pipe round trip)", 2),
    "fork_exit": ("fork, exit and wait", 1),
    "read_4k_random": ("4 KiB O_DIRECT random read", 1),
    "read_1m_sequential": ("1 MiB O_DIRECT sequential read", 1),
}
LINE = re.compile(rb"^(\w+) (\d+) ns", re.MULTILINE)


@cache
def compiled(program: str) -> Path:
    """Return a program of guests/linux."""
    target = OUTPUT / program
    OUTPUT.mkdir(parents=True, exist_ok=True)
    linux_guest.module("programs").compile_program(program, target)
    return target


@cache
def initramfs(program: str) -> str:
    """Return an initial root file system whose init is ``program``."""
    target = OUTPUT / f"{program}.cpio"
    linux_guest.module("programs").make_initramfs(target, compiled(program).read_bytes())
    return str(target)


def kvmpy(kernel: str, init: str, words: str, *options: str) -> list[str]:
    files = [str(linux_guest.file(kernel)), "--initrd", initramfs(init)]
    return [*KVMPY_RUN, *files, "--mem", f"{MEBIBYTES}M", "--append", words, *options]


def qemu(init: str, words: str, disk: Path | None = None) -> list[str]:
    """Return the QEMU that boots the patched kernel; without a QEMU or that kernel the benchmark is skipped."""
    program = shutil.which("qemu-system-x86_64")
    if program is None:
        pytest.skip("qemu-system-x86_64 is not installed: apt install qemu-system-x86")
    files = ["-kernel", str(linux_guest.file("vmlinux-patched")), "-initrd", initramfs(init)]
    machine = (
        "-M microvm,acpi=off,x-option-roms=off,rtc=off -accel kvm -cpu qemu64,+xsaveerptr -nodefaults -no-user-config"
    )
    options = [*machine.split(), *f"-nographic -serial stdio -no-reboot -m {MEBIBYTES}M".split()]
    if disk is not None:
        options += ["-drive", f"id=disk,file={disk},format=raw,if=none,cache=none"]
        options += ["-device", "virtio-blk-device,drive=disk"]
    return [program, *options, *files, "-append", words]


def times_of(command: list[str], *, until: bytes | None = None) -> dict[str, float]:
    """Run ``command`` and return the seconds to its first byte, to the init's line and to its end.

    ``until``: end it there, when the guest has said so much.
    """
    seen: dict[str, float] = {}
    output = b""
    started = time.perf_counter()
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=dict(plain_environment()),
    )
    assert process.stdout is not None
    with process.stdout:
        while chunk := os.read(process.stdout.fileno(), 1 << 16):
            now = time.perf_counter() - started
            seen.setdefault("first byte", now)
            output += chunk
            if HELLO in output:
                seen.setdefault("init", now)
            if until is not None and until in output:
                process.kill()
    process.wait()
    seen["end"] = time.perf_counter() - started
    assert "init" in seen or until == b"\n", output[-2000:]
    return seen


def test_first_byte(rows: list[Row]) -> None:
    words = f"{TUNED} earlyprintk=ttyS0"
    commands = {
        "qemu": qemu("init_tiny", words),
        "patched": kvmpy("vmlinux-patched", "init_tiny", words),
        "unpatched": kvmpy("vmlinux", "init_tiny", words),
    }
    found: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(FIRST_BYTES):
        for name, command in commands.items():
            found[name].append(1000 * times_of(command, until=b"\n")["first byte"])
    rows.append(ratio("Linux, first byte / QEMU", "ms", found["unpatched"], found["qemu"], aim=0.8))
    rows.append(ratio("  the patched kernel in both", "ms", found["patched"], found["qemu"], aim=0.8))


def test_boot(rows: list[Row]) -> None:
    words = f"{TUNED} quiet"
    commands = {
        "qemu": qemu("init_tiny", words),
        "patched": kvmpy("vmlinux-patched", "init_tiny", words),
        "unpatched": kvmpy("vmlinux", "init_tiny", words),
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    for _ in range(BOOTS):
        for name, command in commands.items():
            found[name].append(times_of(command, until=RESTARTS if name == "qemu" else None))
    theirs = [times["init"] for times in found["qemu"]]
    rows.append(ratio("Linux, init / QEMU", "s", [times["init"] for times in found["unpatched"]], theirs, aim=0.8))
    rows.append(
        ratio("  the patched kernel in both", "s", [times["init"] for times in found["patched"]], theirs, aim=0.8)
    )
    ends = [times["end"] for times in found["qemu"]]
    rows.append(ratio("Linux, end / QEMU, killed", "s", [times["end"] for times in found["unpatched"]], ends, aim=0.8))
    rows.append(figure("Linux, init, 1 core", "s", [times["init"] for times in found["unpatched"]], aim=7.5))


def test_boot_two_cores(rows: list[Row]) -> None:
    command = kvmpy("vmlinux-smp", "init_tiny", f"{TUNED} quiet", "--cores", "2")
    rows.append(figure("Linux, init, 2 cores", "s", [times_of(command)["init"] for _ in range(BOOTS)], aim=11))


def test_boot_untuned(rows: list[Row]) -> None:
    command = kvmpy("vmlinux", "init_tiny", "console=ttyS0 panic=-1 reboot=k quiet")
    rows.append(figure("Linux, init, 1 core, untuned", "s", [times_of(command)["init"] for _ in range(BOOTS)]))


# --- services ---------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A raw disk of random bytes."""
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        for _ in range(DISK_SIZE >> 20):
            file.write(os.urandom(1 << 20))
        os.fsync(file.fileno())
    yield path
    path.unlink()


def services_of(command: list[str]) -> dict[str, float]:
    """Run ``command`` until the measuring program has come to its end; return its figures in microseconds."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=dict(plain_environment()),
    )
    output = b""
    assert process.stdout is not None
    with process.stdout:
        while b"bench: end" not in output and (chunk := os.read(process.stdout.fileno(), 1 << 16)):
            output += chunk
    process.kill()
    process.wait()
    assert b"bench: end" in output, output[-2000:]
    return {name.decode(): int(value) / 1000 for name, value in LINE.findall(output)}


def test_services(rows: list[Row], disk: Path) -> None:
    words = f"{TUNED} quiet"
    commands = {
        "qemu": qemu("bench", words, disk),
        "kvmpy": kvmpy("vmlinux", "bench", words, "--disk", f"{disk},format=raw,cache=direct"),
        "host": [str(compiled("bench")), str(disk)],
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    for _ in range(MEASUREMENTS):
        for name, command in commands.items():
            found[name].append(services_of(command))
    for key, (title, parts) in SERVICES.items():
        ours, theirs, hosts = ([run[key] / parts for run in found[name]] for name in ("kvmpy", "qemu", "host"))
        rows.append(ratio(f"{title} / QEMU", "us", ours, theirs))
        rows.append(figure("  the same on the host", "us", [median(hosts)]))

"""Runs of Linux guests, and root file systems made for one test from guests/linux, which takes a second."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import linux_guest
import pytest

newc, programs, rootfs = (linux_guest.module(name) for name in ("newc", "programs", "rootfs"))
kernel = linux_guest.file
"""A kernel by its name: vmlinux, vmlinux-smp, bzImage, ..."""

PLAIN = "console=ttyS0 panic=-1 reboot=k"
"""All that a kernel needs to be told to speak and to end; the rest kvmpy has to see to."""
TIME_LIMIT = 250
"""Seconds; a boot takes three on an idle host, and has no bound on a busy one."""
CAMPAIGN = "KVMPY_CAMPAIGN" in os.environ

pytestmark = [pytest.mark.kvm, pytest.mark.timeout(7200 if CAMPAIGN else TIME_LIMIT + 50)]
"""Of each module here."""


@cache
def busybox() -> bytes:
    """Return Debian's static busybox. Skips where it is not there."""
    found = shutil.which("busybox")
    if found is None:
        pytest.skip("busybox is not installed: apt install busybox-static")
    return Path(found).read_bytes()


@cache
def compiled(name: str) -> bytes:
    """Return the program ``name`` of guests/linux."""
    with tempfile.TemporaryDirectory() as scratch:
        programs.compile_program(name, Path(scratch) / name)
        return (Path(scratch) / name).read_bytes()


def shell() -> tuple[bytes, list[Any]]:
    """Return the first process that starts a shell, and the files that it needs."""
    rest = programs.user_space(busybox(), {name: compiled(name) for name in programs.ON_PATH})
    return (linux_guest.SOURCES / "init.sh").read_bytes(), rest


def initramfs(target: Path, init: str) -> Path:
    """Write an initial root file system to ``target``: ``init`` is a program of guests/linux, or ``busybox``."""
    if init == "busybox":
        programs.make_initramfs(target, *shell())
    else:
        programs.make_initramfs(target, compiled(init))
    return target


def ext4(target: Path, *, with_shell: bool = False) -> Path:
    """Write an ext4 file system with a journal to ``target``; ``with_shell``, with that first process in /sbin."""
    entries = [*programs.FOLDERS]
    if with_shell:
        init, entries = shell()
        entries = [*entries, newc.program("sbin/init.sh", init), newc.link("sbin/init", "init.sh")]
    rootfs.make_ext4(target, entries, size=16 << 20)
    return target


class Run(NamedTuple):
    """What came of ``kvmpy run``: its exit status, what the guest printed, and what kvmpy said."""

    status: int
    output: str
    said: str

    def line(self, pattern: str) -> str:
        """Return the first line of either that ``pattern`` is found in."""
        lines = (self.output.replace("\r", "") + "\n" + self.said).splitlines()
        found = next((line for line in lines if re.search(pattern, line)), None)
        assert found is not None, f"no line has {pattern!r}: {self}"
        return found


def command(image: Path, *options: str | Path, append: str = PLAIN) -> list[str]:
    """Return the command line that runs ``image``."""
    run = [sys.executable, "-m", "kvmpy", "run", image, "--append", append, "--timeout", TIME_LIMIT, *options]
    return [str(word) for word in run]


def run(image: Path, *options: str | Path, append: str = PLAIN, typed: str = "") -> Run:
    """Run a kernel to its end; ``typed`` comes from standard input, which is a pipe."""
    words = command(image, *options, append=append)
    done = subprocess.run(words, input=typed, capture_output=True, text=True, check=False)
    return Run(done.returncode, done.stdout, done.stderr)


@contextmanager
def started(image: Path, *options: str | Path, append: str = PLAIN) -> Iterator[subprocess.Popen[bytes]]:
    """Start a kernel whose output comes through a pipe; it is killed at the end of the block."""
    process = subprocess.Popen(
        command(image, *options, append=append),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        process.stderr.close()

"""Kernels that cannot boot here, through the command line: one line that says why, and the documented status."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from boot_images import BANNER, CODE, Load, bzimage, elf, multiboot1, patch, pvh, pvh_note
from packed_images import PACK

from kvmpy.cli.main import main
from kvmpy.units import MiB

USAGE, IMAGE = 192, 194


class Bad(NamedTuple):
    """A file that is no kernel for this machine, the options of ``kvmpy run``, and what must be said of it."""

    kernel: bytes
    words: tuple[str, ...]
    options: tuple[str, ...] = ()
    status: int = IMAGE


def image_of(offset: int, magic: bytes) -> bytes:
    """Return a file with a magic."""
    return bytes(offset) + magic + bytes(4096)


AT = r"\(at offset 0x[0-9a-f]+\)"
WHOSE = r"command line of \d+ bytes( \(\d+ given, \d+ added: .*\))?: "
"""What an unknown host adds is in it too."""
INITRD = ("--initrd", "initrd")
KERNELS = {
    "boot protocol too old": Bad(bzimage(version=0x020A), ("2.10 of Linux 6.1.0-kvmpy-test", "2.12", "Linux 3.8", AT)),
    "32-bit bzImage": Bad(bzimage(xloadflags=0), ("no 64-bit entry", "XLF_KERNEL_64", "Linux 6.1.0-kvmpy-test", AT)),
    "zImage": Bad(bzimage(loadflags=0), ("a zImage", "a bzImage is wanted", AT)),
    "32-bit vmlinux": Bad(elf(Load(MiB, BANNER), bits=32), ("Linux 6.1.0-test", "PVH", "bzImage", AT)),
    "vmlinux without PVH": Bad(
        elf(Load(MiB, BANNER)), ("Linux 6.1.0-test", "CONFIG_PVH, Linux 5.0", AT), ("--append", "quiet")
    ),
    "ELF for AArch64": Bad(patch(pvh(), 18, 183, 2), ("AArch64", "x86-64 .e_machine 62. is wanted", AT)),
    "ELF for RISC-V": Bad(patch(elf(Load(MiB)), 18, 243, 2), ("RISC-V", "x86-64", AT)),
    "ELF64 for i386": Bad(patch(elf(Load(MiB)), 18, 3, 2), ("ELF64 for i386", AT)),
    "big-endian ELF": Bad(patch(elf(Load(MiB)), 5, 2, 1), ("little-endian", "x86", AT)),
    "arm64 Image": Bad(image_of(0x38, b"ARM\x64"), ("AArch64", "x86-64 is wanted", AT)),
    "arm64 Image.gz": Bad(PACK["gzip"](image_of(0x38, b"ARM\x64")), ("unpacked", "AArch64", AT)),
    "arm zImage": Bad(image_of(0x24, b"\x18\x28\x6f\x01"), ("32-bit ARM", AT)),
    "RISC-V Image": Bad(image_of(0x38, b"RSC\x05"), ("RISC-V", AT)),
    "uImage": Bad(image_of(0, b"\x27\x05\x19\x56"), ("uImage", AT)),
    "EFI program": Bad(image_of(0, b"MZ"), ("EFI program", "setup header of a bzImage", AT)),
    "initrd as kernel": Bad(image_of(0, b"070701"), ("cpio", "initrd", AT)),
    "truncated bzImage": Bad(bzimage()[:-1], ("truncated", "2048 bytes at offset 0x600 wanted", "3583", AT)),
    "truncated setup": Bad(bzimage()[:1000], ("truncated", "the file has 1000 bytes", AT)),
    "truncated vmlinux": Bad(pvh()[:-1], ("truncated", AT)),
    "packed with zstd": Bad(image_of(0, b"\x28\xb5\x2f\xfd"), ("packed with zstd", "zstd -dc", AT)),
    "packed with LZ4": Bad(image_of(0, b"\x04\x22\x4d\x18"), ("packed with LZ4 in its frame format", "lz4 -dc", AT)),
    "packed with LZO": Bad(image_of(0, b"\x89LZO\0\r\n\x1a\n"), ("packed with LZO", "lzop -dc", AT)),
    "damaged xz": Bad(PACK["xz"](pvh())[:-30], ("xz", "truncated|damaged", AT)),
    "packed bomb": Bad(PACK["xz"](bytes(5 * MiB)), ("more than 4 MiB", AT), ("--mem", "4M")),
    "unknown": Bad(b"\x12\x34" * 999, ("no boot protocol found", "--format flat", AT)),
    "bzImage too large": Bad(
        bzimage(init_size=64 * MiB),
        ("no room for 64 MiB", "1 MiB to 0x2000000", "80 MiB of memory would do", AT),
        ("--mem", "32M"),
    ),
    "vmlinux too large": Bad(
        elf(Load(16 * MiB, memsz=20 * MiB), notes=pvh_note(16 * MiB)),
        ("0x1000000..0x23fffff is outside 32 MiB", "36 MiB of memory would do", AT),
        ("--mem", "32M"),
    ),
    "kernel in the hole": Bad(
        elf(Load(3072 * MiB, memsz=MiB), notes=pvh_note(3072 * MiB)),
        (r"outside 32 MiB of RAM( \(|$)", AT),
        ("--mem", "32M"),
    ),
    "initrd beside bzImage": Bad(
        bzimage(init_size=60 * MiB),
        ("no room for 60 MiB", "0x3d80000 .initrd.", "77 MiB of memory would do", AT),
        ("--mem", "62.5M", *INITRD),
    ),
    "initrd over vmlinux": Bad(
        elf(Load(30 * MiB, memsz=MiB), notes=pvh_note(30 * MiB)),
        ("overlaps initrd at 0x1e80000..0x1f7ffff", "32 MiB of memory would do", AT),
        ("--mem", "31.5M", *INITRD),
    ),
    "initrd without room": Bad(
        bzimage(),
        ("9 MiB of initrd and modules .large. do not fit", "0x800000", "26 MiB of memory would do", AT),
        ("--mem", "8M", "--initrd", "large"),
    ),
    "initrd above its limit": Bad(
        bzimage(initrd_addr_max=0x8F_FFFF), ("do not fit", "1 MiB and 0x900000 ", AT), ("--initrd", "large")
    ),
    "empty initrd": Bad(pvh(), ("^kvmpy: empty: the file is empty", AT), ("--initrd", "empty")),
    "missing initrd": Bad(bzimage(), ("^kvmpy: missing: No such file",), ("--initrd", "missing")),
    "directory as initrd": Bad(bzimage(), ("^kvmpy: folder: is a directory",), ("--initrd", "folder")),
    "command line above cmdline_size": Bad(
        bzimage(cmdline_size=9), (WHOSE + "this kernel takes 9 ", AT), ("--append", "x" * 10)
    ),
    "command line above 2048 of a vmlinux": Bad(
        pvh(code=BANNER), (WHOSE + "Linux 6.1.0-test takes 2047 ", AT), ("--append", "x" * 2048)
    ),
    "command line above 64 KiB": Bad(pvh(), ("of 65536 bytes: 65535 are allowed",), ("--append", "x" * 65536), USAGE),
    "command line above 64 KiB, multiboot": Bad(
        multiboot1(), ("no room for command lines: 65537 bytes",), ("--append", "x" * 65536), USAGE
    ),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory to be in, with files for initrds."""
    monkeypatch.chdir(tmp_path)
    for name, size in (("empty", 0), ("initrd", MiB), ("large", 9 * MiB)):
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, size)
    (tmp_path / "folder").mkdir()
    return tmp_path


@pytest.fixture
def run(folder: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Return a function that runs ``kvmpy`` in this process and returns status, standard output and error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        capfd.readouterr()
        status = main([*arguments])
        return status, *capfd.readouterr()

    return run


@pytest.mark.kvm
@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_that_cannot_boot_is_refused_in_one_line(run, folder, name):
    """What, where in hex, what is allowed, how much memory would do; never a traceback."""
    bad = KERNELS[name]
    (folder / "kernel").write_bytes(bad.kernel)
    status, out, err = run("run", "kernel", *bad.options)
    assert (status, out, err.count("\n")) == (bad.status, "", 1), err
    for word in bad.words:
        assert re.search(word, err), (word, err)


OPTIONS_OF_RUN = ("--initrd", "--append")


@pytest.mark.parametrize("name", [name for name, bad in KERNELS.items() if not set(bad.options) & set(OPTIONS_OF_RUN)])
def test_inspect_says_the_same(run, folder, name):
    """As a finding: the status is 0."""
    bad = KERNELS[name]
    (folder / "kernel").write_bytes(bad.kernel)
    status, out, err = run("inspect", "kernel", *bad.options)
    assert (status, err) == (0, "")
    (why,) = re.findall(r"^boots +no: (.*)$", out, re.MULTILINE)
    for word in bad.words:
        assert word == AT or word == "unpacked" or re.search(word, why), (word, out)


@pytest.mark.kvm
def test_a_vmlinux_whose_words_the_host_adds_to_says_whose_are_whose(run, folder):
    """Disks on the command line take their share of what Linux reads."""
    (folder / "kernel").write_bytes(pvh(code=BANNER))
    (folder / "disk").write_bytes(bytes(512))
    status, _, err = run("run", "kernel", "--append", "x" * 2020, "--disk", "disk,readonly,format=raw")
    assert status == IMAGE
    assert re.search(WHOSE + "Linux 6.1.0-test takes 2047", err), err
    assert re.search(r"\(2020 given, \d+ added: virtio_mmio\.device\b", err), err


@pytest.mark.kvm
@pytest.mark.parametrize("packing", PACK)
def test_a_packed_kernel_runs(run, folder, packing):
    """Straight from the download: here a flat ELF kernel that writes 7 to the exit port."""
    code = bytes.fromhex("b007 e6f4 f4") + CODE  # mov $7, %al; out %al, $0xf4; hlt
    (folder / "kernel").write_bytes(PACK[packing](elf(Load(MiB, code))))
    assert run("run", "kernel", "--timeout", "10") == (7, "", "")
    assert re.search(rf"^packed +with {packing}: \d+ bytes unpacked$", run("inspect", "kernel")[1], re.MULTILINE)

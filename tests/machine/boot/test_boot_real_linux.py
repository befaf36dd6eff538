"""Real Linux kernels, where there are any: what the loader makes of them, and what it says of them."""

import linux_guest
import pytest

from kvmpy import MiB
from kvmpy.machine import layout
from kvmpy.machine.boot import BootOptions, CpuMode, boot
from kvmpy.machine.boot.detect import open_image
from kvmpy.machine.boot.elf import load_segments, read_elf
from kvmpy.machine.boot.inspection import inspect
from kvmpy.machine.boot.linux import linux_version
from kvmpy.machine.memory import GuestMemory
from kvmpy.pc import MachineSpec, Pc


def file(name: str) -> str:
    """Return the path of a built file."""
    return str(linux_guest.file(name))


PAIRS = pytest.mark.parametrize(("packed", "plain"), [("bzImage", "vmlinux"), ("bzImage-smp", "vmlinux-smp")])


@PAIRS
def test_a_kernel_unpacked_from_its_bzimage_is_its_vmlinux(packed, plain):
    """Every PT_LOAD, byte for byte, bss included, and the entry."""
    with GuestMemory(64 * MiB) as memory, open_image(file(plain), BootOptions(), limit=memory.size) as image:
        entry = boot(file(packed), memory, BootOptions(unpack=True, append="quiet"))
        elf = read_elf(image)
        assert elf is not None
        assert (entry.mode, entry.rip, dict(entry.registers)) == (CpuMode.LONG, elf.entry, {"rsi": layout.BOOT_INFO})
        assert entry.notes[0].startswith("unpacked on the host: ")
        for segment in load_segments(image, elf):
            contents = image.read(segment.offset, segment.file_size).ljust(segment.memory_size, b"\0")
            assert memory.read(segment.gpa, segment.memory_size) == contents


@pytest.mark.kvm
def test_an_unpacked_kernel_runs():
    """To its first line."""
    printed = bytearray()

    def print_(data: bytes) -> None:
        printed.extend(data)
        if b"Linux version" in printed:
            pc.stop()

    options = BootOptions(append="earlyprintk=ttyS0", unpack=True)
    with Pc(MachineSpec(file("bzImage"), memory=64 * MiB, boot_options=options), serial=print_) as pc:
        pc.run(timeout=60)
    assert b"Linux version" in printed


@PAIRS
def test_bzimage_and_vmlinux_say_the_same_version(packed, plain):
    versions = set()
    for name in (packed, plain):
        with open_image(file(name), BootOptions(), limit=64 * MiB) as image:
            versions.add(linux_version(image))
    assert len(versions) == 1
    assert None not in versions


@PAIRS
def test_inspect_tells_how_they_boot(packed, plain):
    assert (inspect(file(packed)).boots, inspect(file(plain)).boots) == ("bzimage", "pvh")
    assert inspect(file(packed)).linux == inspect(file(plain)).linux is not None


def test_a_kernel_that_does_not_fit_says_how_much_memory_would_do():
    """That much is enough indeed, and a MiB less is not."""
    for name, little in (("bzImage", 8 * MiB), ("vmlinux", 16 * MiB)):
        error = inspect(file(name), memory_size=little).error
        assert error is not None
        enough = int(error.split("; ")[1].split(" MiB of memory would do")[0])
        assert inspect(file(name), memory_size=enough * MiB).error is None
        assert inspect(file(name), memory_size=(enough - 1) * MiB).error is not None

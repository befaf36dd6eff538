"""Devices that Linux is told of on its command line: behind what the user says, and only where a kernel reads them."""

import pytest
from boot_images import BANNER, bzimage, multiboot1, pvh

from kvmpy import ImageError
from kvmpy.machine import layout
from kvmpy.machine.boot import BootOptions, CpuMode, boot
from kvmpy.machine.memory import GuestMemory

DEVICES = ("virtio_mmio.device=4K@0xd0000000:5", "virtio_mmio.device=4K@0xd0001000:6")
WORDS = " ".join(DEVICES)


def cmdline(memory: GuestMemory) -> bytes:
    """Return the command line that a protocol has put where command lines are."""
    return memory.read(layout.COMMAND_LINES, 256).partition(b"\0")[0]


@pytest.mark.parametrize(
    ("append", "expected"),
    [
        ("", WORDS),
        ("quiet", f"quiet {WORDS}"),
        ("quiet ", f"quiet {WORDS}"),
        ("--", f"{WORDS} --"),
        ("quiet -- single", f"quiet {WORDS} -- single"),
        ('quiet "--" -- x', f'quiet {WORDS} "--" -- x'),
        ('dyndbg="file a.c -- +p" quiet', f'dyndbg="file a.c -- +p" quiet {WORDS}'),
        ("a--b --c", f"a--b --c {WORDS}"),
        ("quiet\t--\tx", f"quiet {WORDS} --\tx"),
    ],
)
def test_devices_stand_behind_the_users_words_and_before_inits(append: str, expected: str) -> None:
    """Linux kernel-parameters.rst: everything after "--" is passed as an argument to init."""
    assert BootOptions(append=append, devices=DEVICES).linux_cmdline == expected


@pytest.mark.parametrize("append", ["", "quiet ", "a -- b"])
def test_without_devices_the_users_words_stay_as_they_are(append: str) -> None:
    assert BootOptions(append=append).linux_cmdline == append


@pytest.mark.parametrize("image", [bzimage, pvh])
def test_linux_reads_both(write, memory, image):
    boot(write(image()), memory, BootOptions(append="quiet", devices=DEVICES))
    assert cmdline(memory) == f"quiet {WORDS}".encode()


def test_the_kernels_limit_holds_for_both_together(write, memory):
    """boot.rst, cmdline_size: the maximum size of the command line without the terminating zero."""
    options = BootOptions(append="quiet", devices=DEVICES)
    length = len(f"quiet {WORDS}")
    boot(write(bzimage(cmdline_size=length)), memory, options)
    with pytest.raises(ImageError, match=f"of {length} bytes .*: this kernel takes {length - 1}") as caught:
        boot(write(bzimage(cmdline_size=length - 1)), memory, options)
    assert "(5 given, 70 added: virtio_mmio.device x 2)" in str(caught.value)


def test_the_room_for_command_lines_holds_for_both_together(write, memory):
    room = layout.COMMAND_LINES_SIZE - 1
    boot(write(pvh()), memory, BootOptions(append="x" * (room - len(WORDS) - 1), devices=DEVICES))
    with pytest.raises(ValueError, match=f"of 65536 bytes .{room - len(WORDS)} given, 70 added: .*: 65535 are allowed"):
        boot(write(pvh()), memory, BootOptions(append="x" * (room - len(WORDS)), devices=DEVICES))


def test_a_command_line_that_linux_would_cut_off_is_refused(write, memory):
    """Linux arch/x86/include/asm/setup.h: COMMAND_LINE_SIZE is 2048, and PVH says nothing of it. Others take more."""
    words = (*DEVICES, "clearcpuid=534,150")
    free = 2047 - len(" ".join(words)) - 1
    linux = write(pvh(code=BANNER), "linux")
    boot(linux, memory, BootOptions(append="x" * free, devices=words))
    with pytest.raises(ImageError, match=r"of 2048 bytes .*: Linux 6.1.0-test takes 2047") as caught:
        boot(linux, memory, BootOptions(append="x" * (free + 1), devices=words))
    assert f"({free + 1} given, 89 added: virtio_mmio.device x 2, clearcpuid)" in str(caught.value)
    boot(write(pvh()), memory, BootOptions(append="x" * (free + 1), devices=words))


def test_a_kernel_that_reads_no_command_line_is_not_refused(write, memory):
    """It has the parameter page, or the DSDT."""
    options = BootOptions(format="flat", mode=CpuMode.REAL, devices=DEVICES)
    boot(write(b"\xf4"), memory, options)
    assert cmdline(memory) == b""


def test_a_kernel_that_is_not_linux_gets_its_users_words_alone(write, memory):
    boot(write(multiboot1()), memory, BootOptions(append="quiet", devices=DEVICES))
    low = memory.read(layout.BIOS_AREA, layout.HIGH_MEMORY - layout.BIOS_AREA)
    assert b"quiet" in low
    assert b"virtio_mmio" not in low

"""PVH: the note, the entry, and all that hvm_start_info leads to."""

import struct

import pytest
from boot_images import CODE, Load, elf, note, pvh, pvh_note

from kvmpy import GiB, ImageError, MiB
from kvmpy.machine import layout
from kvmpy.machine.boot import BootOptions, CpuMode, Module, boot
from kvmpy.machine.memory import GuestMemory

START_INFO = "<IIIIQQQQII"


def start_info(memory: GuestMemory, gpa: int) -> tuple[int, ...]:
    """Return the fields of hvm_start_info at ``gpa``."""
    return struct.unpack(START_INFO, memory.read(gpa, struct.calcsize(START_INFO)))


def string(memory: GuestMemory, gpa: int) -> bytes:
    """Return the NUL-terminated string at ``gpa``."""
    return memory.read(gpa, 256).partition(b"\0")[0]


@pytest.mark.parametrize("bits", [64, 32])
@pytest.mark.parametrize("size", [4, 8])
def test_the_kernel_starts_at_the_notes_entry(write, memory, bits, size):
    """Xen elfnote.h, XEN_ELFNOTE_PHYS32_ENTRY: the physical 32-bit entry point; 4 or 8 bytes."""
    image = elf(Load(0x20_0000, vaddr=0xC000_0000), bits=bits, entry=0xC000_0000, notes=pvh_note(0x20_0010, size=size))
    entry = boot(write(image), memory)
    assert (entry.mode, entry.rip, dict(entry.registers)) == (CpuMode.PROTECTED, 0x20_0010, {"rbx": layout.BOOT_INFO})
    assert memory.read(0x20_0000, len(CODE)) == CODE


def test_start_info_says_what_the_specification_lists(write, memory):
    """start_info.h: magic 0x336ec578, version 1; without modules and ACPI their addresses are 0."""
    entry = boot(write(pvh()), memory, BootOptions(append="console=ttyS0"))
    magic, version, flags, modules, modlist, cmdline, rsdp, memmap, entries, reserved = start_info(
        memory, entry.registers["rbx"]
    )
    assert (magic, version, flags, modules, modlist, rsdp, reserved) == (0x336EC578, 1, 0, 0, 0, 0, 0)
    assert string(memory, cmdline) == b"console=ttyS0"
    raw = memory.read(memmap, entries * 24)
    assert [(g, s, k) for g, s, k, _ in struct.iter_unpack("<QQII", raw)] == layout.memory_map(memory.size)


def test_the_memory_map_goes_on_above_the_hole(write):
    """RAM above 4 GiB is an entry of its own."""
    with GuestMemory(3 * GiB + 512 * MiB) as memory:
        boot(write(pvh()), memory)
        *_, memmap, entries, _ = start_info(memory, layout.BOOT_INFO)
        assert (4 * GiB, 512 * MiB, 1, 0) in struct.iter_unpack("<QQII", memory.read(memmap, entries * 24))


def test_the_initrd_is_module_0(write, memory):
    """Linux pvh_start: the first module is the ramdisk. Modules lie at the top of RAM, on pages of their own."""
    initrd, extra = write(b"i" * 5000, "initrd"), write(b"extra", "extra")
    boot(write(pvh()), memory, BootOptions(initrd=initrd, modules=(Module(extra, "an argument"),)))
    count, modlist = start_info(memory, layout.BOOT_INFO)[3:5]
    assert count == 2
    (first, size, line, _), (second, size2, line2, _) = struct.iter_unpack("<QQQQ", memory.read(modlist, 64))
    assert (first, size, line) == (64 * MiB - 0x3000, 5000, 0)
    assert memory.read(first, size) == b"i" * 5000
    assert (second, memory.read(second, size2), string(memory, line2)) == (64 * MiB - 0x1000, b"extra", b"an argument")


def test_rsdp_is_passed_when_the_board_has_acpi(write, memory):
    """start_info.h, rsdp_paddr: 0 when there is no ACPI."""
    memory.write(layout.ACPI_TABLES, b"RSD PTR ".ljust(36, b"\0"))
    boot(write(pvh()), memory)
    assert start_info(memory, layout.BOOT_INFO)[6] == layout.ACPI_TABLES


@pytest.mark.parametrize("notes", [b"", note(b"Xen\0", 17, bytes(8)), note(b"Ken\0", 18, bytes(8)), bytes(8)])
def test_an_elf_file_without_the_note_is_no_pvh_kernel(write, memory, notes):
    """Only name and type together make it one."""
    path = write(elf(Load(0x10_0000), notes=notes))
    with pytest.raises(ImageError, match="no PVH kernel"):
        boot(path, memory, BootOptions(format="pvh"))
    assert boot(path, memory).mode is CpuMode.LONG


@pytest.mark.parametrize("size", [0, 1, 5, 16])
def test_a_note_of_another_size_is_refused(write, memory, size):
    """The entry has 4 bytes, or 8 in a 64-bit kernel."""
    with pytest.raises(ImageError, match=f"PVH note of {size} bytes"):
        boot(write(elf(Load(0x10_0000), notes=note(b"Xen\0", 18, bytes(size)))), memory)


@pytest.mark.parametrize("entry", [0, 0x20_3000, 0xC000_0000, 2**63])
def test_an_entry_in_no_segment_is_refused(write, memory, entry):
    """The entry is physical: a virtual one lies outside."""
    with pytest.raises(ImageError, match="in no segment") as caught:
        boot(write(pvh(entry=entry)), memory)
    assert caught.value.offset is not None


def test_a_kernel_under_the_modules_is_refused(write, memory, touched):
    """Modules never overlap the kernel; nothing is written before that is known."""
    image = elf(Load(63 * MiB, memsz=MiB), notes=pvh_note(63 * MiB))
    with pytest.raises(ImageError, match=r"segment .* overlaps .*/initrd at .*; 65 MiB of memory would do"):
        boot(write(image), memory, BootOptions(initrd=write(b"x", "initrd")))
    assert touched() == 0


def test_modules_larger_than_memory_are_refused(write, memory):
    """They fit between 1 MiB and the hole, or not at all. The file is sparse: its size decides."""
    path = write(b"x", "initrd")
    with open(path, "r+b") as file:
        file.truncate(2**40)
    with pytest.raises(ImageError, match="do not fit between 1 MiB and 0x4000000 ") as caught:
        boot(write(pvh()), memory, BootOptions(initrd=path))
    assert "would do" not in str(caught.value)


@pytest.mark.parametrize("name", ["missing", "."])
def test_an_initrd_that_is_no_file_is_named(write, memory, tmp_path, name):
    """The error blames the initrd, not the kernel."""
    path = str(tmp_path / name)
    with pytest.raises(ImageError) as caught:
        boot(write(pvh()), memory, BootOptions(initrd=path))
    assert caught.value.path == path


def test_a_command_line_that_does_not_fit_is_the_callers_mistake(write, memory):
    """64 KiB are set aside for command lines, NUL included."""
    boot(write(pvh()), memory, BootOptions(append="x" * 65535))
    with pytest.raises(ValueError, match="command line of 65536 bytes: 65535 are allowed"):
        boot(write(pvh()), memory, BootOptions(append="x" * 65536))
    with pytest.raises(ValueError, match="NUL"):
        boot(write(pvh()), memory, BootOptions(append="a\0b"))

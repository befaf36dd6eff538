"""Multiboot 1: header, load addresses and information structure (Multiboot 0.6.96; hostile case 62)."""

import struct
from dataclasses import replace
from itertools import pairwise

import pytest
from boot_images import CODE, Kludge, Load, elf, multiboot1, multiboot1_header, multiboot1_kludge, patch

from kvmpy import ImageError, MiB
from kvmpy.machine import layout
from kvmpy.machine.boot import BootOptions, CpuMode, Entry, Module, boot
from kvmpy.machine.boot.image import ImageFile
from kvmpy.machine.boot.multiboot1 import probe
from kvmpy.machine.memory import GuestMemory


def refused(path: str, memory: GuestMemory, text: str) -> ImageError:
    """Boot as multiboot 1, and return the error that must come."""
    with pytest.raises(ImageError, match=text) as caught:
        boot(path, memory, BootOptions(format="multiboot1"))
    assert caught.value.offset is not None
    return caught.value


def info(memory: GuestMemory) -> dict[str, int]:
    """Return the information structure that ebx points to, by the field names of §3.3."""
    names = "flags mem_lower mem_upper boot_device cmdline mods_count mods_addr"
    fields = dict(zip(names.split(), struct.unpack("<7I", memory.read(layout.BOOT_INFO, 28)), strict=True))
    names = "mmap_length mmap_addr drives_length drives_addr config_table boot_loader_name apm_table"
    return fields | dict(zip(names.split(), struct.unpack("<7I", memory.read(layout.BOOT_INFO + 44, 28)), strict=True))


def string(memory: GuestMemory, gpa: int) -> bytes:
    """Return the NUL-terminated string at ``gpa``."""
    return memory.read(gpa, 256).partition(b"\0")[0]


@pytest.mark.parametrize("bits", [32, 64])
def test_an_elf_kernel_starts_in_protected_mode(write, memory, bits):
    """§3.2: eax = 0x2BADB002, ebx = the information structure; whatever the ELF class."""
    entry = boot(write(multiboot1(bits=bits)), memory)
    registers = {"rax": 0x2BADB002, "rbx": layout.BOOT_INFO}
    assert (entry.mode, entry.rip, dict(entry.registers)) == (CpuMode.PROTECTED, 0x10_000C, registers)
    assert memory.read(0x10_000C, len(CODE)) == CODE


def test_the_information_structure_tells_memory_and_names(write, memory):
    """§3.3: mem_lower and mem_upper in KiB, the map with entries that say their own size."""
    boot(write(multiboot1()), memory, BootOptions(append="one two"))
    fields = info(memory)
    assert fields["flags"] == 1 << 0 | 1 << 2 | 1 << 3 | 1 << 6 | 1 << 9
    assert (fields["mem_lower"], fields["mem_upper"]) == (639, 63 * 1024)
    assert (fields["mods_count"], fields["boot_device"], fields["apm_table"]) == (0, 0, 0)
    assert string(memory, fields["cmdline"]) == b"one two"
    assert string(memory, fields["boot_loader_name"]) == b"kvmpy"
    entries = list(struct.iter_unpack("<IQQI", memory.read(fields["mmap_addr"], fields["mmap_length"])))
    assert entries == [(20, *entry) for entry in layout.memory_map(memory.size)]


def test_modules_are_page_aligned_and_listed(write, memory):
    """§3.3: mod_start, mod_end, string; the initrd is the first module."""
    options = BootOptions(initrd=write(b"a" * 4097, "a"), modules=(Module(write(b"bb", "b"), "b line"),))
    boot(write(multiboot1(flags=1)), memory, options)
    fields = info(memory)
    assert fields["mods_count"] == 2
    first, second = struct.iter_unpack("<IIII", memory.read(fields["mods_addr"], 32))
    assert first[:2] == (64 * MiB - 0x3000, 64 * MiB - 0x3000 + 4097)
    assert memory.read(first[0], 4097) == b"a" * 4097
    assert memory.read(second[0], second[1] - second[0]) == b"bb"
    assert [string(memory, s) for s in (first[2], second[2])] == [b"", b"b line"]


def test_every_piece_of_information_lies_apart(write, memory):
    """Strings, map and list do not overlap the structure or each other."""
    boot(write(multiboot1()), memory, BootOptions(append="x", modules=(Module(write(b"m", "m"), "y"),)))
    fields = info(memory)
    pieces = sorted(
        [
            (layout.BOOT_INFO, 116),
            (fields["mmap_addr"], fields["mmap_length"]),
            (fields["mods_addr"], 16 * fields["mods_count"]),
            (fields["cmdline"], 2),
            (fields["boot_loader_name"], 6),
        ]
    )
    assert all(gpa + size <= after for (gpa, size), (after, _) in pairwise(pieces))


def test_load_addresses_replace_program_headers(write, memory):
    """§3.1.3: the a.out kludge: offset = header offset - (header_addr - load_addr), bss cleared."""
    image = multiboot1_kludge(Kludge(load_addr=0x10_0020))
    memory.fill(0x10_0000, 0x5000, 0xCC)
    entry = boot(write(image), memory)
    assert entry.rip == 0x10_0060
    expected = b"\xcc" * 0x20 + image[0x20:].ljust(0x4000 - 0x20, b"\0") + b"\xcc" * 0x1000
    assert memory.read(0x10_0000, 0x5000) == expected


def test_load_end_0_means_the_whole_file_and_bss_end_0_no_bss(write, memory):
    """§3.1.3: load_end_addr, bss_end_addr."""
    boot(write(multiboot1_kludge(Kludge(load_end=0, bss_end=0))), memory)
    assert memory.read(0x10_0000, 0x200) == multiboot1_kludge(Kludge(load_end=0, bss_end=0))
    memory.fill(0x10_0000, 0x200, 0xCC)
    boot(write(multiboot1_kludge(Kludge(load_end=0x10_0080, bss_end=0))), memory)
    assert memory.read(0x10_0080, 0x180) == b"\xcc" * 0x180


def test_load_addresses_win_over_elf(write, memory):
    """§3.1.2, flag 16: the fields are used instead of those of the executable's header."""
    header = multiboot1_header(0x10003, 0x20_0060, 0x20_0000, 0, 0, 0x20_0070)
    image = elf(Load(0x10_0000, header + CODE), bits=32)
    assert image.index(header) == 0x60
    assert boot(write(image), memory).rip == 0x20_0070
    assert memory.read(0x20_0000, len(image)) == image


@pytest.mark.parametrize("wrong", [1, 2**31])
def test_a_wrong_checksum_is_refused(write, memory, wrong):
    """Case 62: magic + flags + checksum must be 0 modulo 2^32."""
    at = multiboot1_kludge().index(multiboot1_header(0x10003)[:4])
    checksum = -(0x1BADB002 + 0x10003) % 2**32
    image = patch(multiboot1_kludge(), at + 8, (checksum + wrong) % 2**32, 4)
    assert refused(write(image), memory, "wrong checksum").offset == at


def test_a_right_header_behind_a_wrong_one_is_found(write, memory):
    """The magic alone may be any number in the code."""
    k = Kludge(at=0x80, header_addr=0x10_0080, load_addr=0x10_0000, entry=0x10_00C0)
    image = patch(multiboot1_kludge(k), 0x10, 0x1BADB002, 4)
    assert boot(write(image), memory).rip == 0x10_00C0


@pytest.mark.parametrize("at", [0x42, 0x41, 0x43])
def test_a_header_that_is_not_aligned_is_not_one(write, at):
    """§3.1: the header must be longword (32-bit) aligned."""
    with ImageFile(write(multiboot1_kludge(Kludge(at=at)))) as image:
        assert probe(image) is None


@pytest.mark.parametrize("at", [8192, 8188, 8184, 9000])
def test_a_header_behind_8_kib_is_not_one(write, at):
    """Case 62: §3.1: contained completely within the first 8192 bytes of the image."""
    with ImageFile(write(multiboot1_kludge(Kludge(at=at), size=10000))) as image:
        assert probe(image) is None


def test_load_addresses_behind_8_kib_are_refused(write, memory):
    """§3.1: all of the header."""
    refused(write(multiboot1_kludge(Kludge(at=8192 - 16), size=10000)), memory, "not within the first 8192")


def test_the_last_place_for_a_header_is_good(write, memory):
    """§3.1: 32 bytes with load addresses."""
    k = Kludge(at=8192 - 32, header_addr=0x10_0000 + 8192 - 32)
    assert boot(write(multiboot1_kludge(k, size=10000)), memory).rip == k.entry


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"load_end": 0x0F_F000}, "below load_addr"),
        ({"load_end": 1}, "below load_addr"),
        ({"load_end": 0x10_0201}, "truncated"),
        ({"load_end": 0xFFFF_FFFF}, "truncated"),
        ({"bss_end": 0x10_01FF}, "below the data's end"),
        ({"bss_end": 1}, "below the data's end"),
        ({"bss_end": 0xFFFF_FFFF}, "outside 64 MiB"),
        ({"header_addr": 0x0F_FFFF}, "above header_addr"),
        ({"header_addr": 0x10_0041}, "before the file"),
        ({"load_addr": 0}, "before the file"),
        ({"load_addr": 0xFFFF_FFF0, "header_addr": 0xFFFF_FFF0, "load_end": 0, "bss_end": 0}, "in no segment"),
        ({"entry": 0x10_4000}, "in no segment"),
        ({"entry": 0x0F_FFFF}, "in no segment"),
        ({"load_end": 0x10_0000, "bss_end": 0}, "load nothing"),
        ({"header_addr": 0xC_0040, "load_addr": 0xC_0000, "bss_end": 0, "entry": 0xC_0060}, "kept for boot tables"),
    ],
)
def test_load_addresses_that_contradict_themselves_are_refused(write, memory, touched, change, text):
    """Case 62: load_end < load, bss_end that wraps, entry outside, and their kin."""
    refused(write(multiboot1_kludge(replace(Kludge(), **change))), memory, text)
    assert touched() == 0


@pytest.mark.parametrize("bit", range(3, 16))
def test_an_unknown_demand_is_refused(write, memory, bit):
    """§3.1.2: flags 0 to 15: a loader that does not understand one must refuse."""
    assert refused(write(multiboot1(flags=3 | 1 << bit)), memory, f"0x{1 << bit:x}").offset is not None


@pytest.mark.parametrize("bit", [0, 1, 2, *range(17, 32)])
def test_a_wish_or_a_served_demand_boots(write, memory, bit):
    """§3.1.2: flags 16 to 31 are optional. A video mode is a wish: the loader may report none."""
    assert isinstance(boot(write(multiboot1(flags=1 << bit)), memory), Entry)


def test_a_header_in_a_file_that_is_neither_elf_nor_addressed_is_refused(write, memory):
    """§3.1.3: load information must be there when the image is not ELF."""
    refused(write(multiboot1_header(3) + CODE), memory, "not ELF")


def test_an_elf64_entry_above_4_gib_is_refused(write, memory):
    """Protected mode has 32-bit addresses."""
    image = elf(Load(0x10_0000, multiboot1_header()), Load(2**32, CODE), entry=2**32)
    refused(write(image), memory, "out of reach")


def test_too_many_modules_are_the_callers_mistake(write, memory):
    """The boot information has 28 KiB."""
    path = write(b"m", "m")
    with pytest.raises(ValueError, match="no room for boot information"):
        boot(write(multiboot1()), memory, BootOptions(modules=(Module(path),) * 2000))

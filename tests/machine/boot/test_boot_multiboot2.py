"""Multiboot 2: the header's tags, the information's tags, relocation (Multiboot2 2.0; hostile case 62)."""

import struct

import pytest
from boot_images import (
    CODE,
    END_TAG,
    Load,
    elf,
    multiboot2,
    multiboot2_addressed,
    multiboot2_header,
    multiboot2_relocatable,
    patch,
    tag,
    words,
)

from kvmpy import ImageError, MiB
from kvmpy.machine import layout
from kvmpy.machine.boot import BootOptions, CpuMode, Module, boot
from kvmpy.machine.boot.image import ImageFile
from kvmpy.machine.boot.multiboot2 import probe
from kvmpy.machine.memory import GuestMemory

LINKED_END = 0x10_2000


def refused(path: str, memory: GuestMemory, text: str) -> ImageError:
    """Boot as multiboot 2, and return the error that must come."""
    with pytest.raises(ImageError, match=text) as caught:
        boot(path, memory, BootOptions(format="multiboot2"))
    assert caught.value.offset is not None
    return caught.value


def tags(memory: GuestMemory) -> list[tuple[int, bytes]]:
    """Return the tags at BOOT_INFO as (type, payload), walked as a kernel walks them."""
    total, reserved = struct.unpack("<II", memory.read(layout.BOOT_INFO, 8))
    assert reserved == 0
    found, at = [], 8
    while at < total:
        kind, size = struct.unpack("<II", memory.read(layout.BOOT_INFO + at, 8))
        found.append((kind, memory.read(layout.BOOT_INFO + at + 8, size - 8)))
        at += -(-size // 8) * 8
    assert at == total
    return found


@pytest.mark.parametrize("bits", [32, 64])
def test_the_kernel_starts_in_protected_mode(write, memory, bits):
    """§3.2: eax = 0x36d76289, ebx = the information, which is 8-aligned."""
    entry = boot(write(multiboot2(bits=bits)), memory)
    registers = {"rax": 0x36D76289, "rbx": layout.BOOT_INFO}
    assert (entry.mode, dict(entry.registers)) == (CpuMode.PROTECTED, registers)
    assert memory.read(entry.rip, len(CODE)) == CODE
    assert layout.BOOT_INFO % 8 == 0


def test_the_information_is_a_list_of_tags(write, memory):
    """§3.4: command line, loader name, memory sizes and map, and the end."""
    boot(write(multiboot2()), memory, BootOptions(append="one two"))
    found = tags(memory)
    assert [kind for kind, _ in found] == [1, 2, 4, 6, 0]
    by_type = dict(found)
    assert by_type[1] == b"one two\0"
    assert by_type[2] == b"kvmpy\0"
    assert struct.unpack("<II", by_type[4]) == (639, 63 * 1024)
    assert struct.unpack("<II", by_type[6][:8]) == (24, 0)
    entries = [(g, s, k) for g, s, k, _ in struct.iter_unpack("<QQII", by_type[6][8:])]
    assert entries == layout.memory_map(memory.size)


def test_each_module_has_a_tag(write, memory):
    """§3.4.6: mod_start, mod_end, string; the initrd is the first module."""
    options = BootOptions(initrd=write(b"a" * 4097, "a"), modules=(Module(write(b"bb", "b"), "b line"),))
    boot(write(multiboot2()), memory, options)
    first, second = (payload for kind, payload in tags(memory) if kind == 3)
    start, end = struct.unpack("<II", first[:8])
    assert (start % 4096, memory.read(start, end - start), first[8:]) == (0, b"a" * 4097, b"\0")
    start, end = struct.unpack("<II", second[:8])
    assert (start % 4096, memory.read(start, end - start), second[8:]) == (0, b"bb", b"b line\0")


def test_the_acpi_root_pointer_is_copied(write, memory):
    """§3.4.16: the new RSDP, as the board has written it."""
    rsdp = b"RSD PTR " + bytes(range(28))
    memory.write(layout.ACPI_TABLES, rsdp)
    boot(write(multiboot2()), memory)
    assert dict(tags(memory))[15] == rsdp


def test_load_addresses_replace_program_headers(write, memory):
    """§3.1.5: address tag and entry address tag."""
    image = multiboot2_addressed()
    memory.fill(0x10_0000, 0x5000, 0xCC)
    assert boot(write(image), memory).rip == 0x10_0080
    assert memory.read(0x10_0000, 0x5000) == image.ljust(0x4000, b"\0") + b"\xcc" * 0x1000


def test_load_address_minus_1_loads_the_file_from_its_start(write, memory):
    """§3.1.5, load_addr: the special value -1."""
    image = bytes(64) + multiboot2_addressed(header_addr=0x10_0040, load_addr=0xFFFF_FFFF)
    boot(write(image), memory)
    assert memory.read(0x10_0000, len(image)) == image
    low = bytes(64) + multiboot2_addressed(header_addr=0x20, load_addr=0xFFFF_FFFF)
    refused(write(low), memory, "puts the file below 0")


def test_the_entry_tag_wins_over_e_entry(write, memory):
    """§3.1.6: the physical address to which the loader jumps."""
    assert boot(write(multiboot2(tag(3, words(0x10_0008)))), memory).rip == 0x10_0008


@pytest.mark.parametrize("low", [0x20_0000, 0x20_0001, 0x1000, 0x10_0001])
def test_a_relocatable_kernel_goes_as_low_as_it_wishes(write, memory, low):
    """§3.1.12: preference 1: the lowest place, not below min_addr; and the load base is told (§3.4.22)."""
    image = multiboot2_relocatable(low, 0x3FF_FFFF, 0x1000, 1)
    entry = boot(write(image), memory)
    base = -(-max(low, 0x10_0000) // 0x1000) * 0x1000
    assert memory.read(entry.rip, len(CODE)) == CODE
    assert entry.rip & 0xFFF == boot(write(multiboot2(tag(10, words(0, 2**32 - 1, 1, 0)))), memory).rip & 0xFFF
    boot(write(image), memory)
    assert dict(tags(memory))[21] == words(base)


def test_a_relocatable_kernel_goes_as_high_as_it_wishes(write, memory):
    """§3.1.12: preference 2: no part above max_addr, nor into the modules."""
    boot(write(multiboot2_relocatable(0, 0x2FF_FFFF, 0x1000, 2)), memory)
    assert dict(tags(memory))[21] == words(0x300_0000 - 0x2000)
    path = write(multiboot2_relocatable(0, 0xFFFF_FFFF, 0x1_0000, 2))
    boot(path, memory, BootOptions(initrd=write(bytes(0x1_0001), "initrd")))
    assert dict(tags(memory))[21] == words(64 * MiB - 0x2_0000)


@pytest.mark.parametrize(
    ("low", "high", "base"),
    [(0, 2**32 - 1, 0x10_0000), (0x20_0000, 2**32 - 1, 0x20_0000), (0, LINKED_END - 1, 0x10_0000)],
)
def test_a_relocatable_kernel_without_preference_stays_where_it_is_linked(write, memory, low, high, base):
    """§3.1.12: preference 0: moved only when its range or its alignment asks for it."""
    boot(write(multiboot2_relocatable(low, high, 0x1000, 0)), memory)
    assert dict(tags(memory))[21] == words(base)


@pytest.mark.parametrize("preference", [0, 1, 2, 77])
@pytest.mark.parametrize(
    ("low", "high", "alignment", "text"),
    [
        (0, 0x10_0FFF, 0x1000, "no room"),
        (0x400_0000, 2**32 - 1, 0x1000, "no room"),
        (0, 2**32 - 1, 2**31, "no room"),
        (0x20_0000, 0x10_0000, 0x1000, "above max_addr"),
        (0, 2**32 - 1, 0, "no power of two"),
        (0, 2**32 - 1, 3, "no power of two"),
    ],
)
def test_a_relocation_that_cannot_be_is_refused(write, memory, preference, low, high, alignment, text):
    """§3.1.12: the range and the alignment bind."""
    refused(write(multiboot2_relocatable(low, high, alignment, preference)), memory, text)


def test_a_wrong_checksum_is_refused(write, memory):
    """§3.1.2: the four words sum to 0 modulo 2^32."""
    image = multiboot2_addressed()
    assert refused(write(patch(image, 12, 1, 4)), memory, "wrong checksum").offset == 0


@pytest.mark.parametrize("length", [0, 1, 8, 16, 23])
def test_a_header_too_short_for_an_end_tag_is_refused(write, memory, length):
    """Case 62: header length 0."""
    image = multiboot2_header(END_TAG, length=length) + CODE
    assert refused(write(image), memory, f"header of {length} bytes").offset == 8


@pytest.mark.parametrize("length", [32769, 2**31, 2**32 - 1, 1000])
def test_a_header_past_32_kib_or_the_file_is_refused(write, memory, length):
    """Case 62: §3.1: contained completely within the first 32768 bytes."""
    image = multiboot2_header(END_TAG, length=length) + CODE
    refused(write(image if length == 1000 else image.ljust(40000, b"\0")), memory, f"header of {length} bytes")


@pytest.mark.parametrize("size", [0, 1, 7])
@pytest.mark.parametrize("kind", [1, 2, 3, 4, 5, 6, 7, 10, 99])
def test_a_tag_of_size_0_does_not_loop(write, memory, size, kind):
    """Case 62: tag size 0 (an infinite loop for the careless)."""
    refused(write(multiboot2(tag(kind, size=size, optional=True))), memory, f"tag {kind} of {size} bytes")


@pytest.mark.parametrize("size", [49, 1000, 2**31, 2**32 - 1])
def test_a_tag_past_the_header_is_refused(write, memory, size):
    """Case 62: a tag that says more than there is."""
    refused(write(multiboot2(tag(6, size=size))), memory, f"tag 6 of {size} bytes")


@pytest.mark.parametrize(("kind", "payload"), [(2, 12), (3, 0), (4, 0), (5, 8), (10, 12)])
def test_a_tag_too_short_for_its_type_is_refused(write, memory, kind, payload):
    """§3.1: each type has its fields."""
    refused(write(multiboot2(tag(kind, bytes(payload), optional=True))), memory, f"tag {kind} of {8 + payload} bytes")


def test_a_header_without_an_end_tag_is_refused(write, memory):
    """Case 62: missing end tag: the walk stops at the header's length."""
    refused(write(multiboot2(tag(6), end=b"")), memory, "without an end tag")


def test_tags_begin_at_multiples_of_8(write, memory):
    """§3.1.3: a tag of 12 bytes is followed by 4 of padding; without them the next tag is misread."""
    boot(write(multiboot2(tag(4, words(2)), tag(3, words(0x10_0010)))), memory)
    unaligned = multiboot2(tag(4, words(2))[:12] + tag(3, words(0x10_0010)) + bytes(4))
    refused(write(unaligned), memory, "does not fit|demands|without an end tag")


@pytest.mark.parametrize("shift", [1, 2, 4])
def test_a_header_that_is_not_64_bit_aligned_is_not_one(write, shift):
    """§3.1: the header must be 64-bit aligned."""
    with ImageFile(write(bytes(shift) + multiboot2_addressed())) as image:
        assert probe(image) is None


@pytest.mark.parametrize("at", [32768, 32768 - 8, 40000])
def test_a_header_behind_32_kib_is_not_one(write, at):
    """§3.1: within the first 32768 bytes."""
    with ImageFile(write(bytes(at) + multiboot2_addressed())) as image:
        assert probe(image) is None


def test_another_architecture_is_refused(write, memory):
    """§3.1.2: 4 is MIPS."""
    refused(write(multiboot2_header(END_TAG, architecture=4) + CODE), memory, "architecture 4")


@pytest.mark.parametrize(
    ("unserved", "text"),
    [
        ((1, words(1, 99)), "unknown type 99"),
        ((1, words(9)), "unknown type 9"),
        ((4, words(1)), "EGA text console"),
        ((5, words(1024, 768, 32)), "a framebuffer"),
        ((11, b""), "tag 11"),
        ((0xFFFF, b""), "tag 65535"),
    ],
)
def test_what_is_not_served_is_refused_unless_optional(write, memory, unserved, text):
    """§3.1.3: flags bit 0, optional: a loader may ignore such a tag, and must refuse the others."""
    refused(write(multiboot2(tag(*unserved))), memory, text)
    path = write(multiboot2(tag(*unserved, optional=True)))
    assert boot(path, memory).mode is CpuMode.PROTECTED
    with ImageFile(path) as image:
        found = probe(image)
    assert found is not None
    assert any(text in remark for remark in found.notes)


def test_a_demand_is_not_hidden_by_a_later_tag_of_its_type(write, memory):
    """§3.1.3: each tag binds, not only the last of its type."""
    path = write(multiboot2(tag(1, words(99)), tag(1, words(1))))
    refused(path, memory, "unknown type 99")


@pytest.mark.parametrize(
    "served",
    [
        (1, words(1, 2, 3, 4, 6, 15, 21)),
        (1, words(8, 5, 7, 10, 11, 12, 13, 14, 16, 17, 18, 19, 20)),
        (1, b""),
        (1, b"\1"),
        (4, words(2)),
        (6, b""),
        (7, b""),
        (8, words(1)),
        (9, words(1)),
    ],
)
def test_what_is_served_or_does_not_exist_here_boots(write, memory, served):
    """§3.1.4: known information that is not available is left out; EFI tags mean nothing without EFI."""
    assert boot(write(multiboot2(tag(*served))), memory).mode is CpuMode.PROTECTED


def test_an_address_tag_without_an_entry_is_refused(write, memory):
    """§3.1.6: nobody says where to start."""
    image = multiboot2_header(tag(2, words(0x10_0000, 0x10_0000, 0, 0)), END_TAG) + CODE
    refused(write(image), memory, "without an entry address")


def test_a_header_in_a_file_that_is_neither_elf_nor_addressed_is_refused(write, memory):
    """§3.1.5: load information must be there when the image is not ELF."""
    refused(write(multiboot2_header(END_TAG) + CODE), memory, "not ELF")


def test_an_entry_in_no_segment_is_refused(write, memory):
    """For e_entry and for the entry address tag."""
    refused(write(multiboot2(tag(3, words(0x10_2000)))), memory, "in no segment")
    header = multiboot2_header(END_TAG)
    refused(write(elf(Load(0x10_0000, header), entry=0)), memory, "in no segment")


def test_boot_information_that_does_not_fit_is_the_callers_mistake(write, memory):
    """It has 28 KiB, command lines included: to the last byte."""
    path = write(multiboot2())
    boot(path, memory)
    (total,) = struct.unpack("<I", memory.read(layout.BOOT_INFO, 4))
    # An empty command line has a tag of 8 + 1 bytes and 7 of padding.
    room = 28672 - total + 7
    boot(path, memory, BootOptions(append="x" * room))
    assert struct.unpack("<I", memory.read(layout.BOOT_INFO, 4)) == (28672,)
    with pytest.raises(ValueError, match="28672 fit"):
        boot(path, memory, BootOptions(append="x" * (room + 1)))

"""ELF executables: what is loaded where, and every way in which a file can lie about it (hostile cases 61)."""

import os
import subprocess

import pytest
from boot_images import (
    CODE,
    E_ENTRY,
    E_MACHINE,
    E_PHENTSIZE,
    E_PHNUM,
    E_PHOFF,
    E_SHOFF,
    E_TYPE,
    P_FILESZ,
    P_MEMSZ,
    P_OFFSET,
    PHDR,
    PHDR_SIZE,
    Load,
    elf,
    note,
    patch,
)
from elftools.elf.elffile import ELFFile
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmpy import GiB, ImageError, MiB
from kvmpy.machine.boot import BootOptions, CpuMode, boot
from kvmpy.machine.boot.elf import read_elf
from kvmpy.machine.boot.image import ImageFile
from kvmpy.machine.memory import GuestMemory

BITS = pytest.mark.parametrize("bits", [64, 32])


def refused(path: str, memory: GuestMemory, text: str, *, format: str = "elf") -> ImageError:
    """Boot, and return the error that must come."""
    with pytest.raises(ImageError, match=text) as caught:
        boot(path, memory, BootOptions(format=format))
    assert caught.value.offset is not None
    assert caught.value.path == path
    return caught.value


@BITS
def test_segments_lie_at_their_physical_addresses(write, memory, bits):
    """gABI chapter 5: p_filesz bytes from p_offset, the rest of p_memsz is 0."""
    image = elf(Load(0x10_0000), Load(0x20_0000, b"data", memsz=0x2000, vaddr=0xC000_0000), bits=bits)
    memory.fill(0x20_0000, 0x3000, 0xCC)
    entry = boot(write(image), memory)
    assert memory.read(0x10_0000, len(CODE)) == CODE
    assert memory.read(0x20_0000, 0x3000) == b"data".ljust(0x2000, b"\0") + b"\xcc" * 0x1000
    assert entry.rip == 0x10_0000
    assert entry.mode == (CpuMode.LONG if bits == 64 else CpuMode.PROTECTED)
    assert dict(entry.registers) == {}


@pytest.mark.parametrize("inside", [0, 4, len(CODE) - 1])
def test_a_virtual_entry_is_translated_through_its_segment(write, memory, inside):
    """gABI chapter 4: e_entry is a virtual address; the guest starts with memory mapped 1:1."""
    virtual = 0xFFFF_FFFF_8020_0000
    image = elf(Load(0x10_0000), Load(0x20_0000, vaddr=virtual), entry=virtual + inside)
    assert boot(write(image), memory).rip == 0x20_0000 + inside


def test_segments_may_stand_in_any_order_and_touch(write, memory):
    """Only real overlaps are refused."""
    boot(write(elf(Load(0x20_0000), Load(0x10_0000), Load(0x10_0040, b"next"))), memory)
    assert memory.read(0x10_0000, 68) == CODE + b"next"
    assert memory.read(0x20_0000, 64) == CODE


def test_a_physical_entry_is_taken_as_it_is(write, memory):
    """Linux's vmlinux has virtual segments and a physical e_entry."""
    image = elf(Load(0x20_0000, vaddr=0xFFFF_FFFF_8020_0000), entry=0x20_0008)
    assert boot(write(image), memory).rip == 0x20_0008


def test_low_memory_up_to_the_ebda_is_free_for_segments(write, memory):
    """Page 0 and all below 0x9fc00 belong to the guest."""
    assert boot(write(elf(Load(0), Load(0x9FC00 - len(CODE)), entry=0)), memory).rip == 0
    assert memory.read(0x9FC00 - len(CODE), len(CODE)) == CODE


def test_a_segment_above_the_hole_is_loaded(write):
    """RAM goes on at 4 GiB; p_paddr of 64 bits reaches it."""
    with GuestMemory(3 * GiB + 16 * MiB) as memory:
        boot(write(elf(Load(0x10_0000), Load(4 * GiB + 0x1000, b"high"))), memory)
        assert memory.read(4 * GiB + 0x1000, 4) == b"high"


def test_only_what_the_image_covers_is_touched(write, memory, touched):
    """RAM is populated by touch: loading must not cost more than the image."""
    boot(write(elf(Load(0x10_0000, bytes(0x2000)), Load(0x200_0000, memsz=len(CODE)))), memory)
    assert touched() == 3 * 4096


def test_the_user_may_say_mode_and_entry(write, memory):
    """`--mode` and `--entry` override what the file says."""
    path = write(elf(Load(0x1000), Load(0x10_0000)))
    entry = boot(path, memory, BootOptions(mode=CpuMode.REAL, entry=0x1004))
    assert (entry.mode, entry.rip) == (CpuMode.REAL, 0x1004)
    assert boot(path, memory, BootOptions(mode=CpuMode.PROTECTED)).mode is CpuMode.PROTECTED
    with pytest.raises(ValueError, match="0x5000 is in no segment"):
        boot(path, memory, BootOptions(entry=0x5000))
    with pytest.raises(ValueError, match="real mode starts below 0x10000"):
        boot(path, memory, BootOptions(mode=CpuMode.REAL, entry=0x10_0000))


@BITS
@pytest.mark.parametrize("keep", [4, 5, 6, 16, 40, "header - 1", "header + 1"])
def test_truncated_headers_are_refused(write, memory, bits, keep):
    """Case 61: truncated header."""
    size = keep if isinstance(keep, int) else PHDR[bits] + int(keep[7:].replace(" ", ""))
    refused(write(elf(Load(0x10_0000), bits=bits)[:size]), memory, "truncated")


@BITS
@pytest.mark.parametrize("value", [2**31, 2**32 - 1, 200])
def test_a_program_header_table_past_the_file_is_refused(write, memory, bits, value):
    """Case 61: e_phoff past the file."""
    image = patch(elf(Load(0x10_0000), bits=bits), E_PHOFF[bits], value, 4)
    assert refused(write(image), memory, "truncated").offset == E_PHOFF[bits]


def test_a_program_header_offset_that_wraps_is_refused(write, memory):
    """Case 61: e_phoff + e_phnum * 56 beyond 2^64."""
    refused(write(patch(elf(Load(0x10_0000)), E_PHOFF[64], 2**64 - 8, 8)), memory, "truncated")


@BITS
def test_more_program_headers_than_the_file_holds_are_refused(write, memory, bits):
    """Case 61: e_phnum past the file."""
    refused(write(patch(elf(Load(0x10_0000), bits=bits), E_PHNUM[bits], 0xFFFE, 2)), memory, "truncated")


@BITS
def test_extended_numbering_is_refused(write, memory, bits):
    """Case 61: e_phnum 0xffff means that the count is elsewhere."""
    image = patch(elf(Load(0x10_0000), bits=bits), E_PHNUM[bits], 0xFFFF, 2)
    assert refused(write(image), memory, "e_phnum 0xffff").offset == E_PHNUM[bits]


@BITS
@pytest.mark.parametrize("size", [0, 1, 55, 57, 0xFFFF])
def test_program_headers_of_a_wrong_size_are_refused(write, memory, bits, size):
    """Case 61: e_phentsize is 56 in ELF64, 32 in ELF32."""
    image = patch(elf(Load(0x10_0000), bits=bits), E_PHENTSIZE[bits], size, 2)
    assert refused(write(image), memory, f"e_phentsize is {size}").offset == E_PHENTSIZE[bits]


@BITS
def test_a_file_without_anything_to_load_is_refused(write, memory, bits):
    """e_phnum 0, or no PT_LOAD with memory."""
    refused(write(patch(elf(Load(0x10_0000), bits=bits), E_PHNUM[bits], 0, 2)), memory, "nothing to load")
    refused(write(elf(Load(0x10_0000, b"", memsz=0), bits=bits)), memory, "nothing to load")


def field(bits: int, which: dict[int, int], index: int = 0) -> int:
    """Return the offset of a field of program header ``index``."""
    return PHDR[bits] + index * PHDR_SIZE[bits] + which[bits]


@BITS
def test_more_bytes_in_the_file_than_in_memory_are_refused(write, memory, bits):
    """Case 61: p_filesz > p_memsz."""
    image = patch(elf(Load(0x10_0000), bits=bits), field(bits, P_MEMSZ), len(CODE) - 1, 4)
    assert refused(write(image), memory, "p_filesz 0x40 above p_memsz 0x3f").offset == PHDR[bits]


@BITS
@pytest.mark.parametrize("value", [2**32 - 1, 2**31, 0x10000])
def test_segment_bytes_past_the_file_are_refused(write, memory, bits, value):
    """Case 61: p_offset + p_filesz leaves the file, or wraps."""
    refused(write(patch(elf(Load(0x10_0000), bits=bits), field(bits, P_OFFSET), value, 4)), memory, "truncated")


def test_a_file_offset_that_wraps_is_refused(write, memory):
    """Case 61: p_offset + p_filesz beyond 2^64."""
    refused(write(patch(elf(Load(0x10_0000)), field(64, P_OFFSET), 2**64 - 16, 8)), memory, "truncated")


@pytest.mark.parametrize("memsz", [2**60, 2**63, 2**64 - 1, 64 * MiB])
def test_a_huge_segment_is_refused_before_anything_is_cleared(write, memory, touched, memsz):
    """Case 61: 2^60 memsz, and p_paddr + p_memsz that wraps."""
    refused(write(elf(Load(0x10_0000, memsz=memsz))), memory, "outside 64 MiB")
    assert touched() == 0


@pytest.mark.parametrize("paddr", [64 * MiB, 64 * MiB - 1, 2**32, 2**63, 2**64 - 16, 0xFEE0_0000])
def test_a_segment_outside_ram_is_refused(write, memory, touched, paddr):
    """Case 61: p_paddr out of RAM; the segment before it was not written either."""
    error = refused(write(elf(Load(0x10_0000), Load(paddr))), memory, "outside 64 MiB")
    assert error.offset == PHDR[64] + PHDR_SIZE[64]
    assert touched() == 0


@pytest.mark.parametrize("paddr", [0x9FBFF, 0x9FC00, 0xA0000, 0xC0000, 0xC1000, 0xC8000, 0xE0000, 0xFFFFF])
def test_a_segment_over_our_tables_is_refused(write, memory, paddr):
    """Case 61: p_paddr into page tables or boot info."""
    refused(write(elf(Load(0x10_0000 + 0x1000), Load(paddr))), memory, "kept for boot tables")


def test_a_segment_around_our_tables_is_refused(write, memory):
    """Case 61: a memsz that runs through 0x9fc00 to 1 MiB."""
    refused(write(elf(Load(0, memsz=0x20_0000))), memory, "kept for boot tables")


@pytest.mark.parametrize("second", [0x10_0000, 0x10_003F, 0xF_FFFF + 1])
def test_overlapping_segments_are_refused(write, memory, second):
    """Case 61: overlapping PT_LOAD, in whatever order they stand."""
    refused(write(elf(Load(0x10_0000), Load(second))), memory, "overlaps")
    refused(write(elf(Load(second, b"x"), Load(0x10_0000), entry=second)), memory, "overlaps")


def test_a_bss_over_another_segment_is_refused(write, memory):
    """Case 61: it would be cleared after it was loaded."""
    refused(write(elf(Load(0x10_0000, memsz=0x10001), Load(0x11_0000))), memory, "overlaps")


@pytest.mark.parametrize("entry", [0, 0xF_FFFF, 0x10_0040, 2**63, 2**64 - 1])
def test_an_entry_in_no_segment_is_refused(write, memory, entry):
    """Case 61: entry not in any segment."""
    assert refused(write(elf(Load(0x10_0000), entry=entry)), memory, "in no segment").offset == E_ENTRY


def test_an_entry_above_4_gib_is_refused(write):
    """The boot page tables map 4 GiB."""
    with GuestMemory(3 * GiB + 16 * MiB) as memory:
        refused(write(elf(Load(4 * GiB))), memory, "out of reach: long mode starts below 0x100000000")


@BITS
@pytest.mark.parametrize("machine", [0, 3, 40, 62, 183, 243])
def test_another_machine_is_refused(write, memory, bits, machine):
    """Case 61: wrong machine; ELF32 for x86-64 (x32) and ELF64 for i386 too."""
    path = write(patch(elf(Load(0x10_0000), bits=bits), E_MACHINE, machine, 2))
    if machine == (62 if bits == 64 else 3):
        assert boot(path, memory).rip == 0x10_0000
    else:
        assert refused(path, memory, f"for .*e_machine {machine}\\b.* is wanted").offset == E_MACHINE


@pytest.mark.parametrize(("offset", "value", "text"), [(4, 0, "class"), (4, 3, "class"), (5, 2, "little-endian")])
def test_another_class_or_byte_order_is_refused(write, memory, offset, value, text):
    """Case 61: wrong class, wrong endianness."""
    assert refused(write(patch(elf(Load(0x10_0000)), offset, value, 1)), memory, text).offset == offset


def test_a_pie_is_refused_with_the_reason(write, memory):
    """Case 61: PIE: nobody would relocate it."""
    assert refused(write(patch(elf(Load(0x10_0000)), E_TYPE, 3, 2)), memory, "position-independent").offset == E_TYPE


@pytest.mark.parametrize("kind", [0, 1, 4, 0xFFFF])
def test_an_elf_file_that_is_no_executable_is_refused(write, memory, kind):
    """Objects and core dumps."""
    refused(write(patch(elf(Load(0x10_0000)), E_TYPE, kind, 2)), memory, f"ELF type {kind}")


def test_a_program_with_an_interpreter_is_refused(write, memory):
    """A program for Linux is no kernel."""
    refused(write(elf(Load(0x10_0000), interp=b"/lib64/ld-linux-x86-64.so.2\0")), memory, "interpreter")


@pytest.mark.parametrize("namesz", [2**32 - 1, 2**31, 0x7FFF_FFFF, 64])
def test_a_note_longer_than_its_segment_is_refused(write, memory, namesz):
    """Case 61: PT_NOTE with namesz 2^32-1."""
    notes = patch(note(b"Xen\0", 18, bytes(8)), 0, namesz, 4)
    refused(write(elf(Load(0x10_0000), notes=notes)), memory, "leaves its PT_NOTE", format="pvh")


def test_a_note_segment_past_the_file_is_refused(write, memory):
    """Case 61: PT_NOTE with p_filesz past the file."""
    image = elf(Load(0x10_0000), notes=note(b"Xen\0", 18, bytes(8)))
    refused(write(patch(image, field(64, P_FILESZ, 1), 2**60, 8)), memory, "truncated", format="pvh")


def test_endless_notes_are_given_up(write, memory):
    """Work is bounded: a gigabyte of empty notes in a sparse file is not walked."""
    path = write(elf(Load(0x10_0000), notes=bytes(64)))
    size = os.path.getsize(path)
    with open(path, "r+b") as file:
        file.seek(field(64, P_FILESZ, 1))
        file.write((2**30).to_bytes(8, "little"))
        file.truncate(size + 2**30)
    refused(path, memory, "more than 1024 notes", format="pvh")


def test_junk_section_headers_do_not_matter(write, memory):
    """Case 61: sh tables junk: loading looks at program headers only."""
    image = patch(elf(Load(0x10_0000)), E_SHOFF[64], 2**64 - 1, 8)
    image = patch(image, 58, 0xFFFF_FFFF_FFFF, 6)
    assert boot(write(image), memory).rip == 0x10_0000


def headers_by_pyelftools(path: str) -> list[tuple[int, ...]]:
    """Return the PT_LOAD headers as the library reads them."""
    with open(path, "rb") as file:
        found = [s.header for s in ELFFile(file).iter_segments() if s.header.p_type == "PT_LOAD"]
    return [(h.p_offset, h.p_vaddr, h.p_paddr, h.p_filesz, h.p_memsz) for h in found]


def headers_by_us(path: str) -> list[tuple[int, ...]]:
    """Return the PT_LOAD headers as kvmpy reads them."""
    with ImageFile(path) as image:
        found = read_elf(image)
        assert found is not None
        return [(h.offset, h.vaddr, h.paddr, h.filesz, h.memsz) for h in found.headers if h.type == 1]


@settings(deadline=None, max_examples=40)
@given(
    bits=st.sampled_from([32, 64]),
    loads=st.lists(
        st.builds(
            Load,
            st.integers(0, 2**32 - 1),
            st.binary(max_size=64),
            st.integers(0, 2**32 - 1),
            st.integers(0, 2**32 - 1),
        ),
        min_size=1,
        max_size=5,
    ),
)
def test_generated_files_are_read_as_pyelftools_reads_them(tmp_path_factory, bits, loads):
    """Our few lines against a library that knows the whole format."""
    path = tmp_path_factory.mktemp("elf") / "image"
    path.write_bytes(elf(*loads, bits=bits))
    assert headers_by_us(str(path)) == headers_by_pyelftools(str(path))


@BITS
def test_compiled_files_are_read_as_pyelftools_reads_them(tmp_path, memory, bits):
    """The same for what gcc and ld make, and it loads to the bytes that the library says."""
    source = tmp_path / "kernel.c"
    source.write_text("int bss[3000]; int data = 7; void _start(void) { bss[0] = data; for (;;); }\n")
    path = str(tmp_path / "kernel")
    flags = [
        f"-m{bits}",
        "-nostdlib",
        "-static",
        "-ffreestanding",
        "-fno-pic",
        "-no-pie",
        "-Wl,-Ttext-segment=0x400000",
    ]
    subprocess.run(["gcc", *flags, "-o", path, str(source)], check=True)
    assert headers_by_us(path) == headers_by_pyelftools(path)
    memory.fill(0x40_0000, 2 * MiB, 0xCC)
    entry = boot(path, memory)
    with open(path, "rb") as file:
        library = ELFFile(file)
        assert entry.rip == library.header.e_entry
        for segment in library.iter_segments():
            if segment.header.p_type == "PT_LOAD":
                expected = segment.data().ljust(segment.header.p_memsz, b"\0")
                assert memory.read(segment.header.p_paddr, len(expected)) == expected

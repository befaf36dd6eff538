"""The kernel inside a bzImage, unpacked on the host: where it goes, how it starts, and payloads that lie."""

import os
import zlib

import pytest
from boot_images import BANNER, CODE, SETUP, Load, bzimage, elf, patch
from packed_images import PACK, payload

from kvmpy import ImageError, MiB
from kvmpy.machine import layout
from kvmpy.machine.boot import BootOptions, CpuMode, boot
from kvmpy.machine.boot import bzimage as bzimage_format
from kvmpy.machine.boot.image import ImageFile
from kvmpy.machine.boot.inspection import inspect
from kvmpy.machine.boot.unpack import unpack_kernel
from kvmpy.machine.memory import GuestMemory

TEXT, DATA = 0x100_0000, 0x120_0000
RELOCATIONS = bytes(400)
KERNEL = (
    elf(
        Load(TEXT, BANNER * 99, vaddr=0xFFFF_FFFF_8100_0000),
        Load(DATA, CODE, memsz=0x3000, vaddr=0xFFFF_FFFF_8120_0000),
        entry=TEXT + 0x10,
    )
    + RELOCATIONS
)
PAYLOAD_AT = len(bzimage())
UNPACK = BootOptions(unpack=True)


def refused(path: str, memory: GuestMemory, text: str) -> ImageError:
    """Boot, and return the error that must come; no descriptor stays open."""
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ImageError, match=text) as caught:
        boot(path, memory, UNPACK)
    assert len(os.listdir("/proc/self/fd")) == before
    assert caught.value.offset is not None
    return caught.value


@pytest.mark.parametrize("packing", PACK)
def test_the_kernel_goes_where_its_program_headers_say(write, memory, packing):
    """arch/x86/boot/compressed/misc.c, parse_elf: each PT_LOAD at its physical address, zeros behind it."""
    memory.fill(DATA, 0x3000, 0xEE)
    boot(write(bzimage(payload=payload(packing, KERNEL))), memory, UNPACK)
    assert memory.read(TEXT, len(BANNER) * 99) == BANNER * 99
    assert memory.read(DATA, 0x3000) == CODE.ljust(0x3000, b"\0")


def test_the_kernel_starts_at_its_own_entry_with_boot_params(write, memory):
    """boot.rst, 64-bit boot protocol: rsi = boot_params; startup_64 wants what the decompressor gives it."""
    options = BootOptions(append="quiet", initrd=write(b"r" * 5000, "initrd"))
    path = write(bzimage(payload=payload("xz", KERNEL)))
    plain = boot(path, memory, options)
    zero_page, initrd = memory.read(layout.BOOT_INFO, 4096), memory.read(64 * MiB - 0x2000, 0x2000)
    memory.fill(layout.BOOT_INFO, 4096, 0xEE)
    memory.fill(64 * MiB - 0x2000, 0x2000)
    memory.fill(TEXT, 0x1000)
    entry = boot(path, memory, options._replace(unpack=True))
    assert (entry.mode, entry.rip, dict(entry.registers)) == (CpuMode.LONG, TEXT + 0x10, dict(plain.registers))
    assert memory.read(layout.BOOT_INFO, 4096) == zero_page
    assert memory.read(64 * MiB - 0x2000, 0x2000) == initrd


def test_the_entry_says_what_was_done(write, memory):
    """Without the option, nothing was."""
    path = write(bzimage(payload=payload("legacy LZ4", KERNEL)))
    assert boot(path, memory).notes == ()
    assert boot(path, memory).rip == TEXT + 0x200
    (note,) = boot(path, memory, UNPACK).notes
    assert note.startswith("unpacked on the host: legacy LZ4, ")


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (bzimage(), "compressed with something unknown"),
        (bzimage(payload=b"\x01\x02\x03\x04" * 9), "compressed with something unknown"),
        (bzimage(payload=b"\x28\xb5\x2f\xfd" * 9), "compressed with zstd"),
        (bzimage(payload=b"\x89LZO\0\r\n\x1a\n" * 9), "compressed with LZO"),
        (bzimage(payload=b"\x04\x22\x4d\x18" * 9), "compressed with LZ4 in its frame format"),
        (bzimage(payload=b"\x1f\x8b\x08", payload_length=8), "compressed with something unknown"),
        (bzimage(payload=payload("xz", KERNEL), payload_length=2**31), "compressed with something unknown"),
        (bzimage(payload=payload("xz", KERNEL), payload_offset=2**32 - 1), "compressed with something unknown"),
        (
            bzimage(payload=payload("xz", elf(Load(0x800_0000)))),
            "segment 0x8000000..0x800003f is outside 64 MiB of RAM; 129 MiB of memory would do",
        ),
    ],
)
def test_what_cannot_be_unpacked_here_unpacks_itself(write, memory, image, reason):
    """The decompressor in it may know more: it starts as without the option, and the entry says why."""
    entry = boot(write(image), memory, UNPACK)
    assert (entry.rip, entry.notes) == (TEXT + 0x200, (f"not unpacked on the host: {reason}",))
    assert memory.read(TEXT, 0x800) == image[3 * 512 :][:0x800]


def test_a_kernel_under_its_initrd_unpacks_itself(write, memory):
    """Nothing is written over the initrd; where the decompressor puts the kernel is its own business."""
    path = write(bzimage(payload=payload("xz", elf(Load(63 * MiB)))))
    entry = boot(path, memory, BootOptions(unpack=True, initrd=write(bytes(MiB), "initrd")))
    assert "overlaps" in entry.notes[0]


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("kernel", [b"no kernel" * 9, elf(Load(0x10_0000), bits=32), patch(KERNEL, 18, 183, 2)])
def test_a_payload_that_is_no_kernel_is_refused(write, memory, touched, packing, kernel):
    """What the decompressor would say is "Bad ELF", or nothing."""
    path = write(bzimage(payload=payload(packing, kernel)))
    error = refused(path, memory, "no ELF64 file|ELF64 for AArch64")
    assert error.path == f"{path} (unpacked)"
    assert touched() <= 4096  # the page where the root pointer of ACPI would be, which was read


@pytest.mark.parametrize("packing", ["gzip", "bzip2", "xz"])
def test_a_damaged_payload_is_refused(write, memory, touched, packing):
    """One bit in the middle: a checksum notices. LZMA and LZ4 as kernels have them hold none."""
    packed = bytearray(payload(packing, KERNEL))
    packed[len(packed) // 2] ^= 4
    refused(write(bzimage(payload=bytes(packed))), memory, f"damaged {packing} data|truncated")
    assert touched() <= 4096


def test_a_damaged_lz4_payload_is_refused_where_it_is_damaged(write, memory):
    packed = b"\x02\x21\x4c\x18\x05\0\0\0\x10a\2\0\x10" + bytes(4)
    error = refused(write(bzimage(payload=packed)), memory, "damaged LZ4 data: a match 2 bytes back, and 1 are there")
    assert error.offset == PAYLOAD_AT + 10


@pytest.mark.parametrize("packing", PACK)
def test_a_truncated_payload_is_refused(write, memory, packing):
    packed = payload(packing, KERNEL)[:-60]
    refused(write(bzimage(payload=packed)), memory, f"truncated|damaged.*truncated|bytes, and says|{packing} data")


@pytest.mark.parametrize("packing", ["xz", "legacy LZ4"])
def test_a_payload_of_another_size_than_it_says_is_refused(write, memory, packing):
    """The decompressor has room for as much as it says."""
    packed = PACK[packing](KERNEL) + (len(KERNEL) - 1).to_bytes(4, "little")
    error = refused(write(bzimage(payload=packed)), memory, f"{len(KERNEL)} bytes, and says {len(KERNEL) - 1}")
    assert error.offset == PAYLOAD_AT + len(packed) - 4


@pytest.mark.parametrize("packing", ["gzip", "xz", "bzip2", "LZMA"])
def test_a_bomb_ends_at_the_guests_memory(write, packing):
    """Case 66, as a packed file: what it claims is never taken."""
    with GuestMemory(24 * MiB) as memory:
        path = write(bzimage(init_size=0x1000, payload=payload(packing, bytes(25 * MiB))))
        error = refused(path, memory, f"{packing} data unpacks to more than 24 MiB, the guest's memory")
    assert error.offset == PAYLOAD_AT


def test_an_lz4_bomb_ends_at_the_guests_memory(write):
    """255 times its size."""
    block = b"\x1fa\1\0" + b"\xff" * 32000 + b"\0\x10b"
    frame = b"\x02\x21\x4c\x18" + (len(block).to_bytes(4, "little") + block) * 4
    with GuestMemory(24 * MiB) as memory:
        refused(write(bzimage(init_size=0x1000, payload=frame + bytes(4))), memory, "more than 24 MiB")


def test_a_dictionary_bomb_is_refused(write, memory):
    """A header may ask for 4 GiB, in its bytes from 1 to 4."""
    packed = patch(payload("LZMA", KERNEL), 1, 2**31, 4)
    refused(write(bzimage(payload=packed)), memory, "damaged LZMA data: Memory usage limit exceeded")


def test_a_dictionary_bomb_in_xz_is_refused(write, memory):
    """xz-file-format.txt §3.1 and §5.3.1: a block header of 12 bytes behind 12; size 40 of LZMA2 means 4 GiB."""
    packed = patch(payload("xz", KERNEL), 16, 40, 1)
    packed = patch(packed, 20, zlib.crc32(packed[12:20]), 4)
    refused(write(bzimage(payload=packed)), memory, "damaged xz data: Memory usage limit exceeded")


def test_inspect_says_how_the_kernel_is_compressed(write):
    """Without unpacking it."""
    for packing in PACK:
        packed = payload(packing, KERNEL)
        notes = inspect(write(bzimage(payload=packed))).offers[0].notes
        where = f"{len(packed)} bytes at offset 0x{PAYLOAD_AT:x}, unpacked {len(KERNEL)}"
        assert f"compressed with {packing}: {where}" in notes
    assert "something unknown" in inspect(write(bzimage(payload=bytes(99)))).offers[0].notes[-1]
    assert SETUP["payload_offset"] == (bzimage_format.PAYLOAD_OFFSET.offset, 4)


@pytest.mark.parametrize("packing", PACK)
def test_the_unpacked_kernel_is_the_kernel(write, packing):
    """With what lies behind its ELF file."""
    with ImageFile(write(bzimage(payload=payload(packing, KERNEL)))) as image:
        kernel = bzimage_format.parse(image)
        assert kernel is not None
        found = bzimage_format.find_payload(image, kernel)
        assert found is not None
        assert found.packing is not None
        with unpack_kernel(image, found, found.packing, limit=MiB) as unpacked:
            assert unpacked.read(0, unpacked.size) == KERNEL

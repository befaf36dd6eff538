"""Packed files: a downloaded ``vmlinux.xz`` boots as it is, and what cannot be unpacked here is named."""

import os

import pytest
from boot_images import CODE, EVERY_IMAGE, Load, bzimage, elf, pvh
from packed_images import PACK

from kvmpy import ImageError, MiB
from kvmpy.machine.boot import BootOptions, CpuMode, boot
from kvmpy.machine.boot.inspection import inspect
from kvmpy.machine.boot.packed import LONGEST_MAGIC, PACKINGS, recognise
from kvmpy.machine.memory import GuestMemory

ELSEWHERE = [packing for packing in PACKINGS if packing.name not in PACK]


def refused(path: str, memory: GuestMemory, text: str) -> ImageError:
    """Boot, and return the error that must come; no descriptor stays open."""
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ImageError, match=text) as caught:
        boot(path, memory)
    assert len(os.listdir("/proc/self/fd")) == before
    assert caught.value.offset is not None
    return caught.value


@pytest.mark.parametrize("packing", PACK)
def test_every_kind_of_image_may_be_packed(write, memory, packing):
    """Entry and memory are those of the unpacked file, and a note says so."""
    for name, images in EVERY_IMAGE.items():
        for image in images if name != "flat" else ():
            plain = boot(write(image), memory)
            before = memory.read(0, 32 * MiB)
            memory.fill(0, 32 * MiB)
            packed = boot(write(PACK[packing](image)), memory)
            assert (packed, packed.notes) == (plain._replace(notes=packed.notes), (packed.notes[0],))
            assert packed.notes[0] == f"packed with {packing}: unpacked in memory"
            assert memory.read(0, 32 * MiB) == before
            memory.fill(0, 32 * MiB)


@pytest.mark.parametrize("packing", PACK)
def test_a_format_that_the_user_names_is_looked_for_inside(write, memory, packing):
    assert boot(write(PACK[packing](pvh())), memory, BootOptions(format="elf")).mode is CpuMode.LONG


def test_a_flat_image_is_never_unpacked(write, memory):
    """Its bytes are the guest's, whatever they look like."""
    packed = PACK["gzip"](CODE)
    boot(write(packed), memory, BootOptions(format="flat"))
    assert memory.read(0x1000, len(packed)) == packed


@pytest.mark.parametrize("packing", ELSEWHERE, ids=lambda packing: packing.name)
def test_a_packing_that_is_not_unpacked_here_is_named_with_its_command(write, memory, packing):
    path = write(packing.magic + bytes(1000))
    error = refused(path, memory, f"packed with {packing.name}: unpack it first, with {packing.command}")
    assert "\n" not in str(error)
    found = inspect(path)
    assert (found.what, found.boots, found.offers) == (f"packed with {packing.name}", None, ())
    assert found.error == error.message


@pytest.mark.parametrize("packing", PACK)
def test_a_truncated_file_is_refused(write, memory, packing):
    for keep in (LONGEST_MAGIC + 3, 60, -1):
        refused(write(PACK[packing](elf(Load(0x10_0000)))[:keep]), memory, "truncated|damaged")


@pytest.mark.parametrize("packing", ["gzip", "bzip2", "xz"])
def test_a_damaged_file_is_refused(write, memory, packing):
    packed = bytearray(PACK[packing](bzimage()))
    packed[len(packed) // 2] ^= 1
    path = write(bytes(packed))
    refused(path, memory, f"damaged {packing} data|truncated")
    assert inspect(path).what == f"packed with {packing}"


@pytest.mark.parametrize("packing", ["gzip", "bzip2", "xz"])
def test_a_second_stream_behind_the_first_is_refused(write, memory, packing):
    """Some packers work in parallel and write several; half a kernel would be worse."""
    packed = PACK[packing](bzimage())
    command = next(p.command for p in PACKINGS if p.name == packing)
    error = refused(write(packed * 2), memory, f"{len(packed)} bytes behind the {packing} data: .*{command}")
    assert error.offset == len(packed)


@pytest.mark.parametrize("packing", PACK)
def test_a_file_that_holds_nothing_is_refused(write, memory, packing):
    refused(write(PACK[packing](b"")), memory, "unpacks to nothing|truncated|sequence")


@pytest.mark.parametrize("packing", ["gzip", "bzip2", "xz", "LZMA"])
def test_a_bomb_ends_at_the_guests_memory(write, packing):
    path = write(PACK[packing](bytes(9 * MiB)))
    with GuestMemory(8 * MiB) as memory:
        refused(path, memory, f"{packing} data unpacks to more than 8 MiB, the guest's memory")
    assert "more than 8 MiB" in str(inspect(path, memory_size=8 * MiB).error)


@pytest.mark.parametrize("packing", PACK)
def test_inspect_looks_inside(write, packing):
    """Size is the file's; everything else is said of the contents."""
    packed, plain = PACK[packing](pvh()), inspect(write(pvh()))
    found = inspect(write(packed))
    assert (found.size, found.unpacked_size, found.packed_with) == (len(packed), len(pvh()), packing)
    assert (found.what, found.offers, found.boots) == (plain.what, plain.offers, "pvh")
    assert (plain.unpacked_size, plain.packed_with) == (None, None)


def test_each_magic_is_its_own():
    """None begins with another, so that the order does not matter."""
    for packing in PACKINGS:
        assert recognise(packing.magic + bytes(9)) is packing
        assert recognise(packing.magic[:-1]) is None

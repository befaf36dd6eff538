"""Which protocol boots a file: the order, the refusals, and the options that mean something."""

import pytest
from boot_images import (
    BANNER,
    CODE,
    END_TAG,
    EVERY_IMAGE,
    Load,
    bootsector,
    bzimage,
    elf,
    multiboot1,
    multiboot1_header,
    multiboot2,
    multiboot2_header,
    patch,
    pvh,
    pvh_note,
    tag,
    words,
)

from kvmpy import ImageError
from kvmpy.machine.boot import PROTOCOLS, BootOptions, CpuMode, Entry, Module, boot
from kvmpy.machine.boot.detect import detect, plausible, protocol
from kvmpy.machine.boot.image import ImageFile

EACH = pytest.mark.parametrize(
    ("name", "image"), [(name, image) for name, images in EVERY_IMAGE.items() for image in images]
)


def multiboot2_data(entry: int) -> bytes:
    """Return a multiboot 2 header with an entry of its own."""
    return multiboot2_header(tag(3, words(entry)), END_TAG)


def test_protocols_are_tried_in_order(write, memory):
    """bzImage, PVH, multiboot 2, multiboot 1, ELF, boot sector: take one away, and the next has its turn."""
    second, first = multiboot2_data(0x10_0001), multiboot1_header()
    load = Load(0x10_0000, (second + first + CODE).ljust(0x400, b"\0"))
    image = elf(load, entry=0x10_0010, notes=pvh_note(0x10_0020))
    signed = image[:510] + b"\x55\xaa" + image[512:]

    assert boot(write(signed), memory).registers.keys() == {"rbx"}
    signed = signed.replace(b"Xen\0", b"Ken\0")
    assert boot(write(signed), memory).registers["rax"] == 0x36D76289
    signed = signed.replace(words(0xE85250D6), words(0))
    assert boot(write(signed), memory).registers["rax"] == 0x2BADB002
    signed = signed.replace(words(0x1BADB002), words(0))
    assert boot(write(signed), memory).mode is CpuMode.LONG
    signed = signed.replace(b"\x7fELF", b"\x7fFLE")
    assert boot(write(signed), memory) == Entry(CpuMode.REAL, 0x7C00, {"rdx": 0x80})


def test_a_bzimage_is_not_taken_for_the_boot_sector_that_it_contains(write, memory):
    """bzImage comes first."""
    assert boot(write(bzimage()), memory).mode is CpuMode.LONG


@EACH
def test_each_image_is_found_as_what_it_is(write, name, image):
    """And bears the sign without which its module would not even be asked."""
    with ImageFile(write(image)) as file:
        found = protocol(name).probe(file)
        if name == "flat":
            assert found is None
        else:
            assert found is not None
            assert plausible(file).count(name) == 1
            assert detect(file) is protocol(name)


@EACH
def test_what_is_found_is_what_is_loaded(write, memory, name, image):
    """`probe` says where `plan` starts when nothing is moved and no option is given."""
    path = write(image)
    with ImageFile(path) as file:
        found = protocol(name).probe(file)
    entry = boot(path, memory, BootOptions(format=name))
    if found is not None and not any("relocatable within" in note for note in found.notes):
        assert (found.mode, found.rip) == (entry.mode, entry.rip)


@EACH
def test_every_other_format_refuses_an_image_or_boots_it(write, memory, name, image):
    """`--format` is obeyed: what the file does not offer is an error that names an offset."""
    path = write(image)
    refusals = {}
    for other in PROTOCOLS:
        try:
            boot(path, memory, BootOptions(format=other))
        except ImageError as error:
            refusals[other] = error.offset
    assert name not in refusals
    assert "flat" not in refusals
    assert None not in refusals.values()


@pytest.mark.parametrize("image", [CODE, b"\0", bytes(5000), b"#!/bin/sh\n"])
def test_a_file_without_any_magic_names_format_flat(write, memory, image):
    """One line that says how to boot it all the same."""
    with pytest.raises(ImageError, match=r"--format flat \(address, mode, entry\)") as caught:
        boot(write(image), memory)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("offset", "magic", "what"),
    [
        (0x38, "41524d64", "AArch64"),
        (0x38, "52534305", "RISC-V"),
        (0x38, "cd238281", "LoongArch"),
        (0x24, "18286f01", "32-bit ARM"),
        (0, "27051956", "uImage"),
        (0, "d00dfeed", "device tree"),
        (0, b"070701".hex(), "initrd"),
        (0, b"MZ".hex(), "EFI program"),
    ],
)
def test_a_kernel_for_another_machine_is_named(write, memory, offset, magic, what):
    """An EFI stub makes the first three look like EFI programs too."""
    image = (b"MZ" if offset else b"").ljust(offset, b"\0") + bytes.fromhex(magic)
    with pytest.raises(ImageError, match=f"{what}.*: a kernel for x86-64 is wanted, as bzImage or ELF") as caught:
        boot(write(image.ljust(0x1000, b"\0")), memory)
    assert caught.value.offset == offset


@pytest.mark.parametrize("bits", [32, 64])
def test_a_linux_without_a_pvh_entry_is_refused_as_elf(write, memory, bits):
    """It would start without boot_params, and die without a word. Whoever asks for it gets it."""
    path = write(elf(Load(0x10_0000, BANNER), bits=bits))
    with pytest.raises(ImageError, match=r"Linux 6\.1\.0-test .*: its bzImage does, or .*CONFIG_PVH") as caught:
        boot(path, memory)
    assert caught.value.offset == 24
    assert boot(path, memory, BootOptions(format="elf")).rip == 0x10_0000


def test_an_unknown_format_is_refused_with_the_list(write, memory):
    """The caller's mistake, found before the file is opened."""
    with pytest.raises(ValueError, match=r"'aout': bzimage, pvh, multiboot2, multiboot1, elf, bootsector, flat"):
        boot("/nowhere", memory, BootOptions(format="aout"))


def test_a_broken_claim_is_not_tried_as_something_else(write, memory):
    """A bzImage for 32 bits has a signed first sector too, and must not start as one."""
    with pytest.raises(ImageError, match="no 64-bit entry"):
        boot(write(bzimage(xloadflags=0)), memory)


@pytest.mark.parametrize("image", [bootsector(), elf(Load(0x10_0000))])
@pytest.mark.parametrize("options", [{"append": "x"}, {"initrd": "x"}, {"modules": (Module("x"),)}])
def test_options_that_the_protocol_does_not_know_are_refused(write, memory, touched, image, options):
    """A boot sector, a flat image and a plain ELF file take no command line and no modules."""
    for chosen in (BootOptions(**options), BootOptions(format="flat", **options)):
        with pytest.raises(ValueError, match="takes no") as caught:
            boot(write(image), memory, chosen)
        assert "PVH and multiboot" in str(caught.value)
    assert touched() == 0


@pytest.mark.parametrize("image", [bzimage(), pvh(), multiboot2(), multiboot1(), bootsector()])
@pytest.mark.parametrize("options", [{"address": 0x10_0000}, {"mode": CpuMode.LONG}, {"entry": 0x10_0000}])
def test_place_and_mode_are_for_elf_and_flat(write, memory, image, options):
    """The other protocols fix them."""
    with pytest.raises(ValueError, match=r"takes no .*flat images do"):
        boot(write(image), memory, BootOptions(**options))


def test_a_reset_loads_the_same_again(write, memory):
    """A second boot into used RAM gives the first one's bytes, bss included."""
    path = write(elf(Load(0x10_0000, memsz=0x3000)))
    boot(path, memory)
    before = memory.read(0, 2 * 0x10_0000)
    memory.fill(0x10_0000, 0x3000, 0xEE)
    boot(path, memory)
    assert memory.read(0, 2 * 0x10_0000) == before


def test_offsets_in_errors_are_hex(write, memory):
    """errors.py: what, where in hex, what is allowed; one line."""
    path = write(patch(elf(Load(0x10_0000)), 18, 40, 2))
    with pytest.raises(ImageError) as caught:
        boot(path, memory)
    assert (
        str(caught.value)
        == f"{path}: ELF64 for 32-bit ARM (e_machine 40): x86-64 (e_machine 62) is wanted (at offset 0x12)"
    )

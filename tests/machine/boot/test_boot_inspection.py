"""What a file is without booting it: every protocol, every reason against it, and its symbols."""

import json
import subprocess

import pytest
from boot_images import (
    E_SHOFF,
    EVERY_IMAGE,
    Load,
    bzimage,
    elf,
    multiboot1_header,
    multiboot2_header,
    patch,
    pvh_note,
)

from kvmpy import ImageError, MiB
from kvmpy.machine.boot import CpuMode, boot
from kvmpy.machine.boot.inspection import inspect
from kvmpy.machine.boot.symbols import symbols


@pytest.mark.parametrize(
    ("name", "image"), [(name, image) for name, images in EVERY_IMAGE.items() for image in images if name != "flat"]
)
def test_what_inspect_promises_is_what_boot_does(write, memory, name, image):
    """Mode, entry and segments of the first offer are those of a boot on a machine of that size."""
    path = write(image)
    found = inspect(path, memory_size=memory.size)
    offer, entry = found.offers[0], boot(path, memory)
    assert (found.boots, found.error, offer.protocol, offer.error) == (name, None, name, None)
    assert (offer.mode, offer.entry) == (entry.mode, entry.rip)
    for segment in offer.segments:
        assert memory.read(segment.gpa, segment.file_size) == image[segment.offset :][: segment.file_size]


def test_every_protocol_that_a_file_offers_is_listed(write):
    """In the order in which they are tried."""
    headers = multiboot2_header(bytes.fromhex("0000000008000000")) + multiboot1_header()
    found = inspect(write(elf(Load(0x10_0000, headers.ljust(0x400)), notes=pvh_note(0x10_0020))))
    assert [offer.protocol for offer in found.offers] == ["pvh", "multiboot2", "multiboot1", "elf"]
    assert [offer.mode for offer in found.offers] == [CpuMode.PROTECTED] * 3 + [CpuMode.LONG]
    assert found.boots == "pvh"


def test_a_broken_offer_says_why_and_where(write):
    """The error is a finding, not an exception."""
    found = inspect(write(bzimage(xloadflags=0)))
    assert found.boots is None
    assert found.offers[0].title == "bzImage"
    assert (found.offers[0].error, found.offers[0].error_offset) == (found.error, 0x236)
    assert "no 64-bit entry" in str(found.error)


def test_a_kernel_too_large_for_the_machine_says_so(write):
    """Its place is known all the same."""
    path = write(elf(Load(200 * MiB)))
    found = inspect(path, memory_size=128 * MiB)
    assert (found.boots, found.offers[0].entry) == (None, 200 * MiB)
    assert "outside 128 MiB" in str(found.error)
    assert inspect(path, memory_size=256 * MiB).boots == "elf"


def test_a_file_of_no_format_is_described_too(write):
    """And the way to boot it is named."""
    found = inspect(write(b"hello"))
    assert (found.what, found.offers, found.boots) == ("no known format", (), None)
    assert "--format flat" in str(found.error)


@pytest.mark.parametrize(
    ("image", "what"),
    [
        (bzimage(), "Linux bzImage 6.1.0-kvmpy-test, boot protocol 2.15"),
        (bzimage(kernel_version=0), "Linux bzImage of unknown version, boot protocol 2.15"),
        (bzimage(kernel_version=0xFFFF), "Linux bzImage of unknown version, boot protocol 2.15"),
        (bzimage()[:0x290], "Linux bzImage of unknown version, boot protocol 2.15"),
        (elf(Load(0x10_0000)), "ELF64 executable for x86-64, 0 sections, stripped"),
        (elf(Load(0x10_0000), bits=32), "ELF32 executable for i386, 0 sections, stripped"),
        (elf(Load(0x10_0000))[:20], "ELF file, damaged: "),
        (EVERY_IMAGE["multiboot1"][2], "multiboot 1 image"),
        (EVERY_IMAGE["bootsector"][0], "boot sector image"),
    ],
)
def test_a_file_is_named_by_its_contents(write, image, what):
    """One line, whatever the state of the file."""
    assert inspect(write(image)).what.startswith(what)


@pytest.mark.parametrize("name", EVERY_IMAGE)
def test_an_inspection_is_plain_data(write, name):
    """as_dict() survives JSON; segments carry the names of their fields."""
    for image in EVERY_IMAGE[name]:
        plain = inspect(write(image)).as_dict()
        assert json.loads(json.dumps(plain)).keys() == plain.keys()
        for offer in plain["offers"]:
            assert all(set(s) >= {"gpa", "offset", "file_size", "memory_size"} for s in offer["segments"])
            assert json.loads(json.dumps(offer["segments"])) == offer["segments"]


@pytest.fixture
def compiled(tmp_path):
    """An ELF executable with symbols, made by gcc."""
    (tmp_path / "one.c").write_text(
        "static int twice(void) { return 1; } int (*keep)(void) = twice; void _start(void) { for (;;); }"
    )
    (tmp_path / "two.c").write_text("static int twice(void) { return 2; } int (*also)(void) = twice;")
    path = str(tmp_path / "kernel")
    sources = [str(tmp_path / "one.c"), str(tmp_path / "two.c")]
    subprocess.run(["gcc", "-nostdlib", "-static", "-no-pie", "-fno-pic", "-o", path, *sources], check=True)
    return path


def test_symbols_are_names_with_addresses(compiled):
    """What nm prints; a local name may stand for several addresses."""
    lines = subprocess.run(["nm", compiled], check=True, capture_output=True, text=True).stdout.splitlines()
    expected: dict[str, list[int]] = {}
    for address, _, name in (line.split() for line in lines):
        expected.setdefault(name, []).append(int(address, 16))
    found = symbols(compiled)
    assert len(found["twice"]) == 2
    assert {name: sorted(where) for name, where in found.items()} == {n: sorted(w) for n, w in expected.items()}


def test_a_stripped_file_has_no_symbols(compiled):
    """That is no error."""
    subprocess.run(["strip", compiled], check=True)
    assert symbols(compiled) == {}


@pytest.mark.parametrize("damage", ["shoff", "shnum", "endless", "shentsize", "truncated", "symtab"])
def test_junk_section_tables_are_refused(compiled, damage):
    """Case 61: sh tables junk: one error, no exception of a library, no endless walk."""
    with open(compiled, "rb") as file:
        image = file.read()
    shoff = int.from_bytes(image[E_SHOFF[64] : E_SHOFF[64] + 8], "little")
    shnum = int.from_bytes(image[60:62], "little")
    if damage == "symtab":
        symtab = next(i for i in range(shnum) if image[shoff + i * 64 + 4] == 2)
        image = patch(image, shoff + symtab * 64 + 32, 2**60 // 24 * 24, 8)
    elif damage in ("shnum", "endless"):
        # 0 here means: the number is the size of section 0 (gABI chapter 4, "Sections").
        image = patch(patch(image, 60, 0, 2), shoff + 32, 2**60, 8)
        image = patch(image, 58, 0, 2) if damage == "endless" else image
    else:
        image = {
            "shoff": patch(image, E_SHOFF[64], 2**63, 8),
            "shentsize": patch(image, 58, 0, 2),
            "truncated": image[:3000],
        }[damage]
    with open(compiled, "wb") as file:
        file.write(image)
    with pytest.raises(ImageError) as caught:
        symbols(compiled)
    assert "\n" not in str(caught.value)
    assert inspect(compiled).what.startswith("ELF file, damaged: ")


def test_only_elf_files_have_symbols(write):
    """Anything else is refused."""
    with pytest.raises(ImageError, match="no readable ELF file"):
        symbols(write(b"hello"))

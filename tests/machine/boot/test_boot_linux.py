"""Which images are Linux, and of which version: by what they say of themselves."""

import pytest
from boot_images import BANNER, CODE, EVERY_IMAGE, SETUP, Load, bzimage, elf, multiboot1, patch, pvh

from kvmpy.lessons import lessons
from kvmpy.machine.boot import linux
from kvmpy.machine.boot.image import ImageFile
from kvmpy.machine.boot.inspection import inspect
from kvmpy.machine.boot.linux import linux_version

TEXT = 0x20_0000


def version(path: str) -> str | None:
    """Return the version of the file."""
    with ImageFile(path) as image:
        return linux_version(image)


def version_line(line: bytes) -> bytes:
    """Return a bzImage with another version line."""
    return bzimage().replace(b"6.1.0-kvmpy-test", line.ljust(16, b"\0"), 1)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"6.1.192 (gcc 12)", "6.1.192"),
        (b"3.8", "3.8"),
        (b"6.18.0-rc1+ #1", "6.18.0-rc1+"),
        (b"hello", None),
        (b"6", None),
        (b"", None),
    ],
)
def test_a_bzimage_says_its_version_in_its_setup_code(write, line, expected):
    """boot.rst, kernel_version: a pointer to a human-readable version string, less 0x200."""
    assert version(write(version_line(line))) == expected


@pytest.mark.parametrize("pointer", [0, 0xFFFF])
def test_a_bzimage_without_a_version_is_not_taken_for_linux(write, pointer):
    """As the lessons have it."""
    assert version(write(bzimage(kernel_version=pointer))) is None


def test_a_linux_that_cannot_boot_here_is_linux_all_the_same(write):
    """For the message that says why not."""
    assert version(write(bzimage(xloadflags=0, version=0x0204))) == "6.1.0-kvmpy-test"
    assert version(write(elf(Load(TEXT, BANNER), bits=32))) == "6.1.0-test"


@pytest.mark.parametrize("before", [0, 1 << 20, (1 << 20) - len(CODE) - 20, 5 << 20])
def test_the_banner_is_found_wherever_it_is_loaded_from(write, before):
    """Linux init/version.c, linux_banner. Also where two of the pieces meet in which it is looked for."""
    assert version(write(elf(Load(0x10_0000), Load(TEXT, bytes(before) + BANNER)))) == "6.1.0-test"


@pytest.mark.parametrize(
    "text",
    [
        b"Linux version %s (%s) %s",
        b"Linux version six (who@where)",
        b"Linux version 6.1.0",
        b"Linux version 6.1.0\0 (who@where)",
        b"Linux version 6." + b"1" * 80 + b" (who@where)",
        b"6.1.0 (who@where)",
    ],
)
def test_other_texts_are_no_banner(write, text):
    assert version(write(elf(Load(TEXT, CODE + text)))) is None
    assert version(write(elf(Load(TEXT, CODE + text + BANNER)))) == "6.1.0-test"


def test_no_more_than_a_bound_is_looked_at(write, monkeypatch):
    """Whatever the program headers say: each of 65534 could name all of the file."""
    monkeypatch.setattr(linux, "_LOOKED_AT", 1 << 20)
    path = write(elf(Load(0x10_0000), *[Load(TEXT, bytes(1 << 20))] * 2, Load(TEXT, BANNER)))
    assert version(path) is None
    monkeypatch.setattr(linux, "_LOOKED_AT", 3 << 20)
    assert version(path) == "6.1.0-test"


def test_what_is_not_loaded_does_not_count(write):
    """A banner behind the segments, in debug information perhaps."""
    assert version(write(elf(Load(TEXT)) + BANNER)) is None


@pytest.mark.parametrize("name", EVERY_IMAGE)
def test_other_kernels_are_no_linux(write, name):
    for image in EVERY_IMAGE[name] if name != "bzimage" else ():
        assert version(write(image)) is None


def test_no_lesson_is_taken_for_linux():
    built = [lesson for lesson in lessons() if lesson.image.is_file()]
    assert [lesson.name for lesson in built if version(str(lesson.image)) is not None] == []


@pytest.mark.parametrize(
    "image",
    [
        elf(Load(TEXT, BANNER))[:20],
        patch(elf(Load(TEXT, BANNER)), 32, 2**63, 8),
        patch(elf(Load(TEXT, BANNER)), 64 + 8, 2**63, 8),
        patch(bzimage(), *(SETUP["header"][0], 0, 4)),
        b"HdrS",
        b"\x7fELF",
        b"x",
    ],
)
def test_a_damaged_image_is_no_linux(write, image):
    """Why it is damaged, booting says."""
    assert version(write(image)) is None


def test_a_segment_that_leaves_the_file_is_searched_as_far_as_it_goes(write):
    image = elf(Load(TEXT, BANNER))
    assert version(write(patch(image, 64 + 32, 2**62, 8))) == "6.1.0-test"


@pytest.mark.parametrize(
    ("image", "expected"),
    [(bzimage(), "6.1.0-kvmpy-test"), (pvh(code=BANNER), "6.1.0-test"), (pvh(), None), (multiboot1(), None)],
)
def test_inspect_says_the_version(write, image, expected):
    assert inspect(write(image)).linux == expected

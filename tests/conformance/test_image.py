"""The disk of the bench is a `DiskImage` as any other, and it notices what it is there to notice."""

import os

import pytest

from kvmpy.conformance.image import CHUNK, GUARD, PatchworkImage, State, pattern
from kvmpy.storage.disk import ZEROS

CHUNKS = (State.OWN, State.SHARED, State.ZERO, State.SHARED)
SECTORS = CHUNK * len(CHUNKS)


@pytest.fixture
def image():
    with PatchworkImage(CHUNKS, hidden=(3,)) as image:
        yield image


def test_table_says_what_is_known(image):
    """Ascending, without overlap; the hidden chunk is a gap."""
    assert [(e.sector, e.sectors, e.writable) for e in image.table()] == [(0, 8, True), (8, 8, False), (16, 8, False)]
    assert image.table()[2].fd == ZEROS


def test_map_covers_the_range_and_makes_it_writable(image):
    before = image.contents()
    mapped = image.map(10, 15, write=True)
    assert [(e.sector, e.sectors, e.writable) for e in mapped] == [(8, 8, True), (16, 16, True)]
    assert image.contents() == before
    assert image.is_intact()


def test_contents_are_what_the_extents_hold(image):
    image.map(24, 8, write=False)
    read = b"".join(
        bytes(512 * e.sectors) if e.fd == ZEROS else os.pread(e.fd, 512 * e.sectors, e.offset) for e in image.table()
    )
    assert read == image.contents()
    assert read[:512] == pattern(0)


def test_zero_is_exact(image):
    expected = bytearray(image.contents())
    expected[512 * 3 : 512 * 13] = bytes(512 * 10)
    image.zero(3, 10)
    assert image.contents() == bytes(expected)
    assert image.is_intact()


@pytest.mark.parametrize("offset", [GUARD - 1, GUARD + CHUNK * 2 * 512])
def test_byte_in_a_guard_is_noticed(image, offset):
    os.pwrite(image.table()[0].fd, b"x", offset)
    assert not image.is_intact()


def test_byte_in_the_shared_file_is_noticed(image):
    shared = image.table()[1]
    os.pwrite(shared.fd, b"x", shared.offset)
    assert not image.is_intact()


def test_image_fails_as_told(image):
    image.failing = OSError(28, "full")
    with pytest.raises(OSError, match="full"):
        image.map(8, 1, write=True)
    assert image.asked == 1


def test_cut_files_can_be_restored(image):
    before = image.contents()
    held = image.truncate(2)
    assert not image.is_intact()
    image.restore(held)
    assert image.is_intact()
    assert image.contents() == before


def test_no_two_sectors_are_alike():
    assert len({pattern(sector) for sector in range(SECTORS)} | {bytes(512)}) == SECTORS + 1

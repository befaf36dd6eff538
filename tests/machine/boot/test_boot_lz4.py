"""LZ4's legacy frame: blocks written by hand from the specification, a packer of the tests, and damage."""

import tracemalloc

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from packed_images import BLOCK_SIZE, lz4, sequence

from kvmpy.machine.boot import lz4 as lz4_format
from kvmpy.machine.boot.lz4 import Lz4Error, unpack_block, unpack_blocks

FRAME = bytes.fromhex("02214c18")
TEXTS = st.lists(st.sampled_from([b"kernel", b"\0" * 300, b"\x90", b"0123456789" * 30]) | st.binary(max_size=40))


def frame(*blocks: bytes) -> bytes:
    """Return a frame of packed blocks."""
    return FRAME + b"".join(len(block).to_bytes(4, "little") + block for block in blocks)


@pytest.mark.parametrize(
    ("block", "text"),
    [
        ("50 68656c6c6f", b"hello"),
        ("31 616263 0300 50 6465666768", b"abcabcab" + b"defgh"),
        ("1f 61 0100 00 10 62", b"a" * 20 + b"b"),
        ("1f 61 0100 ff00 10 62", b"a" * (1 + 19 + 255) + b"b"),
        ("f0 01" + "78" * 16, b"x" * 16),
        ("f0 ff00" + "78" * 270, b"x" * 270),
        ("20 6162 0200 00 0100 10 63", b"ab" + b"abab" + b"bbbb" + b"c"),
    ],
)
def test_a_block_unpacks_as_the_specification_says(block, text):
    """lz4_Block_format.md: token, literals, offset, match; a match may reach into what it writes."""
    assert unpack_block(bytes.fromhex(block)) == text


@given(TEXTS)
@example([b"a" * 70000, b"b", b"a" * 70000])
def test_what_was_packed_comes_back(parts):
    text = b"".join(parts)
    assert b"".join(unpack_blocks(lz4(text))) == text


def test_a_frame_has_many_blocks():
    """lz4_Frame_format.md, "Legacy frame": each of 8 MiB but the last; none looks back into another."""
    blocks = unpack_blocks(frame(sequence(b"a", 1, BLOCK_SIZE - 2) + sequence(b"b"), sequence(b"end")))
    assert [bytes(block) for block in blocks] == [b"a" * (BLOCK_SIZE - 1) + b"b", b"end"]
    with pytest.raises(Lz4Error, match="4 bytes back, and 0 are there"):
        list(unpack_blocks(frame(bytes.fromhex("50 68656c6c6f"), sequence(b"", 4))))


@pytest.mark.parametrize("behind", [0, 1, 4])
def test_a_few_bytes_behind_the_last_block_are_ignored(behind):
    """The payload of a bzImage has its size there."""
    assert list(unpack_blocks(frame(b"\x10a") + b"\x07" * behind)) == [b"a"]


@pytest.mark.parametrize(
    ("data", "text", "offset"),
    [
        (frame(b"") + b"x", "block of 0 bytes", 8),
        (FRAME + b"\xff\xff\xff\xff" + bytes(9), "block of 4294967295 bytes: 1 to 8421520 are possible", 8),
        (FRAME + b"\x03\0\0\0" + b"\x10a", "truncated: a block of 3 bytes, and 2 are left", 8),
        (frame(b"\x20a"), "literals end 1 bytes behind", 10),
        (frame(b"\xf0"), "ends in the middle", 9),
        (frame(b"\x10a\1"), "ends in the middle", 11),
        (frame(b"\x1fa\1\0\xff"), "ends in the middle", 13),
        (frame(b"\x10a\0\0\x10b"), "a match 0 bytes back", 10),
        (frame(b"\x10a\2\0\x10b"), "a match 2 bytes back, and 1 are there", 10),
    ],
)
def test_damage_is_refused_with_its_offset(data, text, offset):
    with pytest.raises(Lz4Error, match=text) as caught:
        list(unpack_blocks(data))
    assert caught.value.offset == offset


def test_a_block_unpacks_to_8_mib_and_not_a_byte_more():
    with pytest.raises(Lz4Error, match="more than 8388608"):
        unpack_block(sequence(b"a", 1, BLOCK_SIZE - 2) + sequence(b"bc"))


@pytest.mark.parametrize(
    "bomb",
    [
        sequence(b"a", 1, 40_000) * 200 + b"\x10b",
        sequence(b"a", 1, 1 << 24),
        sequence(b"a" * 40_000, 1, 40_000) * 200 + b"\x10b",
        sequence(b"a", 1, 18) * 16_000 + b"\x10b",
    ],
)
def test_a_bomb_is_refused_before_it_takes_memory(monkeypatch, bomb):
    """Each byte of a length adds 255: a block of 8 MiB could claim 2 GiB, and one match as much."""
    monkeypatch.setattr(lz4_format, "BLOCK_SIZE", 1 << 16)
    tracemalloc.start()
    try:
        with pytest.raises(Lz4Error):
            unpack_block(bomb)
        assert tracemalloc.get_traced_memory()[1] < 16 << 16
    finally:
        tracemalloc.stop()


@given(st.binary(max_size=200))
def test_any_bytes_unpack_or_are_refused(data):
    refusals = []
    try:
        assert all(len(block) <= BLOCK_SIZE for block in unpack_blocks(FRAME + data))
    except Lz4Error as error:
        refusals.append(error.offset)
    assert all(0 <= offset <= len(FRAME + data) for offset in refusals)

"""Damaged and hostile VHDs, case by case: refused with the offset of what is wrong, quickly and without much memory."""

import os
import struct
import tracemalloc

import pytest
from vhd_files import TABLE, dynamic, fixed, footer

from kvmpy.errors import VhdFormatError
from kvmpy.storage.convert import check_disk
from kvmpy.storage.open import open_disk
from kvmpy.storage.vhd import MAX_SIZE, DiskType, DynamicHeader

BLOCKS = {0: ("1" * 8, b"a" * 4096), 2: ("1" * 8, b"c" * 4096)}
SIZE = 4 * 4096
FIRST_BLOCK = TABLE + 512
END = FIRST_BLOCK + 2 * 4608


def refused(tmp_path, content: bytes, message: str) -> int | None:
    """Return the offset that the refusal names, read-only and for writing, which leave the file as it is."""
    path = tmp_path / "bad.vhd"
    path.write_bytes(content)
    descriptors = len(os.listdir("/proc/self/fd"))
    offsets = set()
    for readonly in (True, False):
        with pytest.raises(VhdFormatError, match=message) as caught:
            open_disk(path, format="vhd", readonly=readonly)
        assert caught.value.path == str(path)
        offsets.add(caught.value.offset)
    assert check_disk(str(path), format="vhd") == [str(caught.value)]
    assert path.read_bytes() == content
    assert len(os.listdir("/proc/self/fd")) == descriptors
    [offset] = offsets
    return offset


def with_table(*entries: int) -> bytes:
    """Return a good dynamic VHD with these entries in its table."""
    content = bytearray(dynamic(SIZE, BLOCKS))
    struct.pack_into(f">{len(entries)}I", content, TABLE, *entries)
    return bytes(content)


def with_header(**fields: int) -> bytes:
    """Return a good dynamic VHD whose header has these fields and a good checksum."""
    content = dynamic(SIZE, BLOCKS)
    header = DynamicHeader(TABLE, 4, 4096)._replace(**fields)
    return content[:512] + header.to_bytes() + content[1536:]


def with_footers(**fields: int) -> bytes:
    """Return a good dynamic VHD whose footers have these fields and good checksums."""
    sector = footer(SIZE, DiskType.DYNAMIC)._replace(**fields).to_bytes()
    return sector + dynamic(SIZE, BLOCKS)[512:-512] + sector


def test_the_file_that_the_others_are_made_of_is_good(tmp_path):
    path = tmp_path / "good.vhd"
    for content in (dynamic(SIZE, BLOCKS), with_header(), with_footers(), fixed(bytes(SIZE))):
        path.write_bytes(content)
        assert check_disk(str(path), format="vhd") == []


@pytest.mark.parametrize("size", [0, 1, 511, 513, 1000])
def test_file_size_that_is_no_multiple_of_512(tmp_path, size):
    assert refused(tmp_path, bytes(size), f"{size} bytes: a VHD is a multiple of 512, and not 0") == size


def test_file_without_a_footer(tmp_path):
    assert refused(tmp_path, bytes(4096), "no VHD footer here") == 3584


def test_wrong_checksum_of_the_footer(tmp_path):
    content = bytearray(fixed(bytes(SIZE)))
    content[-1] ^= 1
    assert refused(tmp_path, bytes(content), "the checksum of the footer is") == SIZE + 64


def test_wrong_checksum_of_the_dynamic_header(tmp_path):
    content = bytearray(dynamic(SIZE, BLOCKS))
    content[1535] ^= 1
    assert refused(tmp_path, bytes(content), "the checksum of the dynamic header is") == 512 + 36


@pytest.mark.parametrize(
    ("disk_type", "message", "offset"),
    [(DiskType.FIXED, "before the footer there are 0", 48), (DiskType.DYNAMIC, "the dynamic header is at 0x200", 16)],
)
def test_footer_and_nothing_else(tmp_path, disk_type, message, offset):
    assert refused(tmp_path, footer(SIZE, disk_type).to_bytes(), message) == offset


def test_fixed_disk_that_is_larger_than_its_file(tmp_path):
    content = fixed(bytes(SIZE))
    assert refused(tmp_path, content[512:], f"a disk of {SIZE} bytes: before the footer") == SIZE - 512 + 48


def test_fixed_disk_that_is_smaller_than_its_file_is_read(tmp_path):
    """Padding between the disk and the footer harms nobody: the current size counts."""
    path = tmp_path / "padded.vhd"
    content = fixed(b"d" * SIZE)
    path.write_bytes(content[:-512] + bytes(4096) + content[-512:])
    with open_disk(path, format="vhd") as disk:
        assert disk.size == SIZE


@pytest.mark.parametrize("offset", [0, 1, 511, END - 1023, END, 2**32, 2**63, 2**64 - 1024, 2**64 - 1])
def test_dynamic_header_outside_the_file(tmp_path, offset):
    content = with_footers(data_offset=offset)
    assert refused(tmp_path, content, f"the dynamic header is at 0x{offset:x}, 1024 bytes") == END + 16


@pytest.mark.parametrize("offset", [0, 511, END - 15, END, 2**63, 2**64 - 1])
def test_table_outside_the_file(tmp_path, offset):
    content = with_header(table_offset=offset)
    assert refused(tmp_path, content, f"the table is at 0x{offset:x}, 16 bytes: it must lie between") == 512 + 16


@pytest.mark.parametrize("offset", [512, 520, 1535])
def test_table_on_its_header(tmp_path, offset):
    assert refused(tmp_path, with_header(table_offset=offset), "the table lies on its header") == 512 + 16


@pytest.mark.parametrize("block_size", [0, 3, 511, 4097, 2**31])
def test_block_size_that_is_no_power_of_two(tmp_path, block_size):
    assert refused(tmp_path, with_header(block_size=block_size), f"blocks of {block_size} bytes") == 512 + 32


@pytest.mark.parametrize("entries", [0, 1, 3])
def test_fewer_entries_than_the_disk_has_blocks(tmp_path, entries):
    assert refused(tmp_path, with_header(max_table_entries=entries), f"{entries} blocks of 4096 bytes") == 512 + 28


@pytest.mark.parametrize("size", [0, 1, MAX_SIZE + 512, 2**63, 2**64 - 512])
def test_impossible_size_of_the_disk(tmp_path, size):
    assert refused(tmp_path, with_footers(current_size=size), f"a disk of {size} bytes") == END + 48


@pytest.mark.parametrize("entry", [(END - 4608) // 512 + 1, END // 512, 2**31, 2**32 - 2])
def test_entry_behind_the_end(tmp_path, entry):
    content = with_table(2**32 - 1, 2**32 - 1, 2**32 - 1, entry)
    assert refused(tmp_path, content, f"block 3, at sector 0x{entry:x} of the file, ends beyond") == TABLE + 12


@pytest.mark.parametrize("entry", [0, 1, 2, 3])
def test_entry_in_the_headers_or_the_table(tmp_path, entry):
    assert refused(tmp_path, with_table(2**32 - 1, entry, 2**32 - 1), "lies on the headers") == TABLE + 4


def test_entry_on_the_copy_of_the_footer(tmp_path):
    """Wherever the header is: here it is behind the blocks."""
    content, header = with_table(2**32 - 1, 0, 2**32 - 1), DynamicHeader(TABLE, 4, 512).to_bytes()
    sector = footer(4 * 512, DiskType.DYNAMIC)._replace(data_offset=END).to_bytes()
    content = sector + content[512:-512] + header + sector
    assert refused(tmp_path, content, "block 1, at sector 0x0 of the file, lies on the headers") == TABLE + 4


@pytest.mark.parametrize("shift", [0, 1, 8])
def test_block_on_another(tmp_path, shift):
    entry = FIRST_BLOCK // 512 + shift
    content = with_table(FIRST_BLOCK // 512, 2**32 - 1, entry, 2**32 - 1)
    refused(tmp_path, content, "lies on another block")


def test_blocks_that_touch_are_good(tmp_path):
    path = tmp_path / "good.vhd"
    path.write_bytes(with_table(2**32 - 1, FIRST_BLOCK // 512 + 9, FIRST_BLOCK // 512, 2**32 - 1))
    assert check_disk(str(path), format="vhd") == []


def test_differing_copy_of_the_footer_is_told_by_check(tmp_path):
    path = tmp_path / "odd.vhd"
    content = dynamic(SIZE, BLOCKS)
    path.write_bytes(footer(512, DiskType.DYNAMIC).to_bytes() + content[512:])
    with open_disk(path, format="vhd", readonly=True) as disk:
        assert disk.size == SIZE
    assert check_disk(str(path), format="vhd") == [f"{path}: is not the copy of the footer (at offset 0x0)"]


# --- bounds ---


def sparse_file(path, blocks: int, block_size: int, entry: int) -> None:
    """Write a dynamic VHD with that many blocks, whose entries are all the same, in a huge sparse file."""
    size = blocks * block_size
    sector = footer(size, DiskType.DYNAMIC).to_bytes()
    with open(path, "wb") as file:
        file.write(sector + DynamicHeader(TABLE, blocks, block_size).to_bytes())
        if entry:
            file.write(struct.pack(">I", entry) * blocks)
        file.seek(1 << 40)
        file.write(sector)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("entry", [0, 0x10000])
def test_large_table_that_is_all_wrong_is_refused_in_little_memory(tmp_path, entry):
    path = tmp_path / "huge.vhd"
    sparse_file(path, 1 << 18, 4096, entry)
    tracemalloc.start()
    try:
        with pytest.raises(VhdFormatError, match="lies on another block"):
            open_disk(path, format="vhd")
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()


def test_table_without_bound_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "huge.vhd"
    sparse_file(path, (1 << 22) + 1, 512, 0)
    with pytest.raises(VhdFormatError, match="4194305 blocks: at most 4194304 are read"):
        open_disk(path, format="vhd")


def test_bitmap_that_changes_at_every_sector_is_told_a_piece_at_a_time(tmp_path):
    """A block of 256 MiB has half a million sectors: one question gives some thousand extents, whatever its bits."""
    path = tmp_path / "odd.vhd"
    block_size = 256 << 20
    sector = footer(block_size, DiskType.DYNAMIC).to_bytes()
    with open(path, "wb") as file:
        header = DynamicHeader(TABLE, 1, block_size)
        file.write(sector + header.to_bytes() + struct.pack(">I", 4).ljust(512, b"\xff"))
        file.write(b"\xaa" * 65536)
        file.seek(block_size, os.SEEK_CUR)
        file.write(sector)
    with open_disk(path, format="vhd", readonly=True) as disk:
        extents = disk.map(100_000, 8, write=False)
        assert len(extents) <= 4096 + 8
        assert extents[0].sector <= 100_000
        assert extents[-1].end >= 100_008

"""The structures of a VHD: footer, dynamic header, geometry, checksum."""

import random
import struct
import time

import pytest
from vhd_files import footer

from kvmpy.errors import VhdFormatError
from kvmpy.storage.vhd import (
    BLOCK_SIZE,
    MAX_SIZE,
    DiskType,
    DynamicHeader,
    Geometry,
    ParentLocator,
    bitmap_size,
    block_place,
    geometry,
    new_footer,
    new_header,
    parse_footer,
    parse_header,
    whole_bitmap,
)
from kvmpy.units import MiB


def test_footer_has_its_fields_where_the_specification_puts_them():
    """Hard Disk Footer Format: 512 bytes, big-endian."""
    before = int(time.time())
    data = new_footer(64 * MiB, DiskType.FIXED).to_bytes()
    assert len(data) == 512
    assert data[:8] == b"conectix"
    assert struct.unpack(">II", data[8:16]) == (2, 0x00010000)
    assert data[16:24] == b"\xff" * 8
    assert 0 <= int.from_bytes(data[24:28], "big") - (before - 946684800) <= 60
    assert data[28:40] == b"win \x00\x01\x00\x00Wi2k"
    assert struct.unpack(">QQ", data[40:56]) == (64 * MiB, 64 * MiB)
    assert struct.unpack(">HBB", data[56:60]) == geometry(64 * MiB // 512)
    assert int.from_bytes(data[60:64], "big") == 2
    assert any(data[68:84])
    assert data[84:] == bytes(428)


def test_checksum_is_the_ones_complement_of_the_sum_of_the_other_bytes():
    data = new_footer(MiB, DiskType.DYNAMIC).to_bytes()
    assert int.from_bytes(data[64:68], "big") == ~(sum(data[:64]) + sum(data[68:])) & 0xFFFFFFFF


def test_dynamic_header_has_its_fields_where_the_specification_puts_them():
    """Dynamic Disk Header Format: 1024 bytes, big-endian."""
    data = new_header(5 * MiB).to_bytes()
    assert len(data) == 1024
    assert data[:16] == b"cxsparse" + b"\xff" * 8
    assert struct.unpack(">QIII", data[16:36]) == (1536, 0x00010000, 3, BLOCK_SIZE)
    assert int.from_bytes(data[36:40], "big") == ~(sum(data[:36]) + sum(data[40:])) & 0xFFFFFFFF
    assert data[40:] == bytes(984)


def test_new_disks_have_identities_of_their_own():
    assert new_footer(MiB, DiskType.FIXED).unique_id != new_footer(MiB, DiskType.FIXED).unique_id


@pytest.mark.parametrize("disk_type", list(DiskType))
def test_footer_is_read_as_it_was_written(disk_type):
    written = footer(12345 * 512, disk_type)._replace(saved_state=1, creator_application=b"qemu", original_size=512)
    assert parse_footer(written.to_bytes(), path="f", offset=0) == written


def test_dynamic_header_is_read_as_it_was_written():
    locators = (ParentLocator(b"W2ru", 512, 20, 4096), *[ParentLocator()] * 7)
    written = DynamicHeader(1536, 8, 4096, b"p" * 16, 99, "b\u00e4se.vhd", locators)
    found = footer(8 * 4096, DiskType.DIFFERENCING)
    assert parse_header(written.to_bytes(), found, path="f") == written


def refused_footer(data: bytes, message: str) -> int:
    """Return the offset that the error names, for a footer at 0x1000."""
    with pytest.raises(VhdFormatError, match=message) as caught:
        parse_footer(data, path="f", offset=0x1000)
    assert caught.value.path == "f"
    assert str(caught.value).startswith("f: ")
    return caught.value.offset - 0x1000


def test_wrong_cookie_and_checksum_are_refused_with_their_offset():
    data = footer(MiB, DiskType.FIXED).to_bytes()
    assert refused_footer(b"X" + data[1:], "no VHD footer") == 0
    assert refused_footer(data[:300] + b"X" + data[301:], "checksum of the footer is 0x[0-9a-f]{8}: its bytes") == 64


@pytest.mark.parametrize("size", [0, 1, 511, 513, MAX_SIZE + 512, 2**64 - 512])
def test_impossible_size_is_refused_with_its_offset(size):
    """A disk is a multiple of 512 bytes, not 0, and at most 2040 GiB."""
    assert refused_footer(footer(size, DiskType.FIXED).to_bytes(), f"a disk of {size} bytes") == 48


@pytest.mark.parametrize("disk_type", [0, 1, 5, 6, 2**32 - 1])
def test_unknown_disk_type_is_refused_with_its_offset(disk_type):
    assert refused_footer(footer(MiB, disk_type).to_bytes(), f"disk type {disk_type}: known are") == 60


def refused_header(header: DynamicHeader, message: str, size: int = 8 * 4096) -> int:
    """Return the offset that the error names, in a header at 512."""
    with pytest.raises(VhdFormatError, match=message) as caught:
        parse_header(header.to_bytes(), footer(size, DiskType.DYNAMIC), path="f")
    return caught.value.offset - 512


@pytest.mark.parametrize("block_size", [0, 1, 256, 513, 3 * 512, 2 * MiB - 512, 512 * MiB, 2**31])
def test_block_size_that_is_no_power_of_two_in_range_is_refused(block_size):
    assert refused_header(DynamicHeader(1536, 2**30, block_size), f"blocks of {block_size} bytes: allowed is") == 32


def test_table_that_is_shorter_than_the_disk_is_refused():
    assert refused_header(DynamicHeader(1536, 7, 4096), "7 blocks of 4096 bytes are less than the disk's 32768") == 28


def test_other_versions_are_refused():
    data = bytearray(footer(MiB, DiskType.FIXED).to_bytes())
    data[12:16] = (0x00020000).to_bytes(4, "big")
    data[67] -= 1  # the checksum
    assert refused_footer(bytes(data), "version 0x20000") == 12


@pytest.mark.parametrize(
    ("block_size", "size", "ones"), [(512, 512, 1), (4096, 512, 8), (2 * MiB, 512, 4096), (4 * MiB, 1024, 8192)]
)
def test_bitmap_has_a_bit_for_each_sector_and_fills_sectors(block_size, size, ones):
    bitmap = whole_bitmap(block_size)
    assert bitmap_size(block_size) == len(bitmap) == size
    assert f"{int.from_bytes(bitmap, 'big'):b}" == "1" * ones + "0" * (8 * size - ones)


@pytest.mark.parametrize("block_size", [512, 1024, 4096, 512 * 1024, 2 * MiB, 4 * MiB, 256 * MiB])
@pytest.mark.parametrize("end", [1536, 2048, 4096, 4096 + 3584, 10_000 * 512])
def test_data_of_a_block_begin_on_a_page(block_size, end):
    """So that what is a page for the guest is one in the host's cache: but no more room than a page is spent on it."""
    place = block_place(end, block_size)
    assert end <= place < end + 4096
    assert place % 512 == 0
    assert (place + bitmap_size(block_size)) % min(4096, block_size) == 0


def appendix(sectors: int) -> Geometry:
    """Calculate as the specification's appendix does, step by step."""
    sectors = min(sectors, 65535 * 16 * 255)
    if sectors >= 65535 * 16 * 63:
        per_track, heads, tracks = 255, 16, sectors // 255
    else:
        per_track = 17
        tracks = sectors // per_track
        heads = max(4, (tracks + 1023) // 1024)
        if tracks >= heads * 1024 or heads > 16:
            per_track, heads = 31, 16
            tracks = sectors // per_track
        if tracks >= heads * 1024:
            per_track, heads = 63, 16
            tracks = sectors // per_track
    return Geometry(tracks // heads, heads, per_track)


def test_geometry_is_the_appendixs():
    rng = random.Random(7)
    edges = [17 * 4 * 1024, 17 * 16 * 1024, 31 * 16 * 1024, 65535 * 16 * 63, 65535 * 16 * 255, MAX_SIZE // 512]
    sizes = [edge + off for edge in edges for off in (-17, -1, 0, 1, 17)]
    for sectors in [1, 16, 17, 68, *sizes, *(int(2 ** rng.uniform(0, 32)) for _ in range(500))]:
        assert geometry(sectors) == appendix(sectors), sectors

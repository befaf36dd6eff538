"""Dynamic VHDs, read and written in place as an engine does it."""

import os
import random
import shutil

import pytest
from vhd_files import dynamic, read_disk, write_disk

from kvmpy.errors import DiskError, LeaseError, VhdFormatError
from kvmpy.storage import files
from kvmpy.storage.convert import check_disk, create
from kvmpy.storage.disk import ZEROS, Extent
from kvmpy.storage.open import open_disk
from kvmpy.units import GiB, MiB

ALL = "1" * 8  # the bitmap of a whole block of 4096 bytes


@pytest.fixture
def vhd(tmp_path):
    """Return a function that puts a built file at a path."""

    def put(size, blocks, **options):
        path = tmp_path / "disk.vhd"
        path.write_bytes(dynamic(size, blocks, **options))
        return path

    return put


def reopened(path, **options):
    return open_disk(path, format="vhd", **options)


def test_unallocated_blocks_are_known_zeros_and_the_others_are_asked_for(vhd):
    path = vhd(5 * 4096, {1: (ALL, b"a" * 4096), 3: (ALL, b"b" * 4096)})
    with reopened(path) as disk:
        assert disk.table() == [Extent(0, 8, ZEROS), Extent(16, 8, ZEROS), Extent(32, 8, ZEROS)]
        assert read_disk(disk) == bytes(4096) + b"a" * 4096 + bytes(4096) + b"b" * 4096 + bytes(4096)
        [extent] = disk.map(9, 1, write=False)
        assert (extent.sector, extent.sectors, extent.writable) == (8, 8, True)


def test_sector_whose_bit_is_0_reads_as_zeros(vhd):
    """Data Blocks: a bit of 0 says that the sector is not there, whatever lies in its place."""
    path = vhd(4096, {0: ("10010110", b"x" * 4096)})
    with reopened(path, readonly=True) as disk:
        x, o = b"x" * 512, bytes(512)
        assert read_disk(disk) == x + o + o + x + o + x + x + o
        assert [extent.writable for extent in disk.map(0, 8, write=False)] == [False] * 6


def test_write_sets_the_bits_and_never_shows_what_lay_in_the_file(vhd):
    path = vhd(4096, {0: ("10010110", b"x" * 4096)})
    with reopened(path) as disk:
        [extent] = disk.map(1, 1, write=True)
        assert (extent.sector, extent.sectors, extent.writable) == (0, 8, True)
        x, o = b"x" * 512, bytes(512)
        assert read_disk(disk) == x + o + o + x + o + x + x + o
        assert os.pread(extent.fd, 512, extent.offset - 512) == b"\xff" + bytes(511)


def test_last_block_ends_with_the_disk(vhd):
    path = vhd(4096 + 512, {1: (ALL, b"z" * 4096)})
    with reopened(path) as disk:
        [extent] = disk.map(8, 1, write=True)
        assert (extent.sector, extent.sectors) == (8, 1)
        with pytest.raises(ValueError, match="the disk has 9"):
            disk.map(8, 2, write=True)


@pytest.mark.parametrize("block_size", [512, 1024, 4096, 64 * 1024, 2 * MiB])
def test_what_is_written_at_random_is_read_again(vhd, block_size):
    size = 64 * 1024 + 512
    path = vhd(size, {}, block_size=block_size)
    rng = random.Random(block_size)
    wanted = bytearray(size)
    for _ in range(5):
        with reopened(path) as disk:
            for _ in range(8):
                sector = rng.randrange(size // 512)
                data = rng.randbytes(512 * rng.randint(1, min(20, size // 512 - sector)))
                write_disk(disk, sector, data)
                wanted[sector * 512 : sector * 512 + len(data)] = data
            assert read_disk(disk) == wanted
        assert check_disk(str(path), format="vhd") == []
    with reopened(path, readonly=True) as disk:
        assert read_disk(disk) == wanted


def test_data_of_our_blocks_begin_on_pages_of_the_host(tmp_path):
    path = str(tmp_path / "disk.vhd")
    create(path, 64 * MiB, format="vhd-dynamic")
    with reopened(path) as disk:
        for sector in (0, 100_000, 50_000):
            [extent] = disk.map(sector, 8, write=True)
            assert extent.offset % 4096 == 0
            assert extent.sectors == 4096


def test_data_that_share_pages_with_the_table_never_go_past_the_page_cache(tmp_path, vhd):
    """Two writers of one page, one of them past the cache, lose bytes: metadata always take the cache."""
    path = vhd(8 * 4096, {1: (ALL, b"x" * 4096)})
    try:
        disk = reopened(path, direct=True)
    except DiskError as error:
        pytest.skip(str(error))
    with disk:
        assert disk.alignment >= 512
        [others] = disk.map(8, 8, write=True)
        [ours] = disk.map(0, 8, write=True)
        assert others.offset % 4096
        assert others.fd == others.unaligned_fd
        assert ours.fd != ours.unaligned_fd == others.fd
        os.pwrite(ours.unaligned_fd, b"y" * 512, ours.offset)
        assert read_disk(disk, 0, 9) == b"y" * 512 + bytes(3584) + b"x" * 512


def test_file_grows_by_what_is_written_only(tmp_path):
    path = str(tmp_path / "disk.vhd")
    create(path, 3 * GiB, format="vhd-dynamic")
    empty = os.stat(path).st_blocks
    with reopened(path) as disk:
        for gib in range(3):
            write_disk(disk, gib * GiB // 512, b"x" * 4096)
    assert os.path.getsize(path) < 7 * MiB
    assert os.stat(path).st_blocks - empty <= 3 * 3 * 8  # each a page, its bitmap's page, and a footer's


def test_zeroed_sectors_give_their_room_back_and_their_blocks_stay(tmp_path):
    path = str(tmp_path / "disk.vhd")
    create(path, 8 * MiB, format="vhd-dynamic")
    with reopened(path) as disk:
        write_disk(disk, 0, b"x" * 4 * MiB)
        full = os.stat(path).st_blocks
        extents = disk.zero(1024, 8192)
        assert extents[0].sector <= 1024
        assert extents[-1].end >= 9216
        assert os.stat(path).st_blocks <= full - 7000
    with reopened(path) as disk:
        assert read_disk(disk) == b"x" * (512 * 1024) + bytes(7 * MiB + 512 * 1024)


def test_readonly_disk_refuses_to_be_written(vhd):
    path = vhd(8192, {})
    before = path.read_bytes()
    with reopened(path, readonly=True) as disk:
        for change in (lambda: disk.map(0, 1, write=True), lambda: disk.zero(0, 1)):
            with pytest.raises(DiskError, match="is open read-only"):
                change()
    assert path.read_bytes() == before


def test_second_writer_is_refused(vhd):
    path = vhd(8192, {})
    with reopened(path), pytest.raises(LeaseError):
        reopened(path)


def test_opening_and_closing_changes_no_byte(vhd):
    path = vhd(8192, {1: ("1100", b"x" * 4096)})
    before = path.read_bytes()
    reopened(path).close()
    assert path.read_bytes() == before


def test_footer_at_the_end_counts_or_else_its_copy_for_who_says_dynamic(vhd):
    """Hard Disk Footer Format: the copy at the start is there for when the footer is damaged."""
    path = vhd(8192, {1: (ALL, b"x" * 4096)})
    content = path.read_bytes()
    path.write_bytes(b"junk" + content[4:])
    with reopened(path, readonly=True) as disk:
        assert read_disk(disk, 8, 8) == b"x" * 4096
    assert check_disk(str(path), format="vhd") == [f"{path}: is not the copy of the footer (at offset 0x0)"]
    path.write_bytes(content[:-512] + bytes(512))
    with pytest.raises(VhdFormatError, match="no VHD footer here; its copy at offset 0 is good, and counts with"):
        reopened(path)
    with open_disk(path, format="vhd-dynamic", readonly=True) as disk:
        assert read_disk(disk, 8, 8) == b"x" * 4096
    assert path.read_bytes()[-512:] == bytes(512)
    assert len(check_disk(str(path), format="vhd-dynamic")) == 1


@pytest.mark.parametrize("end", [b"", bytes(512), b"\xa5" * 512, b"\xa5" * 8192])
def test_writer_puts_a_missing_footer_back_behind_all_that_is_there(vhd, end):
    """After a power cut on a file system that writes a file's size before its bytes, or another program's crash."""
    path = vhd(8192, {1: (ALL, b"x" * 4096)})
    content = path.read_bytes()[:-512] + end
    path.write_bytes(content)
    with open_disk(path, format="vhd-dynamic") as disk:
        assert path.read_bytes() == content + content[:512]
        write_disk(disk, 0, b"y" * 512)
    with reopened(path) as disk:
        assert read_disk(disk) == b"y" * 512 + bytes(3584) + b"x" * 4096
    assert check_disk(str(path), format="vhd") == []


def test_file_that_the_table_cannot_tell_further_is_full(tmp_path, vhd):
    """An entry is a sector of 32 bits: a block behind 2 TiB cannot be named."""
    path = vhd(8192, {})
    with open(path, "r+b") as file:
        footer = file.read(512)
        file.truncate(0xFFFFFFFF * 512 - 4096)
        file.seek(0, os.SEEK_END)
        file.write(footer)
    before = os.path.getsize(path)
    with reopened(path) as disk:
        with pytest.raises(DiskError, match="is full"):
            disk.map(0, 1, write=True)
        assert os.path.getsize(path) == before
        assert read_disk(disk) == bytes(8192)


# --- a host that fails ---


def fail_after(monkeypatch, name, calls, error=28):
    """Let the function of `files` work that many times, and then fail, until the test undoes it."""
    real, left = getattr(files, name), [calls]

    def limited(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(error, os.strerror(error))
        return real(*arguments)

    monkeypatch.setattr(files, name, limited)


@pytest.mark.parametrize("calls", [0, 1, 2, 3, 4])
def test_full_host_leaves_the_old_disk_and_room_that_is_used_again(tmp_path, monkeypatch, calls):
    """ENOSPC anywhere in a growth: the disk is as it was, however often it is tried, and later goes on."""
    path = str(tmp_path / "disk.vhd")
    create(path, 64 * MiB, format="vhd-dynamic")
    with reopened(path) as disk:
        write_disk(disk, 0, b"a" * 512)
        sizes = set()
        for _ in range(5):
            with monkeypatch.context() as patch:
                fail_after(patch, "pwrite_all", calls)
                with pytest.raises(OSError, match="No space left"):
                    disk.map(20_000, 8192, write=True)
            sizes.add(os.path.getsize(path))
            shutil.copy(path, path + ".crashed")
            assert check_disk(path + ".crashed", format="vhd") == []
            with reopened(path + ".crashed", readonly=True) as copy:
                assert read_disk(copy, 0, 1) == b"a" * 512
                assert read_disk(copy, 20_000, 8192) == bytes(8192 * 512)
        # Only a place that an entry may name is lost.
        assert len(sizes) == 1 or calls >= 3
        write_disk(disk, 20_000, b"b" * 8192 * 512)
        write_disk(disk, 60_000, b"c" * 512)
    with reopened(path) as disk:
        assert read_disk(disk, 0, 2) == b"a" * 512 + bytes(512)
        assert read_disk(disk, 19_999, 8194) == bytes(512) + b"b" * 8192 * 512 + bytes(512)
        assert read_disk(disk, 59_999, 3) == bytes(512) + b"c" * 512 + bytes(512)
    assert check_disk(path, format="vhd") == []


def test_after_a_failed_sync_nothing_grows_any_more(tmp_path, monkeypatch):
    """The kernel forgets what it could not write: a second sync that succeeds proves nothing."""
    path = str(tmp_path / "disk.vhd")
    create(path, 64 * MiB, format="vhd-dynamic")
    with reopened(path) as disk:
        with monkeypatch.context() as patch:
            fail_after(patch, "fdatasync", 0, error=5)
            with pytest.raises(OSError, match="Input/output error"):
                disk.map(0, 1, write=True)
        with pytest.raises(OSError, match="Input/output error"):
            disk.map(0, 1, write=True)
        assert read_disk(disk, 0, 8) == bytes(4096)


def test_file_that_is_cut_off_underneath_is_an_error_of_the_disk(tmp_path):
    path = str(tmp_path / "disk.vhd")
    create(path, 64 * MiB, format="vhd-dynamic")
    with reopened(path) as disk:
        write_disk(disk, 0, b"a" * 512)
        os.truncate(path, 2048)
        with pytest.raises(DiskError, match="truncated: the file ends here"):
            disk.map(0, 1, write=False)

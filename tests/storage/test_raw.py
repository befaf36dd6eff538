"""Raw disks: one extent, the file's own bytes."""

import os
import subprocess
import sys

import pytest
from vhd_files import read_disk, write_disk

from kvmpy.errors import DiskError, LeaseError
from kvmpy.storage.convert import import_disk
from kvmpy.storage.disk import SECTOR_SIZE
from kvmpy.storage.disk_file import direct_alignment
from kvmpy.storage.open import open_disk
from kvmpy.storage.raw import open_raw
from kvmpy.units import KiB, MiB


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "disk.raw"
    file.write_bytes(bytes(range(256)) * 16)
    return str(file)


def test_disk_is_one_extent_of_the_files_bytes(path):
    with open_raw(path) as disk:
        assert (disk.size, disk.readonly, disk.alignment) == (4096, False, 1)
        [extent] = disk.table()
        assert extent[:2] == (0, 8)
        assert extent.writable
        assert extent.unaligned_fd == extent.fd
        assert disk.map(3, 2, write=True) == [extent]
        assert read_disk(disk, 1, 1) == bytes(range(256)) * 2


def test_what_is_written_is_in_the_file(path):
    with open_raw(path) as disk:
        write_disk(disk, 7, b"z" * SECTOR_SIZE)
    with open(path, "rb") as file:
        assert file.read()[-513:] == b"\xff" + b"z" * 512


@pytest.mark.parametrize("size", [0, 1, 511, 513, 4095])
def test_size_that_is_no_multiple_of_512_is_refused(tmp_path, size):
    """A raw disk is a multiple of 512 bytes, and not 0; the error names the size."""
    file = tmp_path / "odd"
    file.write_bytes(bytes(size))
    with pytest.raises(DiskError, match=f"odd: {size} bytes: a raw disk is a multiple of 512") as caught:
        open_raw(str(file))
    assert caught.value.offset == size


def test_readonly_disk_has_no_writable_extent_and_refuses(path):
    with open_raw(path, readonly=True) as disk:
        assert [extent.writable for extent in disk.table()] == [False]
        for change in (lambda: disk.map(0, 1, write=True), lambda: disk.zero(0, 1)):
            with pytest.raises(DiskError, match="is open read-only"):
                change()


def test_zeroed_sectors_read_as_zeros_and_give_their_room_back(tmp_path):
    file = tmp_path / "full"
    file.write_bytes(b"x" * MiB)
    before = os.stat(file).st_blocks
    with open_raw(str(file)) as disk:
        disk.zero(8, 1024)
    assert file.read_bytes() == b"x" * 4096 + bytes(512 * 1024) + b"x" * (MiB - 4096 - 512 * 1024)
    assert os.stat(file).st_blocks <= before - 1000


@pytest.mark.parametrize(("sector", "sectors"), [(8, 1), (0, 9), (-1, 1), (0, -1), (2**64, 1)])
def test_range_outside_the_disk_is_the_callers_mistake(path, sector, sectors):
    with open_raw(path) as disk, pytest.raises(ValueError, match="the disk has 8"):
        disk.zero(sector, sectors)


def test_second_writer_is_refused_while_the_first_lives_and_readers_are_not(path):
    with open_raw(path):
        with pytest.raises(LeaseError):
            open_raw(path)
        open_raw(path, readonly=True).close()
    open_raw(path).close()


def test_writer_in_another_process_is_refused_too(path):
    program = f"from kvmpy.storage.raw import open_raw\nopen_raw({path!r})"
    with open_raw(path):
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
        assert done.returncode == 1
        assert f"LeaseError: {path}: process {os.getpid()} has it open for writing" in done.stderr


def test_failed_open_keeps_neither_lock_nor_descriptor(tmp_path):
    file = tmp_path / "odd"
    file.write_bytes(bytes(100))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(DiskError):
            open_raw(str(file))
    assert len(os.listdir("/proc/self/fd")) == before
    file.write_bytes(bytes(512))
    open_raw(str(file)).close()


def test_closing_twice_is_harmless(path):
    before = len(os.listdir("/proc/self/fd"))
    disk = open_raw(path)
    disk.close()
    disk.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_direct_disk_has_a_second_descriptor_for_what_is_not_aligned(path):
    """O_DIRECT takes only transfers that are aligned; the others go by way of the page cache."""
    try:
        disk = open_raw(path, direct=True)
    except DiskError as error:
        pytest.skip(str(error))
    with disk:
        [extent] = disk.table()
        assert extent.fd != extent.unaligned_fd
        assert os.path.sameopenfile(extent.fd, extent.unaligned_fd)
        assert disk.alignment == direct_alignment(os.stat(path)) >= 512
        write_disk(disk, 1, b"y" * SECTOR_SIZE)
    with open(path, "rb") as file:
        assert file.read()[512:1024] == b"y" * 512


@pytest.fixture
def block_device(tmp_path):
    """A loop device of 1 MiB that begins with a byte of ours."""
    (tmp_path / "image").write_bytes(b"x" + bytes(1 * MiB - 1))
    made = subprocess.run(["losetup", "--find", "--show", tmp_path / "image"], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no loop device for us: {made.stderr.strip()}")
    device = made.stdout.strip()
    yield device
    subprocess.run(["losetup", "--detach", device], check=True)


def test_block_device_is_read_and_written(block_device):
    """The inode of a block device says size 0: the device is asked."""
    with open_raw(block_device) as disk:
        assert disk.size == 1 * MiB
        write_disk(disk, 1 * MiB // SECTOR_SIZE - 1, b"y" * 512)
    with open_raw(block_device, readonly=True) as disk:
        assert read_disk(disk, 0, 1) == b"x" + bytes(511)
        assert read_disk(disk, disk.size // SECTOR_SIZE - 1, 1) == b"y" * 512


def test_block_device_is_imported(block_device, tmp_path):
    """It knows of no holes, and its zeros take no room all the same."""
    import_disk(block_device, str(tmp_path / "blob"), format="raw")
    with open_disk(tmp_path / "blob", readonly=True) as blob:
        assert blob.size == 1 * MiB
        assert read_disk(blob, 0, 1) == b"x" + bytes(511)
        assert blob.allocated < 64 * KiB

"""qemu-img as the judge of our images, and its images read by us."""

import json
import os
import random
from pathlib import Path

import pytest
from vhd_files import driver_of, needs_qemu, qemu_img, qemu_io, read_disk, write_disk

from kvmpy.storage.convert import check_disk, create, disk_info, export_disk, import_disk
from kvmpy.storage.open import open_disk
from kvmpy.storage.vhd import geometry
from kvmpy.units import GiB, MiB

pytestmark = needs_qemu

FORMATS = ("raw", "vhd-fixed", "vhd-dynamic")
SIZES = (512, 5 * 512, 12345 * 512, 1 * MiB, 1 * MiB + 512, 3 * GiB, 2040 * GiB)
LARGEST = 2040 * GiB


def virtual_size(path: Path, format: str) -> int:
    """Return what qemu takes for the size of the disk."""
    return json.loads(qemu_img("info", "--output=json", "-f", driver_of(format), path))["virtual-size"]


def check_identical(path: Path, format: str, reference: Path) -> None:
    """Assert that qemu finds the same bytes, and the same size, in a disk and in a raw file."""
    assert virtual_size(path, format) == os.path.getsize(reference)
    assert "identical" in qemu_img("compare", "-f", driver_of(format), "-F", "raw", path, reference)


class Twin:
    """A disk of ours that is written in place, and a raw file that has its bytes as they must be."""

    def __init__(self, folder: Path, format: str, size: int) -> None:
        self.path, self.format, self.size = folder / "disk", format, size
        self.reference = folder / "reference"
        with open(self.reference, "wb") as file:
            file.truncate(size)

    def write(self, sector: int, data: bytes) -> None:
        with open_disk(self.path, format=self.format) as disk:
            write_disk(disk, sector, data)
        self.expect(sector, data)

    def write_with_qemu(self, sector: int, sectors: int, byte: int) -> None:
        command = f"write -P {byte} {sector * 512} {sectors * 512}"
        qemu_io(self.path, driver_of(self.format), command, "flush")
        self.expect(sector, bytes([byte]) * sectors * 512)

    def expect(self, sector: int, data: bytes) -> None:
        with open(self.reference, "r+b") as file:
            file.seek(sector * 512)
            file.write(data)

    def check(self) -> None:
        check_identical(self.path, self.format, self.reference)
        assert check_disk(str(self.path), format=self.format) == []


# --- our images, judged by qemu ---


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("size", SIZES)
def test_empty_disk_of_ours_has_its_size_and_zeros(tmp_path, format, size):
    path = tmp_path / "disk"
    create(str(path), size, format=format)
    assert virtual_size(path, format) == size
    extents = json.loads(qemu_img("map", "--output=json", "-f", driver_of(format), path))
    assert sum(extent["length"] for extent in extents) == size
    if size < LARGEST:
        qemu_img("convert", "-f", driver_of(format), "-O", "raw", path, tmp_path / "out")
        assert os.path.getsize(tmp_path / "out") == size
        assert os.stat(tmp_path / "out").st_blocks <= 8  # a block of the host, which qemu allocates always


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("size", [512, 5 * 512, 6 * MiB, 6 * MiB + 512])
def test_full_disk_of_ours_is_identical(tmp_path, format, size):
    twin = Twin(tmp_path, format, size)
    create(str(twin.path), size, format=format)
    twin.write(0, random.Random(size).randbytes(size))
    twin.check()


@pytest.mark.parametrize("format", FORMATS)
def test_disk_of_ours_written_here_and_there_is_identical(tmp_path, format):
    twin = Twin(tmp_path, format, 3 * GiB + 512)
    create(str(twin.path), twin.size, format=format)
    rng = random.Random(3)
    for _ in range(20):
        twin.write(rng.randrange(twin.size // 512 - 300), rng.randbytes(512 * rng.randint(1, 300)))
    twin.write(twin.size // 512 - 1, b"e" * 512)
    twin.check()
    with open_disk(twin.path, format=format, readonly=True) as disk, open(twin.reference, "rb") as file:
        assert read_disk(disk, twin.size // 512 - 2, 2) == os.pread(file.fileno(), 1024, twin.size - 1024)


def test_map_of_a_dynamic_disk_has_the_blocks_that_were_written(tmp_path):
    path = tmp_path / "disk"
    create(str(path), 64 * MiB, format="vhd-dynamic")
    with open_disk(path, format="vhd") as disk:
        write_disk(disk, 10 * MiB // 512, b"x" * 512)
    extents = json.loads(qemu_img("map", "--output=json", "-f", "vpc", path))
    data = [(extent["start"], extent["length"]) for extent in extents if extent["data"]]
    assert data
    assert all(10 * MiB <= start and start + length <= 12 * MiB for start, length in data)
    assert data[0][0] == 10 * MiB


@pytest.mark.parametrize("format", FORMATS)
def test_end_of_the_largest_disk_is_where_qemu_looks_for_it(tmp_path, format):
    path = tmp_path / "disk"
    create(str(path), LARGEST, format=format)
    with open_disk(path, format=format) as disk:
        write_disk(disk, LARGEST // 512 - 8, b"\xab" * 4096)
    assert virtual_size(path, format) == LARGEST
    commands = (f"read -P 0xab {LARGEST - 4096} 4096", f"read -P 0 {LARGEST - 8192} 4096")
    assert "verification failed" not in qemu_io(path, driver_of(format), *commands)


# --- qemu's images, read and written by us ---


@pytest.mark.parametrize("force_size", ["on", "off"])
@pytest.mark.parametrize("subformat", ["fixed", "dynamic"])
@pytest.mark.parametrize("size", [512, 34816, 1 * MiB, 12345 * 512, 3 * GiB, LARGEST])
def test_disk_of_qemus_is_read(tmp_path, subformat, force_size, size):
    path = tmp_path / "disk"
    qemu_img("create", "-f", "vpc", "-o", f"subformat={subformat},force_size={force_size}", path, str(size))
    qemus_size = virtual_size(path, "vhd")
    qemu_io(path, "vpc", "write -P 0x61 0 512", f"write -P 0x7a {qemus_size - 512} 512")
    info = disk_info(str(path), format="vhd")
    assert (info["format"], info["size"]) == (f"vhd-{subformat}", qemus_size)
    if force_size == "off" and size < LARGEST:
        cylinders, heads, sectors = info["geometry"].values()
        assert geometry(qemus_size // 512) == (cylinders, heads, sectors)
    with open_disk(path, format=f"vhd-{subformat}") as disk:
        assert disk.size == qemus_size >= size
        last = qemus_size // 512 - 1
        assert read_disk(disk, last, 1) == b"z" * 512
        if last:
            assert read_disk(disk, 0, min(3, last)) == (b"a" * 512).ljust(512 * min(3, last), b"\0")
    assert check_disk(str(path), format="vhd") == []


@pytest.mark.parametrize("subformat", ["fixed", "dynamic"])
def test_disk_that_qemu_and_we_write_in_turn_is_identical(tmp_path, subformat):
    """Each grows the file where the other has left its footer."""
    twin = Twin(tmp_path, f"vhd-{subformat}", 64 * MiB)
    options = f"subformat={subformat},force_size=on"
    qemu_img("create", "-f", "vpc", "-o", options, twin.path, str(twin.size))
    rng = random.Random(subformat)
    for turn in range(6):
        sector, sectors = rng.randrange(twin.size // 512 - 9000), rng.randint(1, 9000)
        if turn % 2:
            twin.write(sector, rng.randbytes(512 * sectors))
        else:
            twin.write_with_qemu(sector, sectors, 0x30 + turn)
        twin.check()


@pytest.mark.parametrize("subformat", ["fixed", "dynamic"])
def test_disk_of_qemus_is_imported_and_exported_identical(tmp_path, subformat):
    path, blob = tmp_path / "disk", tmp_path / "blob"
    qemu_img("create", "-f", "vpc", "-o", f"subformat={subformat}", path, "20M")
    qemu_io(path, "vpc", "write -P 1 0 1M", "write -P 2 5000k 3000k", "write -P 3 20000k 100k")
    qemu_img("convert", "-f", "vpc", "-O", "raw", path, tmp_path / "reference")
    import_disk(str(path), str(blob), format=f"vhd-{subformat}")
    for format in FORMATS:
        export_disk(str(blob), str(tmp_path / format), format=format)
        check_identical(tmp_path / format, format, tmp_path / "reference")


def test_disk_of_ours_converted_by_qemu_is_read_again(tmp_path):
    """From our dynamic VHD to qemu's, and back to bytes by us."""
    twin = Twin(tmp_path, "vhd-dynamic", 64 * MiB)
    create(str(twin.path), twin.size, format=twin.format)
    twin.write(5000, random.Random(1).randbytes(MiB))
    converted = tmp_path / "converted"
    qemu_img("convert", "-f", "vpc", "-O", "vpc", "-o", "subformat=dynamic,force_size=on", twin.path, converted)
    export_disk(str(converted), str(tmp_path / "out"), format="raw", source_format="vhd-dynamic")
    check_identical(tmp_path / "out", "raw", twin.reference)

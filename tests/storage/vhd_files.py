"""VHD files that tests build byte by byte, disks read and written as an engine does it, and qemu-img, the judge."""

import os
import shutil
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from kvmpy.storage.disk import SECTOR_SIZE, ZEROS, DiskImage, Extent
from kvmpy.storage.vhd import DiskType, DynamicHeader, Footer, Geometry, ParentLocator, bitmap_size

needs_qemu = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img is not installed")

TABLE = 1536
"""Where the table of a built file is."""
CHILD, PARENT = b"child's identity", b"parent's identit"


def footer(size: int, disk_type: DiskType, unique_id: bytes = CHILD) -> Footer:
    data_offset = 2**64 - 1 if disk_type is DiskType.FIXED else 512
    return Footer(disk_type, size, size, data_offset, Geometry(1, 1, 1), unique_id, timestamp=1234)


def fixed(data: bytes, unique_id: bytes = CHILD) -> bytes:
    """Return a fixed VHD with these bytes."""
    return data + footer(len(data), DiskType.FIXED, unique_id).to_bytes()


def dynamic(
    size: int,
    blocks: dict[int, tuple[str, bytes]],
    *,
    block_size: int = 4096,
    unique_id: bytes = CHILD,
    parent: DynamicHeader | None = None,
    paths: Sequence[tuple[bytes, str]] = (),
) -> bytes:
    """Return a dynamic VHD, or a differencing one of ``parent``, with ``blocks``: number to (bits, data).

    ``parent`` has the fields of the dynamic header that name a parent; ``paths`` are its locators' codes and paths.
    """
    entries = -(-size // block_size)
    at = TABLE + -(-entries * 4 // 512) * 512
    locators, names = [], b""
    for code, path in paths:
        text = path.encode("utf-16-le")
        locators.append(ParentLocator(code, 512, len(text), at))
        names += text.ljust(512, b"\0")
        at += 512
    table, content = [0xFFFFFFFF] * entries, b""
    for number, (bits, data) in blocks.items():
        assert len(data) == block_size
        table[number] = (at + len(content)) // 512
        bitmap = int(bits.ljust(8 * bitmap_size(block_size), "0"), 2)
        content += bitmap.to_bytes(bitmap_size(block_size), "big") + data
    header = (parent or DynamicHeader(0, 0, 0))._replace(
        table_offset=TABLE, max_table_entries=entries, block_size=block_size, parent_locators=tuple(locators)
    )
    disk_type = DiskType.DYNAMIC if parent is None else DiskType.DIFFERENCING
    copy = footer(size, disk_type, unique_id).to_bytes()
    packed = struct.pack(f">{entries}I", *table)
    padding = b"\xff" * (-len(packed) % 512)
    return copy + header.to_bytes() + packed + padding + names + content + copy


def write_disk(image: DiskImage, sector: int, data: bytes) -> None:
    """Write to a disk as an engine does: what the table does not cover is mapped, then written in place."""
    sectors = len(data) // SECTOR_SIZE
    for extent in image.map(sector, sectors, write=True):
        first, end = max(sector, extent.sector), min(sector + sectors, extent.end)
        if first < end:
            assert extent.writable
            piece = data[(first - sector) * SECTOR_SIZE : (end - sector) * SECTOR_SIZE]
            os.pwrite(extent.unaligned_fd, piece, extent.offset + (first - extent.sector) * SECTOR_SIZE)


def read_disk(image: DiskImage, sector: int = 0, sectors: int | None = None) -> bytes:
    """Read from a disk as an engine does, all of it when no range is given."""
    sectors = image.size // SECTOR_SIZE - sector if sectors is None else sectors
    data, at = b"", sector
    for extent in image.map(sector, sectors, write=False):
        data += read_extent(extent, max(at, extent.sector), min(sector + sectors, extent.end))
        at = max(at, extent.end)
    assert len(data) == sectors * SECTOR_SIZE
    return data


def read_extent(extent: Extent, first: int, end: int) -> bytes:
    """Read the sectors from ``first`` to ``end``, which are in ``extent``."""
    if end <= first:
        return b""
    size = (end - first) * SECTOR_SIZE
    if extent.fd == ZEROS:
        return bytes(size)
    data = os.pread(extent.unaligned_fd, size, extent.offset + (first - extent.sector) * SECTOR_SIZE)
    assert len(data) == size, "the extent leaves its file"
    return data


def qemu_img(*arguments: str | Path) -> str:
    """Run qemu-img and return what it prints; what it complains of fails the test."""
    return _run("qemu-img", *arguments)


def qemu_io(path: Path, driver: str, *commands: str) -> str:
    """Run qemu-io on an image of that driver, with the host's page cache."""
    return _run("qemu-io", "-f", driver, *(word for command in commands for word in ("-c", command)), path)


def _run(program: str, *arguments: str | Path) -> str:
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{program} {arguments}: {done.stdout}{done.stderr}"
    return done.stdout


def driver_of(format: str) -> str:
    """Return what qemu calls a format of ours."""
    return "raw" if format == "raw" else "vpc"

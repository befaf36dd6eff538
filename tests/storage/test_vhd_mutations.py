"""Ten thousand damaged VHDs: each opens and stays within its file, or is refused with an offset, nothing else.

``KVMPY_CAMPAIGN=1`` runs all of them, otherwise a fiftieth runs; ``KVMPY_SEED`` repeats a run.
"""

import os
import random
import struct
from pathlib import Path

import pytest
from vhd_files import CHILD, PARENT, TABLE, dynamic, fixed

from kvmpy.errors import DiskError
from kvmpy.storage import files
from kvmpy.storage.convert import disk_info
from kvmpy.storage.disk import SECTOR_SIZE, ZEROS, DiskImage
from kvmpy.storage.extents import walk
from kvmpy.storage.open import open_disk
from kvmpy.storage.vhd import DynamicHeader

CAMPAIGN = 10_000
ROUNDS = CAMPAIGN if os.environ.get("KVMPY_CAMPAIGN") == "1" else CAMPAIGN // 50
INTERESTING = (0, 1, 2, 3, 511, 512, 513, 1536, 2**9 - 1, 2**16, 2**31, 2**32 - 1, 2**32, 2**63, 2**64 - 512, 2**64 - 1)
FIELDS = (
    *((0, 8), (8, 4), (12, 4), (16, 8), (40, 8), (48, 8), (56, 4), (60, 4), (64, 4), (68, 16)),  # the footer
    *((512 + at, size) for at, size in ((0, 8), (16, 8), (24, 4), (28, 4), (32, 4), (36, 4), (40, 16), (56, 4))),
    *((512 + 576 + 24 * locator + at, size) for locator in range(2) for at, size in ((0, 4), (8, 4), (16, 8))),
    *((TABLE + 4 * block, 4) for block in range(6)),
)
SIZE = 5 * 4096 + 512
BLOCKS = {0: ("1" * 8, b"a" * 4096), 3: ("10110110", b"d" * 4096), 5: ("1" * 8, b"f" * 4096)}
HEADER = DynamicHeader(0, 0, 0, parent_unique_id=PARENT, parent_timestamp=1234, parent_name="parent")
PATHS = ((b"W2ru", "parent"), (b"W2ku", "C:\\parent"))
LONGEST_WALK = 4096
"""Extents of a mutated disk that are looked at: its size may have become 2040 GiB."""

ORIGINALS = {
    "fixed": fixed(random.Random(1).randbytes(SIZE)),
    "dynamic": dynamic(SIZE, BLOCKS),
    "differencing": dynamic(SIZE, BLOCKS, parent=HEADER, paths=PATHS, unique_id=CHILD),
}


def set_field(rng: random.Random, content: bytearray) -> None:
    """Set a field, or one a little off it, to a value at the edge of something; both footers stay alike mostly."""
    at, size = rng.choice(FIELDS)
    value = (rng.choice(INTERESTING) + rng.choice((0, 0, 0, -1, 1))) % 2 ** (8 * size)
    if rng.random() < 0.3:
        value = rng.randrange(2 ** rng.randint(1, 8 * size))
    data = value.to_bytes(size, "big")
    if at < 512 and rng.random() < 0.9:
        content[len(content) - 512 + at : len(content) - 512 + at + size] = data
    if at >= 512 or rng.random() < 0.9:
        content[at : at + size] = data[: max(0, len(content) - at)]


def flip(rng: random.Random, content: bytearray) -> None:
    """Flip a few bits of the headers, the table and the footer."""
    for _ in range(rng.randint(1, 4)):
        at = rng.choice((rng.randrange(TABLE + 32), len(content) - 1 - rng.randrange(512))) % len(content)
        content[at] ^= 1 << rng.randrange(8)


def resize(rng: random.Random, content: bytearray) -> None:
    """Cut something off, or put something behind."""
    if rng.random() < 0.5:
        del content[rng.randrange(len(content)) // 512 * 512 + rng.choice((0, 0, 0, 1, 511)) :]
    else:
        content += rng.randbytes(rng.choice((1, 512, 4096)))


def splice(rng: random.Random, content: bytearray) -> None:
    """Put a sector of one of the originals somewhere."""
    other = ORIGINALS[rng.choice(list(ORIGINALS))]
    sector = rng.randrange(len(other) // 512) * 512
    at = rng.choice((0, 512, 1024, TABLE, rng.randrange(len(content)) // 512 * 512, len(content) // 512 * 512 - 512))
    content[max(at, 0) : max(at, 0) + 512] = other[sector : sector + 512]


def mend(content: bytearray) -> None:
    """Make the checksums right again, so that what lies behind them is looked at."""
    for start, size, at in ((0, 512, 64), (512, 1024, 36), (len(content) - 512, 512, 64)):
        if start >= 0 and start + size <= len(content):
            struct.pack_into(">I", content, start + at, 0)
            struct.pack_into(">I", content, start + at, ~sum(content[start : start + size]) & 0xFFFFFFFF)


def mutate(rng: random.Random, original: bytes) -> bytes:
    """Return ``original`` damaged in one to three ways, with good checksums mostly."""
    content = bytearray(original)
    for _ in range(rng.choice((1, 1, 2, 3))):
        if content:
            rng.choice((set_field, set_field, set_field, set_field, flip, resize, splice))(rng, content)
    if rng.random() < 0.85:
        mend(content)
    return bytes(content)


def look(disk: DiskImage, where: str) -> None:
    """Walk over the disk: its extents must lie in their files, ascend and leave no gap."""
    sector = 0
    for number, extent in enumerate(walk(disk)):
        assert extent.sector == sector, where
        assert extent.sectors > 0, where
        sector = extent.end
        if extent.fd != ZEROS:
            end = extent.offset + extent.sectors * SECTOR_SIZE
            assert 0 <= extent.offset <= end <= os.fstat(extent.fd).st_size, where
        if number == LONGEST_WALK:
            return
    assert sector * SECTOR_SIZE == disk.size, where


def write(disk: DiskImage, rng: random.Random, path: Path, where: str) -> None:
    """Write somewhere: what stands in front of the table, and the footer's bytes at the end, must be there still."""
    before = path.read_bytes()
    sector = rng.randrange(disk.size // SECTOR_SIZE)
    for extent in disk.map(sector, 1, write=True):
        if extent.sector <= sector < extent.end:
            assert extent.writable, where
            os.pwrite(extent.fd, b"w" * SECTOR_SIZE, extent.offset + (sector - extent.sector) * SECTOR_SIZE)
    after = path.read_bytes()
    assert after[-512:-508] == before[-512:-508], where
    if len(after) != len(before):
        assert after[:512] == before[:512], where
    for extent in disk.map(sector, 1, write=False):
        if extent.sector <= sector < extent.end:
            offset = extent.offset + (sector - extent.sector) * SECTOR_SIZE
            assert os.pread(extent.fd, SECTOR_SIZE, offset) == b"w" * SECTOR_SIZE, where


def try_it(path: Path, rng: random.Random, readonly: bool, where: str) -> DiskError | None:
    """Open and use the file, and return the refusal, or None; any other exception fails the test."""
    format = rng.choice(("vhd", "vhd", "vhd", "vhd", "vhd", "vhd", "vhd-dynamic", "vhd-fixed"))
    size = path.stat().st_size
    try:
        with open_disk(path, format=format, readonly=readonly) as disk:
            look(disk, where)
            if not readonly:
                write(disk, rng, path, where)
        with open_disk(path, format=format, readonly=True) as disk:
            look(disk, where)
        disk_info(str(path), format=format)
    except DiskError as error:
        return error
    except Exception as error:
        raise AssertionError(where) from error
    finally:
        assert path.stat().st_size < size + 2**30, where
    return None


@pytest.mark.timeout(1800)
def test_damaged_vhds_are_used_within_their_file_or_refused_with_an_offset(tmp_path, capsys, monkeypatch):
    """A damaged VHD gives a DiskError that names the offset, or a disk that stays inside its file; nothing else."""
    monkeypatch.setattr(files, "fdatasync", lambda fd: None)  # nobody pulls the plug here
    seed = int(os.environ.get("KVMPY_SEED") or random.SystemRandom().randrange(2**32))
    rng = random.Random(seed)
    (tmp_path / "parent").write_bytes(fixed(bytes(SIZE), PARENT))
    path = tmp_path / "disk.vhd"
    used = dict.fromkeys(ORIGINALS, 0)
    descriptors = len(os.listdir("/proc/self/fd"))
    for round_ in range(ROUNDS):
        name = rng.choice(list(ORIGINALS))
        path.write_bytes(mutate(rng, ORIGINALS[name]))
        where = f"seed {seed}, round {round_}: {name}"
        readonly = rng.random() < (0.9 if name == "differencing" else 0.5)
        refusal = try_it(path, rng, readonly, where)
        if refusal is None:
            used[name] += 1
        else:
            assert refusal.offset is not None, f"{where}: {refusal}"
            assert refusal.path, where
        assert len(os.listdir("/proc/self/fd")) == descriptors, where
    with capsys.disabled():
        print(f"\n{ROUNDS} damaged VHDs, seed {seed}: used {used}, {ROUNDS - sum(used.values())} refused")
    assert all(used.values())
    assert sum(used.values()) < ROUNDS

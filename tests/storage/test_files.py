"""The system calls that change files, and where files and bytes are zeros."""

import errno
import itertools
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpy.errors import DiskError
from kvmpy.storage import files, sparse
from kvmpy.units import KiB, MiB


@pytest.fixture
def fd(tmp_path):
    fd = files.create(str(tmp_path / "file"))
    yield fd
    os.close(fd)


def test_nothing_but_a_regular_file_is_opened_and_nothing_waits(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    for name in ("fifo", "folder", "/dev/zero"):
        with pytest.raises(DiskError, match="not a regular file"):
            files.open_regular(str(tmp_path / name), os.O_RDONLY)
    with pytest.raises(FileNotFoundError):
        files.open_regular(str(tmp_path / "nothing"), os.O_RDONLY)


def test_create_does_not_take_what_is_there(tmp_path):
    (tmp_path / "there").write_bytes(b"mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "elsewhere")
    for name in ("there", "dangling"):
        with pytest.raises(FileExistsError):
            files.create(str(tmp_path / name))
    assert not (tmp_path / "elsewhere").exists()


def test_reopened_file_has_its_own_flags(fd):
    files.pwrite_all(fd, b"abc", 0)
    other = files.reopen(fd, os.O_RDONLY)
    assert files.pread_all(other, 10, 1) == b"bc"
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.pwrite(other, b"x", 0)
    os.close(other)


def test_zero_makes_a_hole(fd):
    files.pwrite_all(fd, b"x" * MiB, 0)
    before = os.fstat(fd).st_blocks
    files.zero(fd, 4 * KiB, 512 * KiB)
    assert files.pread_all(fd, MiB, 0) == b"x" * (4 * KiB) + bytes(512 * KiB) + b"x" * (508 * KiB)
    assert (before - os.fstat(fd).st_blocks) * 512 == 512 * KiB
    files.zero(fd, 0, 0)


def test_zero_writes_where_the_host_makes_no_holes(fd, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EOPNOTSUPP, "")

    files.pwrite_all(fd, b"x" * (3 * MiB), 0)
    monkeypatch.setattr(files, "_fallocate", refuse)
    files.zero(fd, 1, 3 * MiB - 2)
    files.reserve(fd, 0, MiB)
    assert files.pread_all(fd, 4 * MiB, 0) == b"x" + bytes(3 * MiB - 2) + b"x"


def test_zero_writes_nothing_when_the_host_fails(fd, monkeypatch):
    """Only where it has no holes at all are they written."""

    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    files.pwrite_all(fd, b"x" * 4096, 0)
    monkeypatch.setattr(files, "_fallocate", fail)
    with pytest.raises(OSError, match="Input/output error"):
        files.zero(fd, 0, 4096)
    assert files.pread_all(fd, 4096, 0) == b"x" * 4096


def test_errors_of_fallocate_are_told(fd):
    with pytest.raises(OSError, match="Bad file descriptor"):
        files.zero(-1, 0, 512)
    with pytest.raises(OSError, match="Invalid argument"):
        files.reserve(fd, -1, 512)


def test_reserved_room_reads_as_before(fd):
    files.pwrite_all(fd, b"abc", 0)
    files.reserve(fd, 0, MiB)
    assert files.pread_all(fd, MiB, 0) == b"abc"
    assert os.fstat(fd).st_blocks * 512 >= MiB


def test_discard_does_not_complain(tmp_path):
    files.discard(str(tmp_path / "nothing"))
    (tmp_path / "folder").mkdir()
    files.discard(str(tmp_path / "folder"))
    assert (tmp_path / "folder").exists()


@given(st.lists(st.tuples(st.integers(0, 63), st.integers(1, 8)), max_size=8), st.integers(0, 70), st.integers(0, 70))
def test_data_runs_cover_all_that_is_no_zero(tmp_path_factory, writes, start, end):
    """In pieces of 4 KiB; ascending, inside what was asked for, and none without data."""
    path = tmp_path_factory.mktemp("sparse") / "file"
    fd = files.create(str(path))
    try:
        files.truncate(fd, 64 * 4 * KiB)
        for at, size in writes:
            files.pwrite_all(fd, b"x" * (min(size, 64 - at) * 4 * KiB), at * 4 * KiB)
        data = path.read_bytes()
        runs = list(sparse.data_runs(fd, start * 4 * KiB, end * 4 * KiB))
    finally:
        os.close(fd)
    covered = bytearray(len(data))
    for first, last in runs:
        assert start * 4 * KiB <= first < last <= end * 4 * KiB
        assert not any(covered[first:last])
        covered[first:last] = b"\1" * (last - first)
    for at in range(min(start, 64), min(end, 64)):
        assert bool(covered[at * 4 * KiB]) == bool(data[at * 4 * KiB])


@given(st.lists(st.sampled_from([bytes(512), b"x" * 512, bytes(511) + b"\1"])), st.integers(0, 511))
def test_nonzero_runs_are_all_that_is_no_zero(parts, tail):
    data = b"".join(parts) + b"y" * tail
    runs = list(sparse.nonzero_runs(data, 512))
    marked = {at for start, end in runs for at in range(start, end, 512)}
    assert marked == {at for at in range(0, len(data), 512) if any(data[at : at + 512])}
    assert all(a[1] < b[0] for a, b in itertools.pairwise(runs))


@pytest.mark.parametrize("size", [0, 1, MiB, MiB + 1, 3 * MiB])
def test_is_zero_looks_at_every_byte(size):
    data = bytearray(size)
    assert sparse.is_zero(bytes(data))
    for at in {0, size // 2, size - 1} - {-1}:
        if size:
            data[at] = 1
            assert not sparse.is_zero(bytes(data))
            data[at] = 0

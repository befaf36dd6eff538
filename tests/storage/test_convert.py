"""Making disks and carrying their bytes to other formats: sparse, whole or not at all, nothing overwritten."""

import errno
import itertools
import os
import random
import resource

import pytest
from vhd_files import read_disk, write_disk

from kvmpy.errors import DiskError, LeaseError, VhdFormatError
from kvmpy.storage import files
from kvmpy.storage.blob import PageBlob
from kvmpy.storage.convert import FORMATS, check_disk, create, disk_info, export_disk, import_disk
from kvmpy.storage.open import open_disk
from kvmpy.units import GiB, KiB, MiB

SIZE = 5 * MiB + 512


def said(format: str) -> str | None:
    """Return what is said of a disk of this format when it is opened: a blob says so itself."""
    return None if format == "blob" else format


def opened(path, format, **options):
    return open_disk(path, format=said(format), **options)


def patterned() -> bytes:
    """Return bytes with runs of zeros of many lengths."""
    rng = random.Random(1)
    data = bytearray()
    while len(data) < SIZE:
        data += rng.randbytes(512 * rng.choice((1, 3, 8, 100)))
        data += bytes(512 * rng.choice((1, 7, 8, 16, 300, 1000)))
    return bytes(data[:SIZE])


PATTERN = patterned()


@pytest.fixture(params=FORMATS)
def source(request, tmp_path):
    """Give a disk of each format with a pattern: its path and its format."""
    path = str(tmp_path / "source")
    create(path, SIZE, format=request.param)
    with opened(path, request.param) as disk:
        write_disk(disk, 0, PATTERN)
    return path, request.param


# --- create ---


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("size", [512, 12345 * 512, 1 * MiB, 3 * GiB, 2040 * GiB])
def test_new_disk_is_zeros_and_takes_no_room(tmp_path, format, size):
    path = str(tmp_path / "new")
    create(path, size, format=format)
    info = disk_info(path, format=said(format))
    assert info["size"] == size
    assert info["format"] == format
    table = 0 if format != "vhd-dynamic" else size // (2 * MiB) * 4
    assert info["allocated"] <= table + 16 * KiB
    with opened(path, format, readonly=True) as disk:
        for sector in {0, size // 1024, size // 512 - 1}:
            assert read_disk(disk, sector, 1) == bytes(512)
    assert check_disk(path, format=said(format)) == []


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("size", [0, 1, 513, -512])
def test_size_that_is_no_multiple_of_512_is_refused(tmp_path, format, size):
    with pytest.raises(DiskError, match=f"new: {size} bytes: a disk is a multiple of 512"):
        create(str(tmp_path / "new"), size, format=format)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("format", ["vhd-fixed", "vhd-dynamic"])
def test_vhd_of_more_than_2040_gib_is_refused(tmp_path, format):
    with pytest.raises(DiskError, match="a VHD has at most 2040 GiB"):
        create(str(tmp_path / "new"), 2040 * GiB + 512, format=format)
    create(str(tmp_path / "blob"), 2040 * GiB + 512, format="blob")
    with pytest.raises(DiskError, match="a VHD has at most 2040 GiB"):
        export_disk(str(tmp_path / "blob"), str(tmp_path / "new"), format=format)
    assert os.listdir(tmp_path) == ["blob"]


def test_unknown_format_is_the_callers_mistake(tmp_path):
    with pytest.raises(ValueError, match="'qcow2' is no format of a new disk: allowed are blob, raw, vhd-fixed"):
        create(str(tmp_path / "new"), 512, format="qcow2")


# --- convert ---


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_is_exported_to_every_other_with_all_its_bytes(source, tmp_path, format):
    path, source_format = source
    target = str(tmp_path / "target")
    export_disk(path, target, format=format, source_format=said(source_format))
    with opened(target, format, readonly=True) as disk:
        assert read_disk(disk) == PATTERN
    assert check_disk(target, format=said(format)) == []
    info = disk_info(target, format=said(format))
    assert info["format"] == format
    pages = sum(any(PATTERN[at : at + 4096]) for at in range(0, SIZE, 4096))
    assert info["allocated"] <= pages * 4096 + 64 * KiB
    if format == "vhd-dynamic":
        assert info["blocks"] == 3


def test_imported_disk_is_a_blob_with_raw_content(source, tmp_path):
    path, format = source
    import_disk(path, str(tmp_path / "target"), format=said(format))
    with PageBlob.open(tmp_path / "target", readonly=True) as blob:
        assert (blob.size, blob.content_format) == (SIZE, "raw")
        assert read_disk(blob) == PATTERN


def test_snapshot_is_exported_as_it_was(tmp_path):
    with PageBlob.create(tmp_path / "source", SIZE) as blob:
        write_disk(blob, 0, b"old!" * 128)
        snapshot = blob.snapshot()
        write_disk(blob, 0, b"new!" * 128)
    for number, (name, wanted) in enumerate([(snapshot.id, b"old!"), (None, b"new!")]):
        target = str(tmp_path / str(number))
        export_disk(str(tmp_path / "source"), target, format="raw", snapshot=name)
        with open(target, "rb") as file:
            assert file.read(4) == wanted


@pytest.mark.parametrize("source", [format for format in FORMATS if format != "blob"], indirect=True)
def test_source_is_untouched_and_may_have_a_writer(source, tmp_path):
    """A blob is a folder, which its writer changes by being there."""
    path, format = source
    before = os.stat(path)
    with open(path, "rb") as file:
        content = file.read()
    with opened(path, format):
        export_disk(path, str(tmp_path / "target"), format="raw", source_format=format)
    with open(path, "rb") as file:
        assert file.read() == content
    assert os.stat(path).st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize("format", FORMATS)
def test_huge_empty_disk_is_exported_at_once(tmp_path, format):
    """What is a hole, or has no place, is not read: 2040 GiB of zeros cost nothing."""
    create(str(tmp_path / "source"), 2040 * GiB, format="vhd-dynamic")
    with open_disk(tmp_path / "source", format="vhd") as disk:
        write_disk(disk, 2040 * GiB // 512 - 9, b"x" * 512)
    target = str(tmp_path / "target")
    seen: list[tuple[int, int]] = []
    options = {"format": format, "source_format": "vhd", "progress": lambda *at: seen.append(at)}
    export_disk(str(tmp_path / "source"), target, **options)
    assert seen[-1] == (2040 * GiB, 2040 * GiB)
    with opened(target, format, readonly=True) as disk:
        assert read_disk(disk, 2040 * GiB // 512 - 10, 3) == bytes(512) + b"x" * 512 + bytes(512)


# --- progress ---


def test_progress_ascends_to_the_disks_size(source, tmp_path):
    path, format = source
    seen: list[tuple[int, int]] = []
    target = str(tmp_path / "target")
    export_disk(path, target, format="raw", source_format=said(format), progress=lambda *at: seen.append(at))
    assert seen[-1] == (SIZE, SIZE)
    assert all(total == SIZE for _, total in seen)
    assert all(first <= second for (first, _), (second, _) in itertools.pairwise(seen))


# --- nothing overwritten, nothing half-written ---


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("there", ["file", "folder", "dangling link"])
def test_existing_target_is_refused_and_stays(tmp_path, format, there):
    target = tmp_path / "target"
    if there == "file":
        target.write_bytes(b"precious")
    elif there == "folder":
        target.mkdir()
        (target / "precious").write_bytes(b"")
    else:
        target.symlink_to("nowhere")
    source = tmp_path / "source"
    source.write_bytes(PATTERN)
    for make in (
        lambda: create(str(target), SIZE, format=format),
        lambda: export_disk(str(source), str(target), format=format, source_format="raw"),
    ):
        with pytest.raises(DiskError, match="target: exists already"):
            make()
    assert sorted(os.listdir(tmp_path)) == ["source", "target"]
    if there == "file":
        assert target.read_bytes() == b"precious"


@pytest.mark.parametrize("format", FORMATS)
def test_target_that_comes_while_we_write_is_not_overwritten(tmp_path, format):
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(PATTERN)

    def somebody_else(done, total):
        target.write_bytes(b"precious")

    with pytest.raises(DiskError, match="target: exists already"):
        export_disk(str(source), str(target), format=format, source_format="raw", progress=somebody_else)
    assert target.read_bytes() == b"precious"
    assert sorted(os.listdir(tmp_path)) == ["source", "target"]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError, MemoryError])
def test_interrupted_export_leaves_nothing(tmp_path, format, interruption):
    source = tmp_path / "source"
    source.write_bytes(PATTERN)
    descriptors = len(os.listdir("/proc/self/fd"))

    def interrupt(done, total):
        if done > SIZE // 2:
            raise interruption

    with pytest.raises(interruption):
        export_disk(str(source), str(tmp_path / "target"), format=format, source_format="raw", progress=interrupt)
    assert os.listdir(tmp_path) == ["source"]
    assert len(os.listdir("/proc/self/fd")) == descriptors
    export_disk(str(source), str(tmp_path / "target"), format=format, source_format="raw")


@pytest.mark.parametrize("format", FORMATS)
def test_full_disk_in_the_middle_leaves_nothing_and_names_the_target(tmp_path, format, monkeypatch):
    source, target = tmp_path / "source", str(tmp_path / "target")
    source.write_bytes(PATTERN)
    real, left = files.pwrite_all, [20]

    def full(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(files, "pwrite_all", full)
        with pytest.raises(OSError, match="No space left on device") as caught:
            export_disk(str(source), target, format=format, source_format="raw")
    assert caught.value.filename == target
    assert os.listdir(tmp_path) == ["source"]
    assert source.read_bytes() == PATTERN


def test_host_that_refuses_a_longer_file_leaves_nothing(tmp_path):
    """RLIMIT_FSIZE: the kernel itself says no, in the middle of the growing target."""
    source, target = tmp_path / "source", str(tmp_path / "target")
    source.write_bytes(b"x" * SIZE)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 * MiB, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            export_disk(str(source), target, format="vhd-dynamic", source_format="raw")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == ["source"]


@pytest.mark.parametrize("behind", [b"x" * (SIZE - MiB), bytes(SIZE - MiB), None])
def test_source_that_becomes_shorter_is_an_error_and_leaves_nothing(tmp_path, behind):
    """Also where what it has lost was a hole, or comes after one: it is not taken for zeros."""
    source = tmp_path / "source"
    source.write_bytes(b"x" * MiB + (behind or b""))
    os.truncate(source, SIZE)

    def cut(done, total):
        os.truncate(source, 2 * MiB)

    with pytest.raises(DiskError, match="source: truncated: the file has become shorter") as caught:
        export_disk(str(source), str(tmp_path / "target"), format="raw", source_format="raw", progress=cut)
    assert caught.value.offset == 2 * MiB
    assert os.listdir(tmp_path) == ["source"]


def test_damaged_source_leaves_nothing(tmp_path):
    (tmp_path / "source").write_bytes(bytes(4096))
    with pytest.raises(VhdFormatError, match="no VHD footer here"):
        import_disk(str(tmp_path / "source"), str(tmp_path / "target"), format="vhd")
    with pytest.raises(DiskError, match="say what it is"):
        import_disk(str(tmp_path / "source"), str(tmp_path / "target"), format=None)
    (tmp_path / "source").write_bytes(bytes(1000))
    with pytest.raises(DiskError, match="1000 bytes: a raw disk is a multiple of 512"):
        import_disk(str(tmp_path / "source"), str(tmp_path / "target"), format="raw")
    assert os.listdir(tmp_path) == ["source"]


def test_missing_folder_is_told_with_the_target(tmp_path):
    with pytest.raises((OSError, DiskError), match="No such file or directory"):
        create(str(tmp_path / "none" / "new"), 512, format="raw")


def test_target_is_durable_before_it_has_its_name(tmp_path, monkeypatch):
    """A file that is not written out under a name that is would be a half-written disk after a power cut."""
    order: list[str] = []
    for name in ("pwrite_all", "fdatasync", "link", "unlink", "fsync_folder"):
        real = getattr(files, name)
        monkeypatch.setattr(files, name, lambda *a, real=real, name=name, **k: (order.append(name), real(*a, **k))[1])
    create(str(tmp_path / "new"), MiB, format="vhd-fixed")
    assert order == ["pwrite_all", "fdatasync", "link", "unlink", "fsync_folder"]


def test_imported_bytes_are_durable_before_the_blob_has_its_name(tmp_path, monkeypatch):
    (tmp_path / "source").write_bytes(PATTERN)
    order: list[tuple[str, str]] = []

    def record(name):
        real = getattr(files, name)

        def recorded(first, *arguments, **folders):
            where = os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else first
            order.append((name, where.rpartition(".")[2]))
            return real(first, *arguments, **folders)

        monkeypatch.setattr(files, name, recorded)

    for name in ("pwrite_all", "fdatasync", "rename"):
        record(name)
    import_disk(str(tmp_path / "source"), str(tmp_path / "target"), format="raw")
    last_write = max(at for at, step in enumerate(order) if step == ("pwrite_all", "layer"))
    named = [name for name, _ in order].index("rename")
    assert last_write < order.index(("fdatasync", "layer"), last_write) < named


def test_file_system_without_hard_links_is_refused(tmp_path, monkeypatch):
    """There is no other way to give a name that nobody has: a rename replaces what came in between."""

    def link(*arguments, **folders):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(files, "link", link)
    with pytest.raises(DiskError, match="its file system has no hard links"):
        create(str(tmp_path / "new"), MiB, format="raw")
    assert os.listdir(tmp_path) == []


# --- info and check ---


def test_info_is_what_json_has(source):
    import json

    path, format = source
    info = disk_info(path, format=said(format))
    assert json.loads(json.dumps(info)) == info
    assert info["size"] == SIZE
    assert 0 < info["allocated"] <= 2 * SIZE


def test_info_needs_no_lock(source):
    path, format = source
    with opened(path, format):
        assert disk_info(path, format=said(format))["size"] == SIZE
        with pytest.raises(LeaseError):
            opened(path, format)


def test_check_of_what_is_no_disk_is_a_problem(tmp_path):
    assert check_disk(str(tmp_path / "none"), format="raw") == [f"{tmp_path}/none: No such file or directory"]
    (tmp_path / "file").write_bytes(bytes(100))
    assert len(check_disk(str(tmp_path / "file"), format="raw")) == 1
    assert len(check_disk(str(tmp_path / "file"), format="vhd")) == 1
    assert len(check_disk(str(tmp_path / "file"))) == 1
    assert len(check_disk(str(tmp_path))) >= 1

"""The disk that engines see of a page blob: extents, and what is copied before they may write."""

import errno
import itertools
import os

import pytest
from blob_engine import CHUNK, PAGE, Engine, contents, pages

from kvmpy.errors import BlobError
from kvmpy.storage import blob_disk, files
from kvmpy.storage.blob import PageBlob
from kvmpy.storage.blob_check import check
from kvmpy.storage.blob_claim import chunk_pages
from kvmpy.storage.blob_copy import copy
from kvmpy.storage.disk import Extent
from kvmpy.units import GiB, KiB, MiB, TiB


def journal_size(path):
    return sum(os.stat(path / name).st_size for name in os.listdir(path) if name.startswith("journal-"))


def test_new_blob_is_one_writable_extent(blob, path):
    """What was never copied or snapshotted needs no metadata for what a guest writes."""
    (extent,) = blob.table()
    assert (extent.sector, extent.sectors, extent.offset, extent.writable) == (0, 2048, 0, True)
    assert extent.unaligned_fd == extent.fd
    engine = Engine(blob)
    engine.write(512, pages("ab"))
    engine.zero(512, 512)
    assert engine.asked == 0
    assert journal_size(path) == 0
    assert blob.read(0, 2048) == pages("..b.")


def test_write_after_a_snapshot_copies_its_chunk(blob, path):
    """The rest of the 64 KiB comes from the frozen layer, whose own bytes stay."""
    engine = Engine(blob)
    engine.write(0, b"x" * 1 * MiB)
    blob.snapshot()
    engine.refresh()
    engine.write(CHUNK + 512, pages("y"))
    active = blob.map(CHUNK // PAGE, 1, write=False)
    assert [(extent.sector, extent.sectors, extent.writable) for extent in active] == [(128, 128, True)]
    assert blob.read(CHUNK, CHUNK) == b"x" * 512 + pages("y") + b"x" * (CHUNK - 1024)
    assert journal_size(path) == 32
    assert contents(path, snapshot=blob.snapshots[0].id) == b"x" * 1 * MiB


def test_hole_is_claimed_as_far_as_it_goes(path):
    """Nothing has to be copied there, so a guest that fills an empty disk asks once."""
    with PageBlob.create(path, 1 * GiB) as blob:
        blob.write(512 * MiB, pages("a"))
        blob.snapshot()
        engine = Engine(blob)
        for offset in range(0, 512 * MiB, 32 * MiB):
            engine.write(offset, pages("b"))
        assert engine.asked == 1
        assert blob.read(512 * MiB, 512) == pages("a")
        assert journal_size(path) == 32
        assert blob.allocated < 1 * MiB


def test_clip_at_the_end_of_the_blob(path):
    """A chunk may be shorter there, and the size no multiple of anything but 512."""
    with PageBlob.create(path, CHUNK + 3 * PAGE) as blob:
        blob.write(CHUNK, pages("abc"))
        blob.snapshot()
        engine = Engine(blob)
        engine.write(CHUNK + 1024, pages("z"))
        assert engine.read(CHUNK, 1536) == pages("abz")


def test_zero_in_a_frozen_layer_copies_the_rest_of_the_chunk(blob, path):
    blob.write(0, b"x" * (3 * CHUNK))
    blob.snapshot()
    engine = Engine(blob)
    engine.zero(CHUNK - 512, CHUNK + 1024)
    assert blob.read(0, 3 * CHUNK) == b"x" * (CHUNK - 512) + bytes(CHUNK + 1024) + b"x" * (CHUNK - 512)
    assert engine.read(0, 3 * CHUNK) == blob.read(0, 3 * CHUNK)
    assert contents(path, snapshot=blob.snapshots[0].id)[: 3 * CHUNK] == b"x" * (3 * CHUNK)


def test_zero_in_a_hole_changes_nothing(blob, path):
    blob.snapshot()
    size = journal_size(path)
    blob.zero(0, 2048)
    assert journal_size(path) == size


def test_map_has_no_more_runs_than_chunks(path):
    """A guest that discards each second sector of a snapshotted disk does not fill the host's memory."""
    with PageBlob.create(path, 1 * MiB) as blob:
        blob.write(0, b"x" * 1 * MiB)
        blob.snapshot()
        for sector in range(0, 256, 2):
            blob.zero(sector, 1)
        assert len(blob.map(0, 2048, write=False)) == 2
        assert blob.read(0, 256 * 512) == (bytes(512) + b"x" * 512) * 128


@pytest.mark.parametrize(
    ("size", "chunk"), [(512, 64 * KiB), (64 * GiB, 64 * KiB), (65 * GiB, 128 * KiB), (8 * TiB, 8 * MiB)]
)
def test_chunk_grows_with_the_blob(size, chunk):
    """At most 2**20 chunks a blob."""
    assert chunk_pages(size) * PAGE == chunk


def test_snapshot_takes_the_right_to_write_from_old_extents(blob, path):
    """An engine that was not told gets EBADF, and the snapshot stays what it was."""
    (extent,) = blob.table()
    os.pwrite(extent.fd, pages("a"), 0)
    blob.snapshot()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.pwrite(extent.fd, pages("b"), 0)
    with pytest.raises(OSError, match="Bad file descriptor"):
        files.zero(extent.fd, 0, 512)
    assert os.pread(extent.fd, 512, 0) == pages("a")
    assert contents(path, snapshot=blob.snapshots[0].id)[:512] == pages("a")


def test_layers_are_opened_when_somebody_reads_them(path, tmp_path):
    with PageBlob.create(path, 1 * MiB) as blob:
        blob.write(0, pages("a"))
    copy(path, tmp_path / "copy")
    with PageBlob.open(tmp_path / "copy") as blob:
        assert blob.table() == []
        (extent,) = blob.map(0, 1, write=False)
        assert (extent.sectors, extent.writable) == (2048, False)
        assert blob.table() == [extent]
        assert Engine(blob).read(0, 512) == pages("a")


def test_what_is_in_too_many_layers_is_claimed(path, monkeypatch):
    """Descriptors do not run out when a guest reads what a thousand copies wrote."""
    monkeypatch.setattr(blob_disk, "MOST_OPEN_LAYERS", 3)
    with PageBlob.create(path, 1 * MiB) as blob:
        for at in range(8):
            blob.write(at * CHUNK, pages("abcdefgh"[at]))
            blob.snapshot()
    with PageBlob.open(path) as blob:
        engine = Engine(blob)
        for at in range(8):
            assert engine.read(at * CHUNK, 512) == pages("abcdefgh"[at])
        assert len({extent.fd for extent in engine.extents}) <= 4


@pytest.mark.parametrize("direct", [False, True])
def test_direct_opens_each_layer_twice(path, direct):
    """cache=direct: aligned transfers go past the page cache, others through it."""
    with PageBlob.create(path, 1 * MiB) as blob:
        blob.write(0, b"x" * 1 * MiB)
        blob.snapshot()
    with PageBlob.open(path, direct=direct) as blob:
        extents = [*blob.map(0, 1, write=True), *blob.map(2047, 1, write=False)]
        assert [bool(os.get_blocking(extent.fd)) for extent in extents] == [False, False]
        for extent in extents:
            assert (extent.fd != extent.unaligned_fd) is direct
            assert is_direct(extent.fd) is direct
            assert not is_direct(extent.unaligned_fd)
        assert (blob.alignment in (512, 4096)) is direct
        blob.snapshot()
        assert [is_direct(extent.fd) for extent in extents] == [direct, direct]
        assert [extent.writable for extent in blob.table()] == [False, False]


def is_direct(fd: int) -> bool:
    with open(f"/proc/self/fdinfo/{fd}") as info:
        flags = next(line for line in info if line.startswith("flags:"))
    return bool(int(flags.split()[1], 8) & os.O_DIRECT)


def test_range_that_is_not_on_the_disk_is_refused(blob):
    for sector, sectors in ((-1, 2), (2047, 2), (2049, 0), (0, -1)):
        with pytest.raises(ValueError, match="of 2048"):
            blob.map(sector, sectors, write=False)
    assert blob.map(2048, 0, write=True) == []


# --- the host fails ---


def test_layer_that_was_cut_is_an_error_and_no_zeros(path):
    """Hostile case 59: the disk is truncated underneath; what is missing is not taken for a hole."""
    with PageBlob.create(path, 1 * MiB) as blob:
        blob.write(512 * 1024, pages("a"))
        blob.snapshot()
        (frozen,) = blob.table()
        os.truncate(layer_of(path, frozen.fd), 4096)
        for use in (
            lambda: blob.map(1024, 1, write=True),
            lambda: blob.zero(1024, 1),
            lambda: blob.read(512 * 1024, 512),
            blob.page_ranges,
        ):
            with pytest.raises(BlobError, match=r"the layer ends here.*at offset 0x1000"):
                use()


def layer_of(path, fd):
    """Return the path of the layer that is open as ``fd``."""
    return next(entry for entry in path.iterdir() if os.path.samestat(entry.stat(), os.fstat(fd)))


def failing(monkeypatch, name, error, *, call=1):
    """Let that call of ``files.name`` fail, the first, the second ..., and all others work."""
    real, calls = getattr(files, name), itertools.count(1)

    def fails(*args, **options):
        if next(calls) == call:
            raise OSError(error, os.strerror(error))
        return real(*args, **options)

    monkeypatch.setattr(files, name, fails)


def test_full_disk_in_the_middle_of_a_claim_leaves_the_old_bytes(blob, path, monkeypatch):
    """ENOSPC: nothing was claimed, nothing is left of the copy, and the blob goes on."""
    blob.write(0, b"x" * 1 * MiB)
    blob.snapshot()
    failing(monkeypatch, "pwrite_all", errno.ENOSPC)
    with pytest.raises(OSError, match="No space left"):
        blob.map(0, 2048, write=True)
    assert journal_size(path) == 0
    assert blob.read(0, 1 * MiB) == b"x" * 1 * MiB
    Engine(blob).write(0, pages("y"))
    assert blob.read(0, 1024) == pages("yx")


def test_full_disk_in_the_middle_of_a_write_leaves_all_its_bytes(blob, monkeypatch):
    """There is room before anything is written: what was reserved can be."""
    real = files.pwrite_all

    def fails_where_there_is_no_room(fd, data, offset):
        if os.fstat(fd).st_blocks * 512 >= offset + len(data) or len(data) < CHUNK:
            return real(fd, data, offset)
        real(fd, data[:512], offset)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "pwrite_all", fails_where_there_is_no_room)
    blob.write(0, b"x" * CHUNK)
    assert blob.read(0, CHUNK) == b"x" * CHUNK
    failing(monkeypatch, "reserve", errno.ENOSPC)
    etag = blob.etag
    with pytest.raises(OSError, match="No space left"):
        blob.write(CHUNK, b"x" * CHUNK)
    assert (blob.read(CHUNK, CHUNK), blob.etag) == (bytes(CHUNK), etag)


def test_what_a_crash_left_in_the_active_layer_is_not_seen(blob, path):
    """Bytes that a claim copied before it died, and bytes behind the end after a shrink that died."""
    blob.write(0, b"x" * (3 * CHUNK))
    blob.snapshot()
    os.pwrite(blob._disk.meta.active.own_fd, b"s" * 1 * MiB, 0)
    blob.zero(CHUNK // PAGE, CHUNK // PAGE)
    Engine(blob).write(512 * 1024, pages("y"))
    assert blob.read(0, 3 * CHUNK) == b"x" * CHUNK + bytes(CHUNK) + b"x" * CHUNK
    assert blob.read(512 * 1024, 512 * 1024) == pages("y") + bytes(512 * 1024 - 512)
    blob.resize(512)
    os.pwrite(blob._disk.meta.active.own_fd, b"s" * 1 * MiB, 512)
    blob.resize(1 * MiB)
    assert blob.read(512, 1 * MiB - 512) == bytes(1 * MiB - 512)


def test_active_layer_that_a_power_cut_left_short_is_lengthened(path):
    """Nothing relies on its length before a claim does, so nobody made it durable."""
    with PageBlob.create(path, 1 * MiB) as blob:
        blob.snapshot()
        active = layer_of(path, blob._disk.meta.active.own_fd)
    os.truncate(active, 0)
    assert check(path) == []
    blob = PageBlob.open(path)
    blob.map(0, 1, write=True)
    blob.abandon()
    assert check(path) == []
    assert contents(path) == bytes(1 * MiB)


def test_failed_sync_of_the_journal_takes_no_bytes_from_what_it_may_hold(blob, path, monkeypatch):
    """The record may be there all the same; then the copied bytes must be."""
    blob.write(0, b"x" * 1 * MiB)
    blob.snapshot()
    failing(monkeypatch, "fdatasync", errno.EIO, call=2)
    with pytest.raises(OSError, match="Input/output error"):
        blob.map(0, 1, write=True)
    assert journal_size(path) == 32
    blob.abandon()
    assert contents(path) == b"x" * 1 * MiB


def test_full_disk_at_the_journal_leaves_the_old_state(blob, path, monkeypatch):
    blob.write(0, b"x" * 1 * MiB)
    blob.snapshot()
    allocated = blob.allocated
    real = files.pwrite_all

    def fails_after_half(fd, data, offset):
        if os.readlink(f"/proc/self/fd/{fd}").endswith(".layer"):
            return real(fd, data, offset)
        real(fd, data[:40], offset)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "pwrite_all", fails_after_half)
    with pytest.raises(OSError, match="No space left"):
        blob.map(0, 128, write=True)
    assert journal_size(path) == 0
    assert blob.allocated <= allocated
    monkeypatch.undo()
    Engine(blob).write(0, pages("y"))
    blob.abandon()
    assert contents(path)[:1024] == pages("yx")


def nothing_more_is_changed(blob):
    for change in (lambda: blob.write(0, pages("c")), blob.snapshot, lambda: blob.map(0, 1, write=True)):
        with pytest.raises(OSError, match="an earlier write failed"):
            change()
    blob.close()


@pytest.mark.parametrize("call", [1, 2])
def test_after_a_failed_sync_nothing_more_is_changed(blob, path, monkeypatch, call):
    """The kernel has forgotten what it could not write: nobody knows whether journal (1) or pages (2) are there."""
    blob.write(0, pages("a"))
    failing(monkeypatch, "fdatasync", errno.EIO, call=call)
    with pytest.raises(OSError, match="Input/output error"):
        blob.write(0, pages("b"))
    nothing_more_is_changed(blob)
    assert contents(path)[:512] in (pages("a"), pages("b"))


def test_after_a_failed_sync_of_a_new_generation_nothing_more_is_changed(blob, path, monkeypatch):
    failing(monkeypatch, "fsync_folder", errno.EIO, call=2)
    with pytest.raises(OSError, match="Input/output error"):
        blob.resize(512)
    nothing_more_is_changed(blob)
    assert len(contents(path)) in (512, 1 * MiB)


@pytest.mark.parametrize("name", ["create", "pwrite_all", "fdatasync", "fsync_folder", "rename"])
def test_generation_that_cannot_be_made_leaves_the_old_one(blob, path, monkeypatch, name):
    """ENOSPC before the rename, or at it: nothing is left behind, and the blob goes on."""
    blob.write(0, pages("a"))
    before = sorted(os.listdir(path))
    failing(monkeypatch, name, errno.ENOSPC)
    with pytest.raises(OSError, match="No space left"):
        blob.set_sequence_number("increment")
    assert sorted(os.listdir(path)) == before
    assert blob.sequence_number == 0
    blob.set_sequence_number("increment")
    blob.close()
    with PageBlob.open(path, readonly=True) as blob:
        assert (blob.sequence_number, blob.read(0, 512)) == (1, pages("a"))


def test_our_sync_does_not_take_the_error_from_the_engine(blob):
    """The kernel reports a failed write once for each open(2) of the file: ours and the engine's are two."""
    (extent,) = blob.table()
    synced = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(files, "fdatasync", synced.append)
        blob.snapshot()
    assert synced
    assert extent.fd not in synced


def test_extents_are_those_of_the_protocol(blob):
    assert all(type(extent) is Extent for extent in (*blob.table(), *blob.map(0, 1, write=True)))

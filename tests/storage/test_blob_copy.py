"""Thin copies and deletion: nothing that happens to one blob is seen in another."""

import errno
import os
import time

import pytest
from blob_engine import Engine, contents, pages

from kvmpy.errors import BlobError, LeaseError
from kvmpy.storage import blob_aside, files
from kvmpy.storage.blob import PageBlob
from kvmpy.storage.blob_check import check
from kvmpy.storage.blob_copy import copy, delete
from kvmpy.units import GiB, MiB


@pytest.fixture
def source(path):
    """A closed blob of 1 MiB that begins with three pages."""
    with PageBlob.create(path, 1 * MiB) as blob:
        blob.write(0, pages("abc"))
        blob.set_sequence_number("update", 5)
    return path


@pytest.fixture
def target(tmp_path):
    return tmp_path / "copy.blob"


def layers(path):
    return {entry.name for entry in path.iterdir() if entry.name.endswith(".layer")}


def test_copy_has_the_bytes_and_shares_the_pages(source, target):
    copy(source, target)
    assert contents(target) == contents(source)
    assert len(layers(source) & layers(target)) == 1
    assert check(source) == check(target) == []
    with PageBlob.open(target) as blob:
        assert (blob.sequence_number, blob.snapshots, blob.content_format) == (5, (), "raw")


def test_neither_sees_what_is_written_to_the_other(source, target):
    copy(source, target)
    with PageBlob.open(source) as one, PageBlob.open(target) as other:
        Engine(one).write(0, pages("X"))
        other.write(512, pages("Y"))
        one.clear(1024, 512)
    assert contents(source)[:2048] == pages("Xb..")
    assert contents(target)[:2048] == pages("aYc.")


def test_copy_lives_on_without_its_source(source, target):
    copy(source, target)
    delete(source)
    assert not source.exists()
    assert contents(target)[:2048] == pages("abc.")
    assert check(target) == []
    with PageBlob.open(target) as blob:
        blob.write(0, pages("z"))


def test_copy_keeps_the_etag_of_its_source_and_has_its_own(source, target):
    with PageBlob.open(source, readonly=True) as blob:
        etag = blob.etag
    copy(source, target)
    with PageBlob.open(source, readonly=True) as one, PageBlob.open(target, readonly=True) as other:
        assert one.etag == etag != other.etag


def test_second_copy_makes_no_layer(source, target, tmp_path):
    """Nothing was written since the first one."""
    copy(source, target)
    before = layers(source)
    copy(source, tmp_path / "second")
    assert layers(source) == before


def test_copy_of_a_snapshot_needs_no_lease(source, target):
    """Its layers never change, whoever writes the blob."""
    with PageBlob.open(source) as blob:
        snapshot = blob.snapshot()
        blob.write(0, pages("Z"))
        copy(source, target, snapshot=snapshot.id)
        with pytest.raises(LeaseError, match=f"process {os.getpid()} "):
            copy(source, target.with_name("other"))
        with pytest.raises(BlobError, match="has no snapshot"):
            copy(source, target.with_name("other"), snapshot="x")
    assert contents(target)[:1536] == pages("abc")
    assert sorted(os.listdir(source.parent)) == ["copy.blob", "data.blob"]


def test_existing_target_is_refused(source, target):
    target.write_bytes(b"mine")
    with pytest.raises(BlobError, match="exists already"):
        copy(source, target)
    with pytest.raises(BlobError, match="exists already"):
        copy(source, source)
    assert target.read_bytes() == b"mine"


@pytest.mark.parametrize("error", [errno.EXDEV, errno.EMLINK, errno.EPERM])
def test_bytes_are_copied_where_files_cannot_be_shared(source, target, monkeypatch, error):
    """Another file system; 65,000 names; a file of somebody else. What is zeros takes no room."""

    def refuse(*_, **__):
        raise OSError(error, os.strerror(error))

    told = []
    monkeypatch.setattr(files, "link", refuse)
    copy(source, target, progress=lambda done, total: told.append((done, total)))
    assert contents(target) == contents(source)
    assert not layers(source) & layers(target)
    assert told == [(1536, 1 * MiB), (1 * MiB, 1 * MiB)]
    with PageBlob.open(target) as blob:
        assert blob.allocated < 64 * 1024
        assert len(blob.table()) == 1
    assert check(target) == []


def test_layers_that_were_shared_before_one_cannot_be_are_let_go(source, target, monkeypatch):
    with PageBlob.open(source) as blob:
        blob.snapshot()
        blob.write(512 * 1024, pages("d"))
    real, calls = files.link, []

    def link(*args, **options):
        calls.append(args)
        if len(calls) == 2:
            raise OSError(errno.EMLINK, os.strerror(errno.EMLINK))
        real(*args, **options)

    monkeypatch.setattr(files, "link", link)
    copy(source, target)
    assert len(calls) == 2
    assert len(layers(target)) == 1
    assert contents(target) == contents(source)


def test_layer_that_goes_while_a_snapshot_is_copied_is_looked_for_again(source, target, monkeypatch):
    """A writer that deletes another snapshot, or the one that is copied."""
    with PageBlob.open(source) as blob:
        snapshot = blob.snapshot()
        real, calls = files.link, []

        def link(*args, **options):
            calls.append(args)
            if len(calls) == 1:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            real(*args, **options)

        monkeypatch.setattr(files, "link", link)
        copy(source, target, snapshot=snapshot.id)
        assert contents(target)[:1536] == pages("abc")
        monkeypatch.setattr(files, "link", lambda *_, **__: (blob.delete_snapshot(snapshot.id), real("?", "?")))
        with pytest.raises(BlobError, match="has no snapshot"):
            copy(source, target.with_name("other"), snapshot=snapshot.id)


def test_copy_to_another_file_system(source):
    """/dev/shm is one, where there is one: the source is not even frozen."""
    if not os.path.isdir("/dev/shm") or os.stat("/dev/shm").st_dev == os.stat(source).st_dev:
        pytest.skip("no second file system")
    before = sorted(os.listdir(source))
    target = f"/dev/shm/kvmpy-test-{os.getpid()}.blob"
    try:
        copy(source, target)
        assert contents(target) == contents(source)
    finally:
        delete(target)
    assert sorted(os.listdir(source)) == before


def test_progress_that_raises_ends_the_copy(source, target, monkeypatch):
    """Ctrl-C: no target, and nothing beside it."""
    monkeypatch.setattr(files, "link", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.EXDEV, "")))

    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        copy(source, target, progress=interrupt)
    assert os.listdir(source.parent) == [source.name]
    assert contents(source)[:512] == pages("a")


def large_blob(path):
    """Make a blob of 10 GiB with pages here and there."""
    with PageBlob.create(path, 10 * GiB) as blob:
        engine = Engine(blob)
        for at in range(0, 10 * GiB, 100 * MiB):
            engine.write(at, pages("x"))


def seven_syncs(tmp_path):
    """Return how long the disk takes for them now: other tests and programs use it too."""
    with (tmp_path / "probe").open("wb") as probe:
        start = time.perf_counter()
        for _ in range(7):
            os.pwrite(probe.fileno(), b"x" * 512, os.fstat(probe.fileno()).st_size)
            os.fdatasync(probe.fileno())
        return time.perf_counter() - start


def test_copy_of_10_gib_takes_at_most_10_ms(path, tmp_path):
    """Also of a source that was copied and written before; on a busy disk, little more than its syncs."""
    large_blob(path)
    for number in range(20):
        with PageBlob.open(path) as blob:
            blob.write(number * MiB, pages("y"))
        start = time.perf_counter()
        copy(path, tmp_path / f"copy{number}")
        took = time.perf_counter() - start
        if took < max(0.010, 2 * seven_syncs(tmp_path)):
            return
    pytest.fail(f"{took * 1000:.1f} ms")


def test_copy_waits_for_the_disk_seven_times(path, target, monkeypatch):
    """The bytes of the source, twice two syncs of its new generation, three of the copy."""
    large_blob(path)
    syncs = []
    for name in ("fdatasync", "fsync_folder"):
        real = getattr(files, name)
        monkeypatch.setattr(files, name, lambda fd, real=real, name=name: (syncs.append(name), real(fd))[1])
    copy(path, target)
    assert syncs == ["fdatasync"] + ["fdatasync", "fsync_folder", "fsync_folder"] * 2


def test_chain_of_copies_is_flat(path, tmp_path):
    """The last copy knows its layers as the first does: what nobody needs is left behind."""
    previous = path
    with PageBlob.create(path, 1 * MiB) as blob:
        blob.write(0, b"a" * 1 * MiB)
    for number in range(12):
        following = tmp_path / f"copy{number}"
        copy(previous, following)
        with PageBlob.open(following) as blob:
            blob.write(0, pages("b"))
            blob.write(64 * 1024 * (number % 4), pages("c"))
        delete(previous)
        previous = following
    assert len(layers(previous)) <= 6
    assert contents(previous)[512 * 1024 :] == b"a" * (512 * 1024)
    assert check(previous) == []


# --- delete ---


def test_delete_removes_all_of_it(source):
    delete(source)
    assert os.listdir(source.parent) == []


def test_delete_refuses_what_somebody_writes(source):
    with PageBlob.open(source), pytest.raises(LeaseError, match="has it open for writing"):
        delete(source)
    assert contents(source)[:512] == pages("a")


def test_delete_refuses_what_is_no_blob_or_more(source, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(source)
    for name in ("folder", "file", "link", "nothing"):
        with pytest.raises(BlobError):
            delete(tmp_path / name)
    (source / "letter.txt").write_bytes(b"dear")
    with pytest.raises(BlobError, match=r"holds 'letter.txt', which is no part of a page blob"):
        delete(source)
    assert contents(source)[:512] == pages("a")


def test_damaged_blob_can_be_deleted(source):
    (source / "meta").write_bytes(b"?")
    delete(source)
    assert not source.exists()


@pytest.mark.parametrize("use", ["create", "copy", "delete"])
def test_what_a_crash_left_beside_the_path_is_removed(source, target, use):
    """A copy, or a deletion, that a crash ended: the next one at the same path removes it."""
    if use == "delete":
        PageBlob.create(target, 512).close()
    copy(source, source.with_name("third"))
    os.rename(source.with_name("third"), target.with_name("copy.blob.kvmpy-unfinished"))
    match use:
        case "create":
            PageBlob.create(target, 512).close()
        case "copy":
            copy(source, target)
        case "delete":
            delete(target)
    assert sorted(os.listdir(source.parent)) == (["data.blob"] if use == "delete" else ["copy.blob", "data.blob"])


def test_folder_that_was_removed_meanwhile_is_made_again(path, tmp_path, monkeypatch):
    """By whoever finished, or deleted, a blob of the same path at that moment."""
    real, moved = files.create, []

    def create(name, *, folder=None):
        if not moved:
            moved.append(os.rename(tmp_path / "data.blob.kvmpy-unfinished", tmp_path / "elsewhere"))
        return real(name, folder=folder)

    monkeypatch.setattr(files, "create", create)
    PageBlob.create(path, 512).close()
    assert check(path) == []
    assert os.listdir(tmp_path / "elsewhere") == ["lock"]


def test_folder_that_is_in_the_way_is_not_touched(source, target):
    aside = target.with_name("copy.blob.kvmpy-unfinished")
    aside.mkdir()
    (aside / "letter.txt").write_bytes(b"dear")
    with pytest.raises(BlobError, match=r"holds 'letter.txt'"):
        copy(source, target)
    assert os.listdir(aside) == ["letter.txt"]


def test_two_who_make_one_blob_do_not_disturb_each_other(path):
    from kvmpy.storage.blob_aside import Aside

    with Aside(os.fspath(path)), pytest.raises(LeaseError, match=f"process {os.getpid()} "):
        PageBlob.create(path, 512)
    PageBlob.create(path, 512).close()
    assert os.listdir(path.parent) == [path.name]


def test_blob_with_the_name_of_an_aside_cannot_be_made(source, tmp_path):
    """It would be taken for what a crash has left, and removed with the next use of the name before the suffix."""
    name = tmp_path / f"other{blob_aside.SUFFIX}"
    for make in (lambda: PageBlob.create(name, 512), lambda: copy(source, name)):
        with pytest.raises(BlobError, match="are for what is being made"):
            make()
    assert not name.exists()


def test_blob_cannot_be_made_inside_a_blob(source):
    """The outer one could not be deleted any more."""
    with pytest.raises(BlobError, match="would lie inside a page blob"):
        copy(source, source / "inner")
    delete(source)

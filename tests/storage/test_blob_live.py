"""A page blob while it is in use: readers and copiers beside a writer, long journals, many layers."""

import os
import subprocess
import sys
from contextlib import contextmanager

import pytest
from blob_engine import CHUNK, PAGE, Engine, contents, pages

from kvmpy.errors import BlobError
from kvmpy.storage import blob_disk, blob_journal
from kvmpy.storage.blob import PageBlob
from kvmpy.storage.blob_check import check
from kvmpy.storage.blob_copy import copy
from kvmpy.units import KiB, MiB

BUSY = """
import sys
from kvmpy.storage.blob import PageBlob
with PageBlob.open(sys.argv[1]) as blob:
    kept = blob.snapshots[0].id
    print("open", flush=True)
    for round in range(10**9):
        blob.write(65536 * (round % 8), bytes([1 + round % 255]) * 512)
        blob.snapshot()
        if round % 3 == 0:
            for snapshot in blob.snapshots[1:]:
                blob.delete_snapshot(snapshot.id)
"""


@pytest.fixture
def kept(in_memory):
    """A blob whose first snapshot is all ``a``."""
    path = in_memory / "data.blob"
    with PageBlob.create(path, 1 * MiB) as blob:
        blob.write(0, b"a" * 1 * MiB)
        blob.snapshot()
    return path


@contextmanager
def writer_of(path):
    """Have a process write the blob, make snapshots and delete them, until it is killed."""
    with subprocess.Popen([sys.executable, "-c", BUSY, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        yield
        assert process.poll() is None
        process.kill()


@pytest.fixture
def busy(kept):
    """The blob while another process writes it."""
    with writer_of(kept):
        yield kept


def test_readers_see_one_moment_of_a_blob_that_changes(busy):
    """Metadata, journal and layers of one generation: never a part of one and a part of another."""
    etags = set()
    for _ in range(100):
        assert check(busy) == []
        with PageBlob.open(busy, readonly=True) as blob:
            etags.add(blob.etag)
            assert blob.snapshots[0].size == 1 * MiB
    assert len(etags) > 1


def test_snapshot_is_copied_while_another_process_writes(busy):
    """Without the lease: frozen layers never change, and those of a snapshot do not go."""
    with PageBlob.open(busy, readonly=True) as blob:
        snapshot = blob.snapshots[0].id
    for number in range(30):
        target = busy.with_name(f"copy{number}")
        copy(busy, target, snapshot=snapshot)
        assert contents(target) == b"a" * 1 * MiB
        assert check(target) == []


def test_killed_writer_leaves_a_sound_blob(kept):
    """kill -9 at whatever moment: the next one goes on where it was."""
    for number in range(5):
        with writer_of(kept):
            while etag_of(kept) == (before := etag_of(kept)):
                assert before
        assert check(kept) == []
        with PageBlob.open(kept) as blob:
            blob.write(0, pages(str(number)))
            assert contents(kept, snapshot=blob.snapshots[0].id) == b"a" * 1 * MiB


def etag_of(path):
    with PageBlob.open(path, readonly=True) as blob:
        return blob.etag


def test_full_journal_begins_a_new_generation(path, monkeypatch):
    """What it said is in the new metadata."""
    monkeypatch.setattr(blob_journal, "MAX_JOURNAL", 4 * blob_journal.RECORD_SIZE)
    with PageBlob.create(path, 1 * MiB) as blob:
        for at in range(10):
            blob.write(at * PAGE, pages("abcdefghij"[at]))
        blob.snapshot()
        engine = Engine(blob)
        for at in range(0, 1 * MiB, CHUNK):
            engine.write(at, pages("x"))
        journals = [name for name in os.listdir(path) if name.startswith("journal-")]
        assert journals == ["journal-4"]
        blob.abandon()
        assert contents(path)[: 10 * PAGE] == pages("xbcdefghij")
        assert contents(path)[CHUNK : CHUNK + PAGE] == pages("x")
        assert check(path) == []


def test_more_claims_than_a_journal_has_room_for(path, monkeypatch):
    """One request over many small gaps."""
    monkeypatch.setattr(blob_journal, "MAX_JOURNAL", 4 * blob_journal.RECORD_SIZE)
    with PageBlob.create(path, 2 * MiB) as blob:
        blob.write(0, b"o" * 2 * MiB)
        blob.snapshot()
        for at in range(0, 2 * MiB, 2 * CHUNK):
            blob.map(at // PAGE, 1, write=True)
        blob.map(0, 4096, write=True)
        assert [extent.sectors for extent in blob.table()] == [4096]
        blob.abandon()
    assert contents(path) == b"o" * 2 * MiB


def test_blob_with_many_layers_opens_few_of_them(in_memory, monkeypatch):
    """Descriptors are for what engines read, not for what there is, and have a bound."""
    monkeypatch.setattr(blob_disk, "MOST_OPEN_LAYERS", 16)
    path = in_memory / "data.blob"
    with PageBlob.create(path, 8 * MiB) as blob:
        for at in range(60):
            blob.write(at * CHUNK, pages("x"))
            blob.snapshot()
    before = len(os.listdir("/proc/self/fd"))
    with PageBlob.open(path) as blob:
        assert len(os.listdir("/proc/self/fd")) - before <= 8
        assert blob.read(0, 64 * KiB)[:512] == pages("x")
        assert len(blob.page_ranges()) == 60
        assert len(os.listdir("/proc/self/fd")) - before <= 8
        assert Engine(blob).read(0, 8 * MiB).count(b"x") == 60 * PAGE
        assert len(os.listdir("/proc/self/fd")) - before <= 8 + 16
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("use", ["create", "open", "readonly", "copy", "refused"])
def test_no_descriptor_is_left_open(path, tmp_path, use):
    PageBlob.create(path, 1 * MiB).close()
    before = os.listdir("/proc/self/fd")
    for number in range(3):
        match use:
            case "create":
                PageBlob.create(tmp_path / f"new{number}", 512).close()
            case "open":
                with PageBlob.open(path) as blob:
                    blob.write(0, pages("a"))
                    blob.snapshot()
                    blob.map(0, 2048, write=True)
                    blob.delete_snapshot(blob.snapshots[0].id)
                    blob.map(0, 2048, write=False)
            case "readonly":
                with PageBlob.open(path, readonly=True) as blob:
                    blob.map(0, 2048, write=False)
            case "copy":
                copy(path, tmp_path / f"copy{number}")
            case "refused":
                with pytest.raises(BlobError):
                    PageBlob.open(tmp_path)
                with pytest.raises(BlobError):
                    PageBlob.create(path, 512)
    assert os.listdir("/proc/self/fd") == before

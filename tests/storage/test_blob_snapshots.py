"""Snapshots: what was, and what has changed since."""

import os
import time

import pytest
from blob_engine import CHUNK, Engine, contents, pages

from kvmpy.errors import BlobError
from kvmpy.storage import files
from kvmpy.storage.blob import PageBlob, PageRange
from kvmpy.storage.blob_check import check
from kvmpy.units import MiB


def layers(path):
    return sorted(name for name in os.listdir(path) if name.endswith(".layer"))


def test_snapshot_keeps_what_the_blob_was(blob, path):
    """Snapshot Blob: a read-only version of a blob as it was at a point in time."""
    blob.write(0, pages("ab"))
    first = blob.snapshot()
    blob.write(512, pages("c"))
    blob.resize(2 * MiB)
    second = blob.snapshot()
    blob.clear(0, 512)
    assert contents(path, snapshot=first.id) == pages("ab") + bytes(1 * MiB - 1024)
    assert contents(path, snapshot=second.id) == pages("ac") + bytes(2 * MiB - 1024)
    assert blob.read(0, 1024) == pages(".c")
    assert [(s.id, s.size) for s in blob.snapshots] == [(first.id, 1 * MiB), (second.id, 2 * MiB)]


def test_snapshot_has_what_a_guest_wrote_and_did_not_flush(blob, path):
    Engine(blob).write(0, pages("a"))
    snapshot = blob.snapshot()
    assert contents(path, snapshot=snapshot.id)[:512] == pages("a")


def test_snapshot_is_read_only(blob, path):
    snapshot = blob.snapshot()
    with PageBlob.open(path, snapshot=snapshot.id) as old:
        assert old.readonly
        assert (old.etag, old.last_modified, old.snapshots) == (snapshot.etag, snapshot.id, ())
        with pytest.raises(BlobError, match="is open read-only"):
            old.write(0, pages("x"))


def test_ids_are_times_and_ascend(blob, monkeypatch):
    """Also when the clock stands still, or goes back."""
    blob.snapshot()
    monkeypatch.setattr(time, "time_ns", lambda: 1_000_000_000_000_000_000)
    for _ in range(3):
        blob.snapshot()
    ids = [snapshot.id for snapshot in blob.snapshots]
    assert ids == sorted(set(ids))
    assert all(len(id_) == 28 and id_.endswith("Z") for id_ in ids)


def test_snapshot_of_nothing_new_makes_no_layer(blob, path):
    blob.snapshot()
    before = layers(path)
    blob.snapshot()
    blob.snapshot()
    assert layers(path) == before


def test_deleted_snapshot_gives_its_room_back(blob, path):
    blob.write(0, b"x" * 1 * MiB)
    first = blob.snapshot()
    blob.write(0, b"y" * 1 * MiB)
    second = blob.snapshot()
    assert len(layers(path)) == 3
    blob.delete_snapshot(first.id)
    assert len(layers(path)) == 2
    assert contents(path, snapshot=second.id) == b"y" * 1 * MiB
    blob.delete_snapshot(second.id)
    assert len(layers(path)) == 2
    assert blob.read(0, 1 * MiB) == b"y" * 1 * MiB
    with pytest.raises(BlobError, match="has no snapshot"):
        blob.delete_snapshot(first.id)
    assert check(path) == []


def test_unknown_snapshot_is_refused(blob, path):
    for use in (
        lambda: PageBlob.open(path, snapshot="2026-01-01T00:00:00.0000000Z"),
        lambda: blob.page_ranges_since("yesterday"),
    ):
        with pytest.raises(BlobError, match="has no snapshot"):
            use()


def test_ranges_since_a_snapshot_are_pages_whose_bytes_differ(blob):
    """Get Page Ranges with prevsnapshot; a page written with what it had is no change."""
    blob.write(0, pages("abcdef"))
    snapshot = blob.snapshot()
    assert blob.page_ranges_since(snapshot.id) == []
    blob.write(512, pages("bX"))
    blob.clear(2048, 1024)
    Engine(blob).write(1 * MiB - 512, pages("z"))
    assert blob.page_ranges_since(snapshot.id) == [
        PageRange(1024, 512),
        PageRange(2048, 1024, cleared=True),
        PageRange(1 * MiB - 512, 512),
    ]


def test_what_is_in_one_layer_is_not_read_to_be_compared(blob, monkeypatch):
    """A day's changes of a large disk are found in the time that they take, not the disk."""
    blob.write(0, b"x" * 1 * MiB)
    snapshot = blob.snapshot()
    blob.write(256 * 1024, pages("y"))
    read = []
    real = files.pread_all
    monkeypatch.setattr(files, "pread_all", lambda fd, size, offset: (read.append(size), real(fd, size, offset))[1])
    assert blob.page_ranges_since(snapshot.id) == [PageRange(256 * 1024, 512)]
    assert sum(read) == 2 * CHUNK


def test_ranges_since_a_snapshot_of_another_size(blob):
    """Behind the snapshot's end there were zeros; what is gone is not there to be told of."""
    blob.write(1 * MiB - 512, pages("a"))
    snapshot = blob.snapshot()
    blob.resize(2 * MiB)
    blob.write(2 * MiB - 512, pages("b"))
    assert blob.page_ranges_since(snapshot.id) == [PageRange(2 * MiB - 512, 512)]
    blob.resize(1 * MiB - 512)
    assert blob.page_ranges_since(snapshot.id) == []
    blob.resize(1 * MiB)
    assert blob.page_ranges_since(snapshot.id) == [PageRange(1 * MiB - 512, 512, cleared=True)]


def test_snapshots_survive_closing(path):
    with PageBlob.create(path, 1 * MiB) as blob:
        blob.write(0, pages("a"))
        snapshot = blob.snapshot()
        blob.write(0, pages("b"))
    with PageBlob.open(path) as blob:
        assert blob.snapshots == (snapshot,)
        assert blob.page_ranges_since(snapshot.id) == [PageRange(0, 512)]

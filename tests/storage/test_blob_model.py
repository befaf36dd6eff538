"""Page blobs against a model of plain bytes: any operations in any order, and what they leave.

Each step is durable or not, as it was promised to be; a process may die between any two (`crash`: all descriptors
are gone, nothing was closed). At the end every copy and snapshot that was made is still what it was.
"""

import os
import shutil
import tempfile
from pathlib import Path

from blob_engine import CHUNK, PAGE, Engine, contents
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvmpy.storage.blob import PageBlob, PageRange
from kvmpy.storage.blob_check import check
from kvmpy.storage.blob_copy import copy

CAMPAIGN = os.environ.get("KVMPY_CAMPAIGN") == "1"
MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None
"""Where syncs cost nothing."""
LARGEST = 5 * CHUNK // PAGE

places = st.integers(0, LARGEST - 1)
sizes = st.sampled_from([1, 2, 7, 127, 128, 129, 300])
fills = st.sampled_from([b"\0", b"a", b"b", b"c"])


def ranges_of(data: bytes, old: bytes | None = None) -> list[PageRange]:
    """Return what `page_ranges` has to say of these bytes, or what has changed since ``old``."""
    found: list[PageRange] = []
    old = None if old is None else old.ljust(len(data), b"\0")
    for at in range(0, len(data), PAGE):
        page = data[at : at + PAGE]
        if (page == bytes(PAGE)) if old is None else (page == old[at : at + PAGE]):
            continue
        cleared = old is not None and page == bytes(PAGE)
        last = found[-1] if found else PageRange(-1, 0)
        if last.offset + last.size == at and last.cleared == cleared:
            found[-1] = last._replace(size=last.size + PAGE)
        else:
            found.append(PageRange(at, PAGE, cleared))
    return found


class BlobMachine(RuleBasedStateMachine):
    """One blob that is open for writing, with an engine at work on it, and copies of it."""

    @initialize(pages=st.sampled_from([1, 127, 128, 2 * CHUNK // PAGE + 3, LARGEST]))
    def create(self, pages):
        self.folder = Path(tempfile.mkdtemp(dir=MEMORY, prefix="kvmpy-test-"))
        self.path = self.folder / "data.blob"
        self.blob = PageBlob.create(self.path, pages * PAGE)
        self.data = bytes(pages * PAGE)
        self.snapshots: dict[str, bytes] = {}
        self.copies: dict[Path, bytes] = {}
        self.engine = Engine(self.blob)

    def teardown(self):
        if not hasattr(self, "folder"):
            return
        self.blob.close()
        assert contents(self.path) == self.data
        for path, data in self.copies.items():
            assert contents(path) == data
            assert check(path) == []
        shutil.rmtree(self.folder)

    def clipped(self, place, pages):
        start = min(place * PAGE, len(self.data) - PAGE)
        return start, min(pages * PAGE, len(self.data) - start)

    def becomes(self, start, new):
        self.data = self.data[:start] + new + self.data[start + len(new) :]

    @rule(place=places, pages=sizes, fill=fills)
    def guest_writes(self, place, pages, fill):
        start, size = self.clipped(place, pages)
        self.engine.write(start, fill * size)
        self.becomes(start, fill * size)

    @rule(place=places, pages=sizes)
    def guest_discards(self, place, pages):
        start, size = self.clipped(place, pages)
        self.engine.zero(start, size)
        self.becomes(start, bytes(size))

    @rule(place=places, pages=sizes, fill=fills)
    def api_writes(self, place, pages, fill):
        start, size = self.clipped(place, pages)
        etag = self.blob.etag
        self.blob.write(start, fill * size, if_match=etag)
        assert self.blob.etag != etag
        self.becomes(start, fill * size)
        self.engine.refresh()

    @rule(place=places, pages=sizes)
    def api_clears(self, place, pages):
        start, size = self.clipped(place, pages)
        self.blob.clear(start, size)
        self.becomes(start, bytes(size))
        self.engine.refresh()

    @rule(pages=st.sampled_from([1, 5, 128, 130, 256, LARGEST]))
    def resize(self, pages):
        self.blob.resize(pages * PAGE)
        self.data = self.data[: pages * PAGE].ljust(pages * PAGE, b"\0")
        self.engine.refresh()

    @rule()
    def snapshot(self):
        self.snapshots[self.blob.snapshot().id] = self.data
        self.engine.refresh()

    @precondition(lambda self: self.snapshots)
    @rule(which=st.integers(0, 9))
    def delete_snapshot(self, which):
        id_ = list(self.snapshots)[which % len(self.snapshots)]
        self.blob.delete_snapshot(id_)
        del self.snapshots[id_]

    @precondition(lambda self: self.snapshots)
    @rule(which=st.integers(0, 9))
    def compare_with_snapshot(self, which):
        id_, data = list(self.snapshots.items())[which % len(self.snapshots)]
        assert contents(self.path, snapshot=id_) == data
        assert self.blob.page_ranges_since(id_) == ranges_of(self.data, data)

    @precondition(lambda self: self.snapshots)
    @rule(which=st.integers(0, 9))
    def copy_snapshot(self, which):
        id_, data = list(self.snapshots.items())[which % len(self.snapshots)]
        self.copy_to(data, snapshot=id_)

    @rule(goes_on_with_the_copy=st.booleans())
    def copy(self, goes_on_with_the_copy):
        self.blob.close()
        target = self.copy_to(self.data)
        if goes_on_with_the_copy:
            self.copies[self.path] = self.copies.pop(target)
            self.path, self.snapshots = target, {}
        self.open()

    def copy_to(self, data, **options):
        target = self.folder / f"copy{len(self.copies)}-{os.urandom(4).hex()}"
        copy(self.path, target, **options)
        self.copies[target] = data
        return target

    @rule()
    def reopen(self):
        etag = self.blob.etag
        self.blob.close()
        self.open()
        assert self.blob.etag != etag

    @rule()
    def crash(self):
        self.blob.abandon()
        assert check(self.path) == []
        self.open()

    def open(self):
        self.blob = PageBlob.open(self.path)
        self.engine = Engine(self.blob)

    @rule()
    def ranges(self):
        assert self.blob.page_ranges() == ranges_of(self.data)

    @invariant()
    def bytes_are_those_of_the_model(self):
        if hasattr(self, "blob"):
            assert self.blob.size == len(self.data)
            assert self.blob.read(0, len(self.data)) == self.data
            assert self.engine.read(0, len(self.data)) == self.data
            assert [snapshot.id for snapshot in self.blob.snapshots] == list(self.snapshots)


TestBlobModel = BlobMachine.TestCase
TestBlobModel.settings = settings(
    max_examples=2000 if CAMPAIGN else 15, stateful_step_count=40 if CAMPAIGN else 25, deadline=None
)

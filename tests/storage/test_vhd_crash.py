"""A crash, or a power cut, at any moment of a dynamic VHD's growth leaves a whole VHD with the old disk or the new.

What the image does to its file is recorded: writes and syncs. Up to a sync everything before it is on the disk; of
what follows, any part may be. Each such state is written out and opened.
"""

import itertools
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
from vhd_files import dynamic, read_disk

from kvmpy.storage import files
from kvmpy.storage.convert import check_disk
from kvmpy.storage.open import open_disk

SYNC = None
BLOCK = 4096
OTHERS = b"o" * BLOCK
"""A block that was there before, and must always be."""


class Write(NamedTuple):
    offset: int
    data: bytes

    def apply(self, content: bytearray) -> None:
        """Do to ``content`` what the write does to a file."""
        content.extend(bytes(max(0, self.offset - len(content))))
        content[self.offset : self.offset + len(self.data)] = self.data


Recording = list[Write | None]


@pytest.fixture(autouse=True)
def no_real_syncs(monkeypatch):
    """Syncs are recorded, and what they mean is in `states`: to wait for the host's disk proves nothing more."""
    monkeypatch.setattr(files, "fdatasync", lambda fd: None)


@pytest.fixture
def record(monkeypatch) -> Callable[[Callable[[], object]], Recording]:
    """Return a function that records what a call does to its files; the calls are done, too."""

    def record(call: Callable[[], object]) -> Recording:
        recording: Recording = []
        real = {name: getattr(files, name) for name in ("pwrite_all", "zero", "fdatasync")}

        def pwrite_all(fd, data, offset):
            recording.append(Write(offset, bytes(data)))
            real["pwrite_all"](fd, data, offset)

        def zero(fd, offset, size):
            recording.append(Write(offset, bytes(size)))
            real["zero"](fd, offset, size)

        def fdatasync(fd):
            recording.append(SYNC)
            real["fdatasync"](fd)

        with monkeypatch.context() as patch:
            for function in (pwrite_all, zero, fdatasync):
                patch.setattr(files, function.__name__, function)
            call()
        return recording

    return record


def states(before: bytes, recording: Recording) -> Iterator[tuple[bytes, bool]]:
    """Yield each content that the file may have after a crash, and whether the call may have returned by then."""
    synced = bytearray(before)
    groups = [list(group) for is_sync, group in itertools.groupby(recording, lambda op: op is SYNC) if not is_sync]
    last_is_synced = recording[-1] is SYNC
    for group in groups:
        for kept in itertools.product((False, True), repeat=len(group)):
            content = bytearray(synced)
            for write in itertools.compress(group, kept):
                write.apply(content)
            yield bytes(content), group is groups[-1] and not last_is_synced
        for write in group:
            write.apply(synced)
    yield bytes(synced), True


def check_content(path: str, content: bytes, wanted: bytes, whole: range) -> None:
    """Assert that it is a clean VHD that reads as ``wanted``, and that ``whole`` blocks need nothing to be written."""
    with open(path, "wb") as file:
        file.write(content)
    assert check_disk(path, format="vhd") == []
    with open_disk(path, format="vhd", readonly=True) as disk:
        assert read_disk(disk) == wanted
        for block in whole:
            extents = disk.map(block * 8, 8, write=False)
            assert [(extent.sector, extent.sectors) for extent in extents] == [(block * 8, 8)]
            assert extents[0].fd >= 0, f"block {block} has no place"
    with open_disk(path, format="vhd") as disk:  # the next writer goes on from there
        disk.map(0, len(wanted) // 512, write=True)
        assert read_disk(disk) == wanted
    assert check_disk(path, format="vhd") == []


def check_states(path: str, before: bytes, recording: Recording, wanted: bytes, whole: range) -> int:
    """Check each content that a crash may leave, and return how many there were.

    Where the call may have returned, the blocks of ``whole`` must have a place, and bitmaps without a 0.
    """
    found = list(states(before, recording))
    for content, returned in found:
        check_content(path, content, wanted, whole if returned else range(0))
    return len(found)


@pytest.fixture(params=["allocate one", "allocate many", "allocate beside others", "complete"])
def growth(request, tmp_path, record):
    """Give what `check_states` takes: a file's content, what was recorded, what the disk holds, and which blocks."""
    path = tmp_path / "disk.vhd"
    blocks, sectors, whole = {
        "allocate one": ({}, (9, 1), range(1, 2)),
        "allocate many": ({}, (0, 16), range(2)),
        "allocate beside others": ({1: ("1" * 8, OTHERS)}, (7, 10), range(3)),
        "complete": ({0: ("01101111", OTHERS), 1: ("1" * 8, OTHERS)}, (0, 1), range(1)),
    }[request.param]
    before = dynamic(4 * BLOCK, blocks)
    path.write_bytes(before)
    with open_disk(path, format="vhd") as disk:
        wanted = read_disk(disk)
        recording = record(lambda: disk.map(*sectors, write=True))
        assert read_disk(disk) == wanted
    return str(tmp_path / "crashed.vhd"), before, recording, wanted, whole


def test_every_state_that_a_crash_leaves_is_the_old_disk_or_the_new(growth):
    assert check_states(*growth) >= 4


def test_every_prefix_of_the_writes_is_the_old_disk_or_the_new(growth):
    """The host stays, the process dies: what was written is there, and nothing after it."""
    path, before, recording, wanted, whole = growth
    content = bytearray(before)
    for write in filter(None, recording):
        check_content(path, bytes(content), wanted, range(0))
        write.apply(content)
    check_content(path, bytes(content), wanted, whole)


def test_any_sync_that_is_left_out_is_noticed(growth):
    path, before, recording, wanted, whole = growth
    syncs = [number for number, op in enumerate(recording) if op is SYNC]
    assert len(syncs) == 2
    for number in syncs:
        with pytest.raises(AssertionError):
            check_states(path, before, recording[:number] + recording[number + 1 :], wanted, whole)


def test_any_write_that_comes_a_sync_early_or_late_is_noticed(growth):
    """Each write has its side of the first sync: on the other one, some crash shows it."""
    path, before, recording, wanted, whole = growth
    middle = recording.index(SYNC)
    first, second = recording[:middle], recording[middle + 1 : -1]
    for write in first:
        late = [op for op in first if op is not write] + [SYNC, write, *second, SYNC]
        with pytest.raises(AssertionError):
            check_states(path, before, late, wanted, whole)
    entries_or_bits = [write for write in second if len(write.data) == 4] or second
    for write in entries_or_bits:
        early = [*first, write, SYNC, *(op for op in second if op is not write), SYNC]
        with pytest.raises(AssertionError):
            check_states(path, before, early, wanted, whole)


@pytest.mark.parametrize("tail", [b"", bytes(700), b"\xa5" * 512])
def test_footer_that_is_put_back_is_there_or_still_missing(tmp_path, record, tail):
    """Opening a dynamic VHD without its footer for writing: also this may be interrupted."""
    path = tmp_path / "disk.vhd"
    blocks = {1: ("1" * 8, OTHERS)}
    before = dynamic(4 * BLOCK, blocks)[:-512] + tail.ljust(-(-len(tail) // 512) * 512, b"\0")
    path.write_bytes(before)
    recording = record(lambda: open_disk(path, format="vhd-dynamic").close())
    assert recording.count(SYNC) == 2  # and that of closing
    for content, _ in states(before, recording):
        path.write_bytes(content)
        with open_disk(path, format="vhd-dynamic") as disk:
            assert read_disk(disk, 8, 8) == OTHERS
        assert check_disk(str(path), format="vhd") == []


def test_size_that_is_on_the_disk_before_the_footer_is_repaired(tmp_path, record):
    """Some file systems write a file's new size before its bytes: the copy of the footer counts then."""
    path = tmp_path / "disk.vhd"
    path.write_bytes(dynamic(4 * BLOCK, {1: ("1" * 8, OTHERS)}))
    with open_disk(path, format="vhd") as disk:
        before = path.read_bytes()
        recording = record(lambda: disk.map(0, 1, write=True))
    assert recording[0] is not SYNC
    path.write_bytes(before.ljust(recording[0].offset + 512, b"\0"))
    with open_disk(path, format="vhd-dynamic") as disk:
        assert read_disk(disk, 0, 24) == bytes(BLOCK) + OTHERS + bytes(BLOCK)
        disk.map(0, 1, write=True)
    assert check_disk(str(path), format="vhd") == []
    assert os.path.getsize(path) > len(before)

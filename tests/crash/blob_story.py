"""What happens to a page blob, step by step, and what it holds after each: shared by the program and its judge.

Run as ``blob_story.py FOLDER`` it does the steps on ``FOLDER/a.blob`` and marks, with the blob's ETag in JSON, the
return of each step that promises something. With ``small-journals`` the journal holds three records, so that most
changes are a new generation.
"""

import json
import os
import sys
from contextlib import contextmanager
from errno import EXDEV
from typing import NamedTuple

from kvmpy.storage import blob_copy, blob_journal, files
from kvmpy.storage.blob import PageBlob
from kvmpy.storage.blob_folder import load
from kvmpy.storage.blob_layer import Folder
from kvmpy.storage.lease import open_blob_folder

PAGE = 512
KiB = 1024
BLOB, COPY, TWIN = "a.blob", "b.blob", "twin.layer"

PROMISE_NOTHING = ("guest write", "death", "second name", "take over")
"""Steps after which something may be lost, so their returns are no marks."""
API_CHANGES = ("write", "clear", "resize", "sequence number")
"""Steps that change the ETag, and that before any byte."""


class Step(NamedTuple):
    """One operation; which of the figures mean something depends on ``what``."""

    what: str
    offset: int = 0
    size: int = 0
    tag: int = 0


STEPS = (
    Step("create", size=256 * KiB),
    Step("write", 0, 4 * KiB, 1),
    Step("write", 128 * KiB, 8 * KiB, 2),
    Step("guest write", 16 * KiB, 2 * KiB, 3),
    Step("snapshot"),
    Step("write", 2 * KiB, 4 * KiB, 4),
    Step("guest write", 130 * KiB, 4 * KiB, 5),
    Step("flush"),
    Step("clear", 0, 2 * KiB),
    Step("guest zero", 128 * KiB, 3 * KiB),
    Step("guest write", 200 * KiB, 1 * KiB, 6),
    Step("snapshot"),
    Step("clear", 131 * KiB, 2 * KiB),
    Step("guest zero", 0, 3 * KiB),
    Step("resize", size=320 * KiB),
    Step("write", 300 * KiB, 2 * KiB, 7),
    Step("guest write", 302 * KiB, 1 * KiB, 8),
    Step("death"),
    Step("copy"),
    Step("open"),
    Step("write", 300 * KiB, 1 * KiB, 9),
    Step("resize", size=130 * KiB),
    Step("resize", size=320 * KiB),
    Step("sequence number"),
    Step("delete snapshot"),
    Step("guest write", 300 * KiB, 1 * KiB, 10),
    Step("close"),
    Step("delete copy"),
    Step("open"),
    Step("guest write", 301 * KiB, 1 * KiB, 11),
    Step("death"),
    Step("second name"),
    Step("take over"),
    Step("flush"),
    Step("write", 1 * KiB, 2 * KiB, 12),
    Step("guest write", 2 * KiB, 1 * KiB, 13),
    Step("close"),
    Step("copy bytes"),
)


class State(NamedTuple):
    """What is there after a step: the blob's bytes (None: no blob), its snapshots' bytes, and the copy's."""

    content: bytes | None = None
    snapshots: tuple[bytes, ...] = ()
    copy: bytes | None = None
    sequence_number: int = 0


def states() -> list[State]:
    """Return the state before the first step, and after each."""
    found = [State()]
    for step in STEPS:
        found.append(_after(found[-1], step))
    return found


def marked() -> list[int]:
    """Return the indices in `states` of those that were promised: before the first step, and at each mark."""
    return [0, *(i for i, step in enumerate(STEPS, 1) if step.what not in PROMISE_NOTHING)]


def _after(state: State, step: Step) -> State:
    content = bytearray(state.content or b"")
    match step.what:
        case "create":
            content = bytearray(step.size)
        case "write" | "guest write":
            content[step.offset : step.offset + step.size] = pattern(step)
        case "clear" | "guest zero":
            content[step.offset : step.offset + step.size] = bytes(step.size)
        case "resize":
            del content[step.size :]
            content.extend(bytes(step.size - len(content)))
        case "sequence number":
            return state._replace(sequence_number=state.sequence_number + 1)
        case "snapshot":
            return state._replace(snapshots=(*state.snapshots, bytes(content)))
        case "delete snapshot":
            return state._replace(snapshots=state.snapshots[1:])
        case "copy" | "copy bytes":
            return state._replace(copy=bytes(content))
        case "delete copy":
            return state._replace(copy=None)
    return state._replace(content=bytes(content))


def pattern(step: Step) -> bytes:
    """Return what a step writes: each page says which step it is of, and where it belongs."""
    pages = range(step.offset // PAGE, (step.offset + step.size) // PAGE)
    return b"".join((step.tag << 32 | page).to_bytes(8, "little") * (PAGE // 8) for page in pages)


class Story:
    """Takes the steps."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self.path = os.path.join(folder, BLOB)
        self._copy = os.path.join(folder, COPY)
        self._blob: PageBlob

    def take(self, step: Step) -> None:
        match step.what:
            case "create":
                self._blob = PageBlob.create(self.path, step.size)
            case "open" | "take over":
                self._blob = PageBlob.open(self.path)
            case "write":
                self._blob.write(step.offset, pattern(step))
            case "clear":
                self._blob.clear(step.offset, step.size)
            case "guest write":
                self._guest_write(step)
            case "flush":
                for extent in self._blob.table():
                    if extent.writable:
                        os.fdatasync(extent.fd)
            case "guest zero":
                self._blob.zero(step.offset // PAGE, step.size // PAGE)
            case "resize":
                self._blob.resize(step.size)
            case "snapshot":
                self._blob.snapshot()
            case "delete snapshot":
                self._blob.delete_snapshot(self._blob.snapshots[0].id)
            case "sequence number":
                self._blob.set_sequence_number("increment")
            case "close":
                self._blob.close()
            case "death":
                self._blob.abandon()
            case _:
                self._take_with_closed_blob(step)

    def _take_with_closed_blob(self, step: Step) -> None:
        match step.what:
            case "copy":
                blob_copy.copy(self.path, self._copy)
            case "copy bytes":
                with _no_links():
                    blob_copy.copy(self.path, self._copy)
            case "delete copy":
                blob_copy.delete(self._copy)
            case "second name":
                # What a user's copy of the folder, made of links, does to the layer that is written.
                folder = Folder(open_blob_folder(self.path), self.path)
                os.link(load(folder).meta.active.path, os.path.join(self._folder, TWIN))
                os.close(folder.fd)

    def _guest_write(self, step: Step) -> None:
        """Write as an engine does, and do not flush."""
        data = pattern(step)
        for extent in self._blob.map(step.offset // PAGE, step.size // PAGE, write=True):
            start, end = max(step.offset, extent.sector * PAGE), min(step.offset + step.size, extent.end * PAGE)
            if start < end:
                piece = data[start - step.offset : end - step.offset]
                os.pwrite(extent.fd, piece, extent.offset + start - extent.sector * PAGE)


@contextmanager
def _no_links():
    """Have files that cannot have a second name, as between two file systems."""

    def refuse(*_, **__):
        raise OSError(EXDEV, os.strerror(EXDEV))

    link, files.link = files.link, refuse
    try:
        yield
    finally:
        files.link = link


def main(folder: str, *options: str) -> None:
    from sites import mark, tell_sites

    if "small-journals" in options:
        blob_journal.MAX_JOURNAL = 3 * blob_journal.RECORD_SIZE
    tell_sites()
    story = Story(folder)
    for step in STEPS:
        story.take(step)
        if step.what not in PROMISE_NOTHING:
            with PageBlob.open(story.path, readonly=True) as seen:
                mark(json.dumps(seen.etag))


if __name__ == "__main__":
    main(*sys.argv[1:])

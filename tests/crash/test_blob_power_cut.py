"""A power cut at any moment leaves a page blob as it was before the step under way, or as it is after it.

`recorder.c` writes down what a story does to files; each prefix of that, and what a disk may hold of it, is built and
opened. The planted defects take one sync away, or let one change of names or metadata come too early: each must be
seen, so every sync is needed, and the judge sees.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from blob_story import API_CHANGES, BLOB, COPY, PAGE, STEPS, KiB, State, Step, marked, states
from power_cuts import check_defects, check_sound
from recording import Recording, record

from kvmpy.storage import blob_copy
from kvmpy.storage.blob import PageBlob
from kvmpy.storage.blob_check import check

STATES, MARKED = states(), marked()
CLEARED, ADDED = 64 * KiB, 192 * KiB
"""Bytes that the next writer clears, and by which it makes the blob longer: farther than it ever was."""


def judge(folder: Path, said: list[str]) -> str | None:
    """Return what of the promises does not hold in ``folder``, or None."""
    etags = [json.loads(mark) for mark in said]
    now, soon = MARKED[len(etags)], MARKED[min(len(etags) + 1, len(MARKED) - 1)]
    may_be = STATES[now : soon + 1]
    problem = (
        _judge_presence(folder / BLOB, [state.content for state in may_be])
        or _judge_presence(folder / COPY, [state.copy for state in may_be])
        or _judge_blob(folder / BLOB, may_be, etags, STEPS[now : now + 1])
        or _judge_copy(folder / COPY, may_be)
    )
    return f"after step {now}, {STEPS[now - 1] if now else 'none'}: {problem}" if problem else None


def _judge_presence(path: Path, may_be: list[bytes | None]) -> str | None:
    """A blob is there and sound, or its place is free for another one."""
    if path.exists():
        problems = [f"{path.name} is there"] if may_be == [None] * len(may_be) else check(path)
        return f"check: {problems}" if problems else None
    if None not in may_be:
        return f"{path.name} is gone"
    if path.with_name(path.name + ".kvmpy-unfinished").exists():
        PageBlob.create(path, PAGE).close()
        blob_copy.delete(path)
    return None


def _judge_blob(path: Path, may_be: list[State], etags: list[str], steps: Sequence[Step]) -> str | None:
    if not path.exists():
        return None
    with PageBlob.open(path, readonly=True) as blob:
        content = blob.read(0, blob.content_length)
        found = tuple(_read(path, snapshot.id) for snapshot in blob.snapshots)
        if found not in [state.snapshots for state in may_be]:
            return f"{len(found)} snapshots, or their bytes, are neither old nor new"
        if blob.sequence_number not in [state.sequence_number for state in may_be]:
            return f"sequence number {blob.sequence_number}"
        is_changed = content != may_be[0].content or blob.sequence_number != may_be[0].sequence_number
        problem = _judge_content(content, may_be) or _judge_etag(blob.etag, etags, steps if is_changed else ())
    return problem or _take_over(path, content)


def _judge_content(content: bytes, may_be: list[State]) -> str | None:
    """Each page is as it was before a step, or after it."""
    contents = [state.content for state in may_be if state.content is not None]
    if content in contents:
        return None
    if len(content) not in [len(allowed) for allowed in contents]:
        return f"{len(content)} bytes"
    for at in range(0, len(content), PAGE):
        page = content[at : at + PAGE]
        if page not in [allowed[at : at + PAGE] for allowed in contents]:
            return f"page {at // PAGE} is neither old nor new: {page[:8].hex()}"
    return None


def _judge_etag(etag: str, etags: list[str], steps: Sequence[Step]) -> str | None:
    """An ETag that was seen and then another never comes back, and it changes before what the API changes."""
    if etag in etags and etag != etags[-1]:
        return "an old ETag is back"
    if steps and steps[0].what in API_CHANGES and etag in etags:
        return "it changed before its ETag"
    return None


def _take_over(path: Path, content: bytes) -> str | None:
    """The next writer finds the same bytes, and goes on: clears some, has all writable, makes the blob longer."""
    blob = PageBlob.open(path)
    found = blob.read(0, blob.content_length)
    blob.clear(0, CLEARED)
    blob.map(0, len(content) // PAGE, write=True)
    blob.resize(len(content) + ADDED)
    changed = blob.read(0, blob.content_length)
    blob.abandon()
    if found != content or changed != bytes(CLEARED) + content[CLEARED:] + bytes(ADDED):
        return "a writer finds other bytes"
    return None


def _judge_copy(path: Path, may_be: list[State]) -> str | None:
    if path.exists() and _read(path) not in [state.copy for state in may_be]:
        return "the copy is not what the source was"
    return None


def _read(path: Path, snapshot: str | None = None) -> bytes:
    with PageBlob.open(path, readonly=True, snapshot=snapshot) as blob:
        return blob.read(0, blob.content_length)


def test_power_cut_leaves_the_old_or_the_new_blob(blob_story: Recording, disk: Path) -> None:
    """Every prefix of what was done to files, and what a disk may hold of it: nothing acknowledged is lost."""
    check_sound(judge, disk, blob_story.ops, recent=2, samples=1)


def test_power_cut_leaves_the_old_or_the_new_blob_when_its_journal_is_full(tmp_path: Path, disk: Path) -> None:
    """Then what would be a record is a new generation."""
    check_sound(judge, disk, record("blob_story.py", tmp_path, "small-journals").ops, recent=0, samples=0)


def test_defects_of_a_blob_are_seen(blob_story: Recording, disk: Path) -> None:
    """One sync less, or one change of names or metadata too early: some power cut shows it."""
    check_defects(judge, disk, blob_story.ops)

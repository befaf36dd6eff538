"""A disk that is made, imported or exported is there whole or not at all, whenever the power fails."""

import re
from pathlib import Path

from new_disk_story import BLOB, DISKS, RAW, New, source_content
from power_cuts import check_defects, check_sound
from recording import Recording, ready

from kvmpy.storage.blob import PageBlob
from kvmpy.storage.convert import check_disk
from kvmpy.storage.disk import DiskImage
from kvmpy.storage.extents import copy_nonzero
from kvmpy.storage.open import open_disk

LEFT_OVER = re.compile(r"\.kvmpy-[0-9a-f]+\.new|.*\.kvmpy-unfinished")
"""Names that nobody takes for a disk: hidden, or saying what they are."""


def judge(folder: Path, marks: list[str]) -> str | None:
    """Return what of the promises does not hold in ``folder``, or None."""
    names = {path.name for path in folder.iterdir() if not LEFT_OVER.fullmatch(path.name)}
    strangers = names - {BLOB, RAW} - {disk.name for disk in DISKS}
    if strangers:
        return f"what is {strangers}?"
    missing = set(marks) - {"ready"} - names
    if missing:
        return f"{missing} is gone"
    problems = (_judge_disk(folder / disk.name, disk) for disk in DISKS if disk.name in names)
    return next(filter(None, problems), None) or _judge_sources(folder)


def _judge_disk(path: Path, disk: New) -> str | None:
    problems = check_disk(str(path), format=disk.format)
    if problems:
        return f"check: {problems}"
    with open_disk(path, format=disk.format) as image:
        return None if read(image) == disk.content() else f"{disk.name} holds other bytes"


def _judge_sources(folder: Path) -> str | None:
    if (folder / RAW).read_bytes() != source_content():
        return "the raw source was changed"
    with PageBlob.open(folder / BLOB, readonly=True) as blob:
        if read(blob) != source_content() or len(blob.snapshots) != 1:
            return "the blob was changed"
    return "; ".join(check_disk(str(folder / BLOB))) or None


def read(image: DiskImage) -> bytes:
    """Return all that is on a disk."""
    content = bytearray(image.size)

    def write(offset: int, data: memoryview) -> None:
        content[offset : offset + len(data)] = data

    copy_nonzero(image, write)
    return bytes(content)


def test_power_cut_leaves_a_new_disk_whole_or_not_at_all(new_disk_story: Recording, disk: Path) -> None:
    """And the disk that it is made from as it was."""
    ops = new_disk_story.ops
    check_sound(judge, disk, ops, ready(ops), recent=2, samples=1)


def test_defects_of_making_a_disk_are_seen(new_disk_story: Recording, disk: Path) -> None:
    """One sync less, or its name too early: some power cut shows it."""
    ops = new_disk_story.ops
    check_defects(judge, disk, ops, ready(ops))

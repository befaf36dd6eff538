"""Disks that are made, imported and exported, one after another: shared by the program and its judge.

Run as ``new_disk_story.py FOLDER``. Marks: ``ready`` when the sources are there, durably, then the name of each new
disk when it is said to be there.
"""

import os
import sys
from typing import NamedTuple

from kvmpy.storage.blob import PageBlob
from kvmpy.storage.convert import create, export_disk, import_disk
from kvmpy.units import KiB

SIZE = 256 * KiB
EMPTY = 64 * KiB
BLOB, RAW = "source.blob", "source.raw"
FORMATS = ("blob", "raw", "vhd-fixed", "vhd-dynamic")
BEFORE = b"before the snapshot ".ljust(512, b"b") * 8
AFTER = b"after the snapshot ".ljust(512, b"a") * 16


class New(NamedTuple):
    """A disk to be made: empty, or from one of the sources."""

    name: str
    format: str
    source: str = ""
    is_snapshot: bool = False

    def content(self) -> bytes:
        """Return what it is to hold."""
        if not self.source:
            return bytes(EMPTY)
        return source_content(before=self.is_snapshot)


DISKS = (
    *(New(f"created-{format}", format) for format in FORMATS),
    *(New(f"exported-{format}", format, BLOB) for format in FORMATS),
    New("converted", "vhd-dynamic", RAW),
    New("imported", "blob", RAW),
    New("snapshot", "raw", BLOB, is_snapshot=True),
)


def source_content(*, before: bool = False) -> bytes:
    """Return the bytes of both sources; ``before`` the snapshot of the blob."""
    content = bytearray(SIZE)
    content[32 * KiB : 32 * KiB + len(BEFORE)] = BEFORE
    if not before:
        content[SIZE - len(AFTER) :] = AFTER
    return bytes(content)


def prepare(folder: str) -> str:
    """Make the sources and return the name of the blob's snapshot."""
    with PageBlob.create(os.path.join(folder, BLOB), SIZE) as blob:
        blob.write(32 * KiB, BEFORE)
        snapshot = blob.snapshot()
        blob.write(SIZE - len(AFTER), AFTER)
    with open(os.path.join(folder, RAW), "xb") as file:
        file.write(source_content())
        file.flush()
        os.fsync(file.fileno())
    fd = os.open(folder, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
    return snapshot.id


def make(disk: New, folder: str, snapshot: str) -> None:
    """Make the disk."""
    target, source = os.path.join(folder, disk.name), os.path.join(folder, disk.source)
    source_format = "raw" if disk.source == RAW else None
    if not disk.source:
        create(target, EMPTY, format=disk.format)
    elif disk.name == "imported":
        import_disk(source, target, format=source_format)
    else:
        chosen = snapshot if disk.is_snapshot else None
        export_disk(source, target, format=disk.format, source_format=source_format, snapshot=chosen)


def main(folder: str) -> None:
    tell_sites()
    snapshot = prepare(folder)
    mark("ready")
    for disk in DISKS:
        make(disk, folder, snapshot)
        mark(disk.name)


if __name__ == "__main__":
    from sites import mark, tell_sites

    main(*sys.argv[1:])

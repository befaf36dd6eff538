"""Make disks, carry their bytes from one format to another, and say what a disk is.

Zeros are neither read, where the source is sparse, nor written. A target gets its name when it is whole and durable:
nothing is overwritten, and nothing half-written stays, whatever ends the work. The source is opened read-only.

Not here: the formats. A thin copy of a page blob, which shares its pages, is `blob_copy`.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kvmpy.errors import DiskError
from kvmpy.storage.disk import SECTOR_SIZE, DiskImage
from kvmpy.storage.extents import copy_nonzero
from kvmpy.storage.new_disks import WRITERS, Writer
from kvmpy.storage.new_name import new_file
from kvmpy.storage.open import open_disk
from kvmpy.storage.progress import Progress
from kvmpy.storage.vhd import MAX_SIZE

FORMATS = ("blob", "raw", "vhd-fixed", "vhd-dynamic")
"""What a new disk may be."""


def create(path: str, size: int, *, format: str) -> None:
    """Make a disk of ``size`` bytes, all zeros, which takes no room.

    Raises:
        DiskError: something is at ``path``, or the format has no disk of that size.
        OSError: the host refused.
    """
    _check_size(path, size, format)
    with _writer(path, size, format) as writer:
        writer.finish()


def import_disk(source: str, target: str, *, format: str | None, progress: Progress | None = None) -> None:
    """Make a page blob at ``target`` with the bytes of the disk at ``source``; ``format`` as for `open_disk`.

    Raises:
        DiskError: the source is damaged or not what ``format`` says, or something is at ``target``.
        OSError: the host refused (ENOSPC).
    """
    export_disk(source, target, format="blob", source_format=format, progress=progress)


def export_disk(
    source: str,
    target: str,
    *,
    format: str,
    source_format: str | None = None,
    snapshot: str | None = None,
    progress: Progress | None = None,
) -> None:
    """Make a disk at ``target`` with the bytes of the disk, or of the blob's ``snapshot``, at ``source``.

    Raises:
        DiskError: the source is damaged, the format has no disk of that size, or something is at ``target``.
        OSError: the host refused (ENOSPC).
    """
    with _opened(source, source_format, snapshot) as image:
        _check_size(target, image.size, format)
        with _writer(target, image.size, format) as writer:
            copy_nonzero(image, writer.write, progress)
            writer.finish()


def disk_info(path: str, *, format: str | None = None) -> dict[str, Any]:
    """Return what is known of the disk at ``path``: ``format``, ``size``, ``allocated`` (bytes on the host), and more.

    The values are what JSON has. Raises DiskError.
    """
    if format is not None and format.startswith("vhd"):
        from kvmpy.storage.vhd_info import vhd_info

        return vhd_info(path, format)
    with _opened(path, format, None) as image:
        if format == "raw":
            return {"format": "raw", "size": image.size, "allocated": os.stat(path).st_blocks * SECTOR_SIZE}
        return _blob_info(image)


def _blob_info(blob: Any) -> dict[str, Any]:
    names = ("size", "allocated", "content_format", "etag", "sequence_number", "created", "last_modified")
    info = {"format": "blob"} | {name: getattr(blob, name) for name in names}
    return info | {"snapshots": [snapshot._asdict() for snapshot in blob.snapshots]}


def check_disk(path: str, *, format: str | None = None) -> list[str]:
    """Return what is wrong with the disk at ``path``, one line for each; nothing is changed. Empty: it is clean."""
    try:
        if os.path.isdir(path):
            from kvmpy.storage import blob_check

            return blob_check.check(path)
        if format is not None and format.startswith("vhd"):
            from kvmpy.storage.vhd_info import check_vhd

            return check_vhd(path, format)
        open_disk(path, format=format, readonly=True).close()
    except DiskError as error:
        return [str(error)]
    return []


def _check_size(path: str, size: int, format: str) -> None:
    """Refuse a size that a disk of this format cannot have. Raises DiskError; ValueError for an unknown format."""
    if format not in FORMATS:
        raise ValueError(f"{format!r} is no format of a new disk: allowed are {', '.join(FORMATS)}")
    if size <= 0 or size % SECTOR_SIZE:
        raise DiskError(f"{size} bytes: a disk is a multiple of 512, and not 0", path=path)
    if format.startswith("vhd") and size > MAX_SIZE:
        raise DiskError(f"{size} bytes: a VHD has at most 2040 GiB, which are {MAX_SIZE}", path=path)


@contextmanager
def _opened(path: str, format: str | None, snapshot: str | None) -> Iterator[DiskImage]:
    """Open a disk, or a blob's snapshot, to be read."""
    if snapshot is None:
        image: DiskImage = open_disk(path, format=format, readonly=True)
    else:
        from kvmpy.storage.blob import PageBlob

        image = PageBlob.open(path, readonly=True, snapshot=snapshot)
    try:
        yield image
    finally:
        image.close()


@contextmanager
def _writer(path: str, size: int, format: str) -> Iterator[Writer]:
    """Give what fills a new disk, which is at ``path`` afterwards: whole and durable, or not at all."""
    try:
        if format == "blob":
            from kvmpy.storage.blob_import import new_blob

            with new_blob(path, size) as writer:
                yield writer
        else:
            with new_file(path) as fd:
                yield WRITERS[format](fd, size)
    except OSError as error:
        error.filename = path  # not that of a temporary file, or none at all
        raise

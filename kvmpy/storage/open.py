"""Open a disk by its path and its format: the one door for whoever runs a guest on it.

The format of a file is said, never guessed: its first bytes belong to the guest, who could make a raw disk look like
any other format and so choose which file of the host is opened next. A folder is a page blob: no guest makes folders.

Not here: what the formats look like (`raw`, `blob`, `vhd`), and making or converting disks (`convert`).
"""

import os
import stat

from kvmpy.errors import DiskError
from kvmpy.storage.disk import DiskImage

DISK_FORMATS = ("blob", "raw", "vhd")
ALL_FORMATS = (*DISK_FORMATS, "vhd-fixed", "vhd-dynamic")
"""What is understood: also a VHD of one kind and no other."""


def open_disk(
    path: str | os.PathLike[str], *, format: str | None = None, readonly: bool = False, direct: bool = False
) -> DiskImage:
    """Open the disk at ``path``; with ``direct`` past the page cache. Unless ``readonly``, nobody else may write it.

    Raises:
        DiskError: it cannot be opened, is not what ``format`` says, or ``format`` is missing where it must be said.
        LeaseError: another process writes it.
        ValueError: there is no such format.
    """
    path = os.fspath(path)
    if format not in (None, *ALL_FORMATS):
        raise ValueError(f"{format!r} is no disk format: allowed are {', '.join(ALL_FORMATS)}")
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise DiskError(error.strerror or str(error), path=path) from error
    if stat.S_ISDIR(mode):
        return _open_blob(path, format, readonly=readonly, direct=direct)
    if format is None:
        raise DiskError("say what it is: format=raw or format=vhd", path=path)
    if format == "blob":
        raise DiskError("is no page blob, which is a folder", path=path)
    if format == "raw":
        from kvmpy.storage.raw import open_raw

        return open_raw(path, readonly=readonly, direct=direct)
    from kvmpy.storage.vhd_open import open_vhd

    return open_vhd(path, kind=kind_of(format), readonly=readonly, direct=direct)


def kind_of(format: str) -> str | None:
    """Return which kind of VHD a format insists on: ``fixed``, ``dynamic``, or None for ``vhd``, which takes any."""
    return format.partition("-")[2] or None


def _open_blob(path: str, format: str | None, *, readonly: bool, direct: bool) -> DiskImage:
    if format not in (None, "blob"):
        raise DiskError(f"is a folder: a disk of format={format} is a file", path=path)
    from kvmpy.storage.blob import PageBlob

    try:
        return PageBlob.open(path, readonly=readonly, direct=direct)
    except OSError as error:
        raise DiskError(error.strerror or str(error), path=path) from error

"""What ``kvmpy blob`` does to disks: create, copy, snapshot, resize, import, export, lease, delete.

Each function takes the command's arguments and returns the exit status and what is to be printed.
"""

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager

from kvmpy.cli.blob_look import lease_text, size_text
from kvmpy.cli.interruption import Interruption
from kvmpy.cli.messages import say
from kvmpy.cli.progress import ProgressBar
from kvmpy.storage import blob_copy, convert
from kvmpy.storage import lease as leases
from kvmpy.storage.blob import PageBlob
from kvmpy.storage.blob_meta import MAX_SIZE as BLOB_MAX_SIZE
from kvmpy.storage.progress import Progress
from kvmpy.storage.vhd import MAX_SIZE as VHD_MAX_SIZE

FOR_EVER = 1e9  # seconds: 31 years
MOST = {"blob": BLOB_MAX_SIZE, "vhd-fixed": VHD_MAX_SIZE, "vhd-dynamic": VHD_MAX_SIZE, "raw": 2**63 - 512}
"""Bytes of the largest disk of a format; the host may have less for a raw one."""

Answer = tuple[int, str]


def create(arguments: Namespace) -> Answer:
    """Make an empty disk."""
    _allow(arguments.size, MOST.get(arguments.format), f"--size: a disk of format {arguments.format}")
    with _working("creating"):
        convert.create(arguments.path, arguments.size, format=arguments.format)
    return 0, ""


def copy(arguments: Namespace) -> Answer:
    """Make a thin copy of a page blob."""
    with _working("copying") as progress:
        blob_copy.copy(arguments.source, arguments.target, snapshot=arguments.snapshot, progress=progress)
    return 0, ""


def snapshot(arguments: Namespace) -> Answer:
    """Take a snapshot of a page blob, or delete one."""
    with _working("saving"), PageBlob.open(arguments.path) as blob:
        if arguments.delete is None:
            return 0, blob.snapshot().id
        blob.delete_snapshot(arguments.delete)
    return 0, ""


def resize(arguments: Namespace) -> Answer:
    """Change the size of a page blob."""
    _allow(arguments.size, MOST["blob"], "SIZE: a page blob")
    with _working("resizing"), PageBlob.open(arguments.path) as blob:
        blob.resize(arguments.size)
    return 0, ""


def import_(arguments: Namespace) -> Answer:
    """Make a page blob of a file."""
    with _working("importing") as progress:
        convert.import_disk(arguments.source, arguments.target, format=arguments.format, progress=progress)
    return 0, ""


def export(arguments: Namespace) -> Answer:
    """Write a page blob into a file."""
    with _working("exporting") as progress:
        convert.export_disk(
            arguments.source,
            arguments.target,
            format=arguments.format,
            source_format="blob",
            snapshot=arguments.snapshot,
            progress=progress,
        )
    return 0, ""


def lease(arguments: Namespace) -> Answer:
    """Tell who may write a page blob; with ``--hold`` keep that right until the time is over, or a signal comes."""
    if arguments.hold is None:
        return 0, lease_text(leases.lease_state(arguments.path)._asdict())
    with Interruption() as interruption, leases.acquire(arguments.path):
        until = "" if arguments.hold == FOR_EVER else f" for {arguments.hold:g} s"
        say(f"{arguments.path}: the lease is held{until}; Ctrl-C gives it up")
        interruption.wait(min(arguments.hold, FOR_EVER))
    return 0, ""


def delete(arguments: Namespace) -> Answer:
    """Delete a page blob."""
    with _working("deleting"):
        blob_copy.delete(arguments.path)
    return 0, ""


def _allow(size: int, most: int | None, what: str) -> None:
    """Refuse a size that a disk cannot have. Raises ValueError."""
    if most is not None and size > most:
        raise ValueError(f"{what} has at most {size_text(most)}")


@contextmanager
def _working(what: str) -> Iterator[Progress]:
    """Yield what shows progress; a signal ends the work there, where it can be undone; work that is done is done."""
    with Interruption() as interruption, ProgressBar(what) as bar:
        interruption.hold_back()

        def progress(done: int, total: int) -> None:
            if interruption.received:
                raise KeyboardInterrupt
            bar(done, total)

        yield progress

"""Page blobs for the tests of storage."""

import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from blob_engine import pages

from kvmpy.storage.blob import PageBlob
from kvmpy.units import MiB


@pytest.fixture
def in_memory(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory, where syncs cost nothing; a common one where the host has none in memory."""
    if not os.path.isdir("/dev/shm"):
        yield tmp_path
        return
    with TemporaryDirectory(dir="/dev/shm", prefix="kvmpy-test-") as folder:
        yield Path(folder)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where there is nothing yet."""
    return tmp_path / "data.blob"


@pytest.fixture
def blob(path: Path) -> Iterator[PageBlob]:
    """A new blob of 1 MiB, open for writing."""
    with PageBlob.create(path, 1 * MiB) as blob:
        yield blob


@pytest.fixture
def original(in_memory: Path) -> Path:
    """A blob that was not closed: two snapshots, three runs, and a journal of four records."""
    path = in_memory / "original"
    blob = PageBlob.create(path, 1 * MiB)
    blob.write(0, b"x" * 512 * 1024)
    blob.snapshot()
    blob.write(128 * 1024, pages("a"))
    blob.snapshot()
    blob.write(256 * 1024, pages("b"))
    blob.write(0, pages("c"))
    blob.abandon()
    return path

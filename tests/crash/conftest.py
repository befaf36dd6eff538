"""What the tests of power cuts share: the recordings, each made once, and a folder for what a cut leaves."""

import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from recording import MARK, Op, Recording, record


@pytest.fixture
def disk() -> Iterator[Path]:
    """A folder for what a power cut leaves; in memory where there is such a place: it is synced thousands of times."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with TemporaryDirectory(prefix="kvmpy-crash-", dir=memory) as folder:
        yield Path(folder) / "disk"


@pytest.fixture(scope="session")
def blob_story(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    """What `blob_story` does to files."""
    return record("blob_story.py", tmp_path_factory.mktemp("blob"))


@pytest.fixture(scope="session")
def new_disk_story(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    """What `new_disk_story` does to files."""
    return record("new_disk_story.py", tmp_path_factory.mktemp("new"))


@pytest.fixture(scope="session")
def engine_story(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    """What `engine_story` does to files, with one setup after the other."""
    return record("engine_story.py", tmp_path_factory.mktemp("engines"))


@pytest.fixture(scope="session")
def engine_ops(engine_story: Recording) -> dict[str, list[Op]]:
    """What of it each setup does, by its name."""
    ops = engine_story.ops
    begins = [i for i, op in enumerate(ops) if op.kind == MARK and op.data.startswith(b"begin ")]
    names = [ops[i].data.decode().removeprefix("begin ") for i in begins]
    return {name: ops[a:b] for name, (a, b) in zip(names, pairwise([*begins, len(ops)]), strict=True)}

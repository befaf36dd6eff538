"""The list of planted defects is complete, and what they are planted in is true to what really happened."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from crash_states import Cut, build
from defects import planted
from recording import Op, Recording, ready

import kvmpy

PACKAGE = Path(kvmpy.__file__).parent
SYNCS = ("fdatasync", "fsync_folder", "sync", "sync_pages", "rename_durably", "write_file")
"""Functions that sync: whoever calls one relies on it."""


def calls_that_sync(path: Path) -> Iterator[str]:
    """Yield ``module:line`` of each."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in SYNCS:
                yield f"{path.stem}:{node.lineno}"


def test_every_line_that_syncs_is_planted(
    blob_story: Recording, new_disk_story: Recording, engine_ops: dict[str, list[Op]]
) -> None:
    """A program without it is among the defects, however it comes there."""
    stories = [
        (blob_story.ops, 0),
        (new_disk_story.ops, ready(new_disk_story.ops)),
        *((ops, ready(ops)) for ops in engine_ops.values()),
    ]
    names = {defect.name for ops, start in stories for defect in planted(ops, start)}
    lines = set(re.findall(r"\w+:\d+", "".join(name for name in names if name.startswith("without"))))
    sources = [path for path in (PACKAGE / "storage").glob("*.py") if path.name != "files.py"]
    expected = {line for path in (*sources, PACKAGE / "devices/block_execute.py") for line in calls_that_sync(path)}
    assert len(expected) > 25
    assert expected - lines == set()
    assert any(re.fullmatch(r"without: sync \w+ \(in C\)", name) for name in names)


def everything(folder: Path) -> dict[str, bytes | None]:
    """Return what is in a folder and those below: None for a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize("story", ["blob_story", "new_disk_story", "engine_story"])
def test_recorder_misses_nothing(story: str, request: pytest.FixtureRequest, disk: Path) -> None:
    """What is built from the records, with nothing lost, is what the program left."""
    recording: Recording = request.getfixturevalue(story)
    disk.mkdir()
    build(recording.ops, Cut(len(recording.ops)), disk)
    assert everything(disk) == everything(recording.folder)

"""guests/build.py: plain Python, gcc and binutils; it does nothing twice."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvmpy import lessons

GUESTS = Path(__file__).resolve().parents[2] / "guests"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with two lessons, built."""
    (tmp_path / "guests").mkdir()
    for source in GUESTS.iterdir():
        if source.is_file() and (source.suffix != ".S" or source.stem in ("hello", "smp")):
            shutil.copy2(source, tmp_path / "guests")
    assert built(tmp_path) == ["build/guests/hello.bin", "build/guests/smp.elf", "guest.img"]
    return tmp_path


def build(checkout: Path, *arguments: str, path: str = os.environ["PATH"]) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "guests/build.py", *arguments]
    return subprocess.run(command, cwd=checkout, env={"PATH": path}, capture_output=True, text=True)


def built(checkout: Path) -> list[str]:
    """Build, and return what was made."""
    result = build(checkout)
    assert (result.returncode, result.stderr) == (0, "")
    return [line.removeprefix("built ") for line in result.stdout.splitlines()]


def newer(path: Path) -> None:
    """Date the file an hour ahead of everything built so far."""
    future = time.time_ns() + 3_600_000_000_000
    os.utime(path, ns=(future, future))


def test_second_build_makes_nothing(checkout: Path) -> None:
    """`make run` and `make test` do no work twice."""
    assert built(checkout) == []


def test_changed_source_is_built_alone(checkout: Path) -> None:
    """Only what is older than its own source."""
    newer(checkout / "guests" / "hello.S")
    assert built(checkout) == ["build/guests/hello.bin"]


@pytest.mark.parametrize("name", ["abi.h", "console.inc", "elf.ld", "build.py"])
def test_changed_common_file_builds_everything(checkout: Path, name: str) -> None:
    """The ABI header, the included pieces and the linker scripts are sources of every lesson."""
    newer(checkout / "guests" / name)
    assert built(checkout) == ["build/guests/hello.bin", "build/guests/smp.elf", "guest.img"]


def test_c_part_of_a_lesson_is_a_source(checkout: Path) -> None:
    """smp.S and smp.c are one lesson."""
    newer(checkout / "guests" / "smp.c")
    assert built(checkout) == ["build/guests/smp.elf", "guest.img"]


def test_build_leaves_no_intermediate_files(checkout: Path) -> None:
    """What lies in build/guests is images."""
    assert sorted(path.name for path in (checkout / "build" / "guests").iterdir()) == ["hello.bin", "smp.elf"]


@pytest.mark.parametrize(("present", "missing"), [((), "gcc"), (("gcc",), "binutils")])
def test_missing_tool_is_one_line_with_the_fix(checkout: Path, present: tuple[str, ...], missing: str) -> None:
    """A fresh machine: what is missing is named with the command that installs it."""
    tools = checkout / "tools"
    tools.mkdir()
    for tool in present:
        (tools / tool).symlink_to("/bin/true")
    (checkout / "build" / "guests" / "hello.bin").unlink()
    result = build(checkout, path=str(tools))
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert f"apt install {missing}" in result.stderr


def test_error_of_the_assembler_is_shown(checkout: Path) -> None:
    """And the old image stays: no half-built file is left."""
    before = (checkout / "build" / "guests" / "hello.bin").read_bytes()
    source = checkout / "guests" / "hello.S"
    source.write_text(source.read_text() + "nonsense\n")
    newer(source)
    result = build(checkout)
    assert result.returncode == 1
    assert "nonsense" in result.stderr
    assert (checkout / "build" / "guests" / "hello.bin").read_bytes() == before


def test_lesson_without_a_known_mode_is_refused(checkout: Path) -> None:
    """The Mode line decides how a lesson is linked."""
    source = checkout / "guests" / "hello.S"
    source.write_text(source.read_text().replace("# Mode:      real", "# Mode:      surreal"))
    result = build(checkout)
    assert result.returncode == 1
    assert "no Mode line" in result.stderr


def test_installed_lessons_are_found_without_the_checkout(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package has images and headers in kvmpy/lessons_data."""
    target = checkout / "lessons_data"
    assert build(checkout, "--install", str(target)).returncode == 0
    monkeypatch.setattr(lessons, "INSTALLED", target)
    found = {lesson.name: lesson for lesson in lessons.lessons()}
    assert list(found) == ["hello", "smp"]
    assert found["hello"].image == target / "hello.bin"
    assert found["smp"].image.read_bytes() == (checkout / "guest.img").read_bytes()

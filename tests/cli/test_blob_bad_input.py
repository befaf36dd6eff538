"""``kvmpy blob`` and bad input: one line that names the cause, the documented status, and nothing left or changed."""

import os
import socket
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_bad_input import IMAGE, USAGE, check

from kvmpy.storage.lease import acquire
from kvmpy.units import MiB

Blob = Callable[..., "subprocess.CompletedProcess[str]"]

NOBODY = 65534


def tree(folder: Path) -> dict[str, object]:
    """Return what is in ``folder``: names, kinds, bytes, and which are the same file."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        data = path.read_bytes() if stat.S_ISREG(status.st_mode) else None
        found[str(path.relative_to(folder))] = (status.st_mode, status.st_ino, status.st_size, data)
    return found


# --- the command line -------------------------------------------------------------------------------------------

MISTAKES: dict[str, tuple[list[str], list[str]]] = {
    "no command": ([], ["COMMAND"]),
    "unknown command": (["walk"], ["walk", "create", "delete"]),
    "unknown option": (["--walk", "info", "x"], ["--walk"]),
    "unknown option of a command": (["info", "x", "--walk"], ["--walk"]),
    "abbreviated option": (["create", "x", "--siz", "1M"], ["--siz"]),
    "create nothing": (["create", "--size", "1M"], ["PATH"]),
    "a disk without a name": (["create", "", "--size", "1M"], ["PATH", "empty"]),
    "two disks": (["info", "x", "y"], ["y"]),
    "no size": (["create", "x"], ["--size"]),
    "size is no size": (["create", "x", "--size", "much"], ["--size", "'much'", "512M"]),
    "size of nothing": (["create", "x", "--size", "0"], ["0 bytes", "512"]),
    "size below zero": (["create", "x", "--size=-1M"], ["--size", "'-1M'"]),
    "size not in pages": (["create", "x", "--size", "1000"], ["1000 bytes", "512"]),
    "fraction of a byte": (["create", "x", "--size", "0.3"], ["whole number of bytes"]),
    "larger than a page blob": (["create", "x", "--size", "8193G"], ["8 TiB"]),
    "larger than a VHD": (["create", "x", "--size", "2041G", "--format", "vhd-fixed"], ["vhd-fixed", "2190433320960"]),
    "larger than a dynamic VHD": (
        ["create", "x", "--size", "2041G", "--format", "vhd-dynamic"],
        ["vhd-dynamic", "1.99 TiB"],
    ),
    "size of nothing, raw": (["create", "x", "--size", "0", "--format", "raw"], ["0 bytes", "512"]),
    "size not in pages, raw": (["create", "x", "--size", "1000", "--format", "raw"], ["1000 bytes", "512"]),
    "size of nothing, VHD": (["create", "x", "--size", "0", "--format", "vhd-dynamic"], ["0 bytes", "512"]),
    "size not in pages, VHD": (["create", "x", "--size", "1000", "--format", "vhd-fixed"], ["1000 bytes", "512"]),
    "unknown format": (["create", "x", "--size", "1M", "--format", "qcow2"], ["qcow2", "vhd-dynamic"]),
    "copy to nowhere": (["copy", "x"], ["DST"]),
    "resize without size": (["resize", "x"], ["SIZE"]),
    "resize to no size": (["resize", "x", "large"], ["SIZE", "'large'"]),
    "import to nowhere": (["import", "x"], ["PATH"]),
    "import of an unknown format": (["import", "x", "y", "--format", "qcow2"], ["qcow2", "vhd"]),
    "import of what needs no format": (["import", "x", "y", "--format", "blob"], ["'blob'", "raw"]),
    "export without format": (["export", "x", "y"], ["--format"]),
    "export to an unknown format": (["export", "x", "y", "--format", "vhd"], ["'vhd'", "vhd-fixed"]),
    "lease for no time": (["lease", "x", "--hold", "0"], ["--hold", "above 0"]),
    "lease until soon": (["lease", "x", "--hold", "soon"], ["--hold", "'soon'"]),
    "lease for ever in numbers": (["lease", "x", "--hold", "inf"], ["--hold", "above 0"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_with_what_is_allowed(blob: Blob, tmp_path: Path, mistake: str) -> None:
    arguments, words = MISTAKES[mistake]
    check(blob(*arguments), USAGE, *words)
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("size", ["0", "1000", "8193G"])
def test_a_size_that_no_blob_has_is_refused_by_resize(blob: Blob, tmp_path: Path, size: str) -> None:
    blob("create", "data.blob", "--size", "1M")
    check(blob("resize", "data.blob", size), USAGE, "bytes" if size != "8193G" else "8 TiB")
    assert "1 MiB (1048576 bytes)" in blob("info", "data.blob").stdout


# --- what is no disk --------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path, blob: Blob) -> Iterator[Path]:
    """A directory with a page blob, and of what is none."""
    assert blob("create", "data.blob", "--size", "1M").returncode == 0
    (tmp_path / "raw").write_bytes(b"\x55" * MiB)
    (tmp_path / "empty").touch()
    (tmp_path / "odd").write_bytes(bytes(1000))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("text")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        yield tmp_path


NO_BLOBS = {
    "missing": [],
    "missing/data.blob": [],
    "raw/data.blob": [],
    "raw": [],
    "empty": [],
    "folder": [],
    "fifo": [],
    "socket": [],
    "loop": [],
    "/dev/zero": [],
    "a\nname": ["a\\nname"],
}

ON_A_BLOB: dict[str, list[str]] = {
    "info": ["info", "{}"],
    "copy": ["copy", "{}", "target"],
    "snapshot": ["snapshot", "{}"],
    "delete a snapshot": ["snapshot", "{}", "--delete", "x"],
    "ranges": ["ranges", "{}"],
    "resize": ["resize", "{}", "2M"],
    "export": ["export", "{}", "target", "--format", "raw"],
    "lease": ["lease", "{}"],
    "hold": ["lease", "{}", "--hold", "1"],
    "delete": ["delete", "{}"],
}


@pytest.mark.parametrize("command", ON_A_BLOB)
def test_what_is_no_page_blob_is_refused_and_left_alone(blob: Blob, files: Path, command: str) -> None:
    """Never waited for: the FIFO has no other end."""
    before = tree(files)
    for name, words in NO_BLOBS.items():
        check(blob(*(word.format(name) for word in ON_A_BLOB[command])), IMAGE, name.replace("\n", "\\n"), *words)
    assert tree(files) == before


@pytest.mark.parametrize("command", [name for name in ON_A_BLOB if name != "info"])
def test_a_plain_file_is_told_to_be_no_page_blob(blob: Blob, files: Path, command: str) -> None:
    """No word of a format: that could be said of a file, but these commands are for blobs."""
    done = blob(*(word.format("raw") for word in ON_A_BLOB[command]))
    check(done, IMAGE, "raw: is no page blob")
    assert "format" not in done.stderr


@pytest.mark.parametrize("name", NO_BLOBS)
def test_what_is_no_disk_is_not_clean(blob: Blob, files: Path, name: str) -> None:
    """What is there and wrong is told as damage is, on standard output; what is not there is an error."""
    for options in ([], ["--format", "vhd"]):
        done = blob("check", name, *options)
        assert done.returncode == IMAGE
        assert "Traceback" not in done.stderr
        told = (done.stdout + done.stderr).splitlines()
        assert all(name.replace("\n", "\\n") in line for line in told)


IMPORTS = {
    "missing": (["missing", "--format", "raw"], ["missing"]),
    "FIFO": (["fifo", "--format", "raw"], ["fifo", "FIFO"]),
    "device": (["/dev/zero", "--format", "raw"], ["/dev/zero", "device"]),
    "folder": (["folder"], ["folder"]),
    "folder as a file": (["folder", "--format", "raw"], ["folder"]),
    "blob as a file": (["data.blob", "--format", "raw"], ["data.blob"]),
    "what it is was not said": (["raw"], ["raw", "format"]),
    "no VHD": (["raw", "--format", "vhd"], ["raw", "offset 0x"]),
    "empty": (["empty", "--format", "raw"], ["empty", "512"]),
    "empty VHD": (["empty", "--format", "vhd"], ["empty"]),
    "not in pages": (["odd", "--format", "raw"], ["odd", "1000", "512"]),
}


@pytest.mark.parametrize("source", IMPORTS)
def test_what_cannot_be_imported_leaves_nothing(blob: Blob, files: Path, source: str) -> None:
    before = tree(files)
    (name, *options), words = IMPORTS[source]
    check(blob("import", name, "target", *options), IMAGE, *words)
    assert tree(files) == before


# --- what is there already, or may not be -----------------------------------------------------------------------

TO_A_TARGET: dict[str, list[str]] = {
    "create a blob": ["create", "{}", "--size", "1M"],
    "create a raw file": ["create", "{}", "--size", "1M", "--format", "raw"],
    "create a fixed VHD": ["create", "{}", "--size", "1M", "--format", "vhd-fixed"],
    "create a dynamic VHD": ["create", "{}", "--size", "1M", "--format", "vhd-dynamic"],
    "copy": ["copy", "data.blob", "{}"],
    "import": ["import", "raw", "{}", "--format", "raw"],
    "export to a blob": ["export", "data.blob", "{}", "--format", "blob"],
    "export to a raw file": ["export", "data.blob", "{}", "--format", "raw"],
    "export to a fixed VHD": ["export", "data.blob", "{}", "--format", "vhd-fixed"],
    "export to a dynamic VHD": ["export", "data.blob", "{}", "--format", "vhd-dynamic"],
}


@pytest.mark.parametrize("command", TO_A_TARGET)
def test_what_exists_is_never_replaced(blob: Blob, files: Path, command: str) -> None:
    before = tree(files)
    for name in ("raw", "empty", "folder", "data.blob", "fifo", "socket", "loop", "/dev/zero", "."):
        check(blob(*(word.format(name) for word in TO_A_TARGET[command])), IMAGE, name, "exist")
    assert tree(files) == before


@pytest.mark.parametrize("command", TO_A_TARGET)
def test_a_target_that_cannot_be_is_told(blob: Blob, files: Path, command: str) -> None:
    before = tree(files)
    places = {"missing/target": "No such file", "raw/target": "Not a directory", "n" * 300: "name too long"}
    for name, why in places.items():
        check(blob(*(word.format(name) for word in TO_A_TARGET[command])), IMAGE, name, why)
    assert tree(files) == before


@contextmanager
def unprivileged() -> Iterator[None]:
    """Be nobody in this block: to root nothing is forbidden."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.fixture
def forbidden(blob: Blob, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory in which nobody may make a file, with a blob and a raw file that nobody may read."""
    with tempfile.TemporaryDirectory() as folder:  # tmp_path lies where others may not look
        monkeypatch.chdir(folder)
        blob("create", "data.blob", "--size", "1M")
        Path("raw").write_bytes(bytes(MiB))
        for name in ("data.blob", "raw"):
            os.chmod(name, 0)
        os.chmod(folder, 0o555)
        yield Path(folder)
        os.chmod(folder, 0o755)
        os.chmod("data.blob", 0o755)
        monkeypatch.undo()


def test_a_directory_without_rights_is_told(blob: Blob, forbidden: Path) -> None:
    with unprivileged():
        for format in ("blob", "raw", "vhd-fixed", "vhd-dynamic"):
            check(blob("create", "target", "--size", "1M", "--format", format), IMAGE, "target", "Permission denied")
        check(blob("info", "raw", "--format", "raw"), IMAGE, "raw", "Permission denied")
        check(blob("import", "raw", "target", "--format", "raw"), IMAGE, "raw", "Permission denied")
        for words in ON_A_BLOB.values():
            check(blob(*(word.format("data.blob") for word in words)), IMAGE, "data.blob", "Permission denied")
        assert "Permission denied" in blob("check", "data.blob").stdout


# --- who else writes, and what is not there ---------------------------------------------------------------------

WRITERS = ["copy", "snapshot", "delete a snapshot", "resize", "hold", "delete"]


@pytest.mark.parametrize("command", WRITERS)
def test_a_leased_blob_is_left_to_its_holder_who_is_named(blob: Blob, files: Path, command: str) -> None:
    with acquire("data.blob"):
        before = tree(files)
        check(blob(*(word.format("data.blob") for word in ON_A_BLOB[command])), IMAGE, "data.blob", str(os.getpid()))
        assert tree(files) == before
    assert blob("lease", "data.blob").stdout == "available\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["copy", "data.blob", "target", "--snapshot", "2026-01-01T00:00:00.0000000Z"],
        ["export", "data.blob", "target", "--format", "raw", "--snapshot", "2026-01-01T00:00:00.0000000Z"],
        ["snapshot", "data.blob", "--delete", "2026-01-01T00:00:00.0000000Z"],
        ["ranges", "data.blob", "--since", "2026-01-01T00:00:00.0000000Z"],
    ],
)
def test_an_unknown_snapshot_is_told(blob: Blob, files: Path, arguments: list[str]) -> None:
    before = {name: found for name, found in tree(files).items() if not name.startswith("data.blob/")}
    check(blob(*arguments), IMAGE, "data.blob", "2026-01-01T00:00:00.0000000Z")
    assert {name: found for name, found in tree(files).items() if not name.startswith("data.blob/")} == before
    assert blob("check", "data.blob").stdout == "clean\n"

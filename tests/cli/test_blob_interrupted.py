"""``kvmpy blob`` cut short: by a signal, by a full disk, or killed; nothing half-written stays, and the source does."""

import resource
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from command_line import DEADLINE, Terminal
from test_bad_input import IMAGE, check
from test_blob_bad_input import tree

from kvmpy.cli.progress import ProgressBar
from kvmpy.units import MiB

Blob = Callable[..., "subprocess.CompletedProcess[str]"]
INTERRUPTED = 130


@pytest.fixture
def source(tmp_path: Path, blob: Blob) -> Path:
    """A directory with 4 MiB of data that are not zeros, raw and as a blob."""
    (tmp_path / "raw").write_bytes(b"\x55" * 4 * MiB)
    assert blob("import", "raw", "data.blob", "--format", "raw").returncode == 0
    return tmp_path


LONG = {
    "import": ["import", "raw", "target", "--format", "raw"],
    "export to a blob": ["export", "data.blob", "target", "--format", "blob"],
    "export to a raw file": ["export", "data.blob", "target", "--format", "raw"],
    "export to a fixed VHD": ["export", "data.blob", "target", "--format", "vhd-fixed"],
    "export to a dynamic VHD": ["export", "data.blob", "target", "--format", "vhd-dynamic"],
}


@pytest.mark.parametrize(
    ("command", "signum"),
    [
        *((command, signal.SIGINT) for command in LONG),
        *(("import", signum) for signum in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)),
    ],
)
def test_a_signal_ends_the_work_and_leaves_nothing(
    blob: Blob, source: Path, monkeypatch: pytest.MonkeyPatch, command: str, signum: signal.Signals
) -> None:
    """The signal comes when a part is written."""
    before = tree(source)
    calls: list[tuple[int, int]] = []

    def call(bar: ProgressBar, done: int, total: int) -> None:
        calls.append((done, total))
        signal.raise_signal(signum)

    monkeypatch.setattr(ProgressBar, "__call__", call)
    done = blob(*LONG[command])
    assert (done.returncode, done.stdout, done.stderr) == (INTERRUPTED, "", "")
    assert len(calls) == 1
    assert calls[0][0] < calls[0][1]
    assert tree(source) == before


def test_ctrl_c_gives_a_lease_up(source: Path, blob: Blob, terminal: Callable[..., Terminal]) -> None:
    started = terminal("blob", "lease", str(source / "data.blob"), "--hold")
    started.read_until(b"the lease is held; Ctrl-C gives it up\r\n")
    check(blob("resize", "data.blob", "16M"), IMAGE, str(started.process.pid))
    started.type(b"\x03")
    assert started.wait() == INTERRUPTED
    assert blob("resize", "data.blob", "16M").returncode == 0


def test_a_killed_holder_holds_nothing(source: Path, blob: Blob, terminal: Callable[..., Terminal]) -> None:
    started = terminal("blob", "lease", str(source / "data.blob"), "--hold", "1000")
    started.read_until(b"the lease is held for 1000 s")
    assert f"leased by process {started.process.pid}" in blob("lease", "data.blob").stdout
    started.send_signal(signal.SIGKILL)
    started.wait()
    assert blob("lease", "data.blob").stdout == "available\n"
    assert blob("resize", "data.blob", "16M").returncode == 0


# --- a full disk ------------------------------------------------------------------------------------------------


@pytest.fixture
def small(source: Path) -> Iterator[Path]:
    """A file system with room for 2 MiB, in the directory of ``source``."""
    folder = source / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, timeout=DEADLINE)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True, timeout=DEADLINE)


@pytest.mark.parametrize("command", [*LONG, "copy"])
def test_a_full_disk_in_the_middle_leaves_nothing(blob: Blob, source: Path, small: Path, command: str) -> None:
    """A copy onto another file system is a whole one."""
    before = tree(source)
    arguments = LONG.get(command, ["copy", "data.blob", "target"])
    arguments = ["small/target" if word == "target" else word for word in arguments]
    check(blob(*arguments), IMAGE, "small/target", "No space left")
    assert list(small.iterdir()) == []
    unchanged = {name: found for name, found in tree(source).items() if "data.blob/" not in name}
    assert unchanged == {name: found for name, found in before.items() if "data.blob/" not in name}
    assert blob("check", "data.blob").stdout == "clean\n"


@pytest.fixture
def limited() -> Iterator[None]:
    """No file may be larger than 1 MiB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MiB, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("command", LONG)
def test_a_limit_of_the_file_size_leaves_nothing(blob: Blob, source: Path, limited: None, command: str) -> None:
    before = tree(source)
    check(blob(*LONG[command]), IMAGE, "target", "File too large")
    assert tree(source) == before


@pytest.mark.parametrize("format", ["blob", "raw", "vhd-fixed"])
def test_a_disk_that_cannot_be_made_leaves_nothing(blob: Blob, tmp_path: Path, limited: None, format: str) -> None:
    check(blob("create", "target", "--size", "64M", "--format", format), IMAGE, "target", "File too large")
    assert tree(tmp_path) == {}

"""``kvmpy blob``: what each command does, and what it prints."""

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from kvmpy.storage.blob import PageBlob
from kvmpy.storage.lease import acquire
from kvmpy.units import KiB, MiB

Blob = Callable[..., "subprocess.CompletedProcess[str]"]

ID = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{7}Z\n")


def ok(done: "subprocess.CompletedProcess[str]") -> str:
    """Return what the command printed; fail unless it succeeded and complained of nothing."""
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def write(path: str, offset: int, data: bytes) -> None:
    """Write into a page blob."""
    with PageBlob.open(path) as blob:
        blob.write(offset, data)


def read(path: str, offset: int, size: int) -> bytes:
    """Read from a page blob."""
    with PageBlob.open(path, readonly=True) as blob:
        return blob.read(offset, size)


@pytest.fixture
def data(blob: Blob) -> str:
    """A page blob of 1 MiB with two runs of pages."""
    ok(blob("create", "data.blob", "--size", "1M"))
    write("data.blob", 0, b"a" * 512)
    write("data.blob", 0x10000, b"b" * 1024)
    return "data.blob"


# --- create and info --------------------------------------------------------------------------------------------


def test_a_new_blob_reads_as_zeros_and_takes_no_room(blob: Blob) -> None:
    assert ok(blob("create", "data.blob", "--size", "64M")) == ""
    assert read("data.blob", 64 * MiB - KiB, KiB) == bytes(KiB)
    found = json.loads(ok(blob("info", "data.blob", "--json")))
    assert found["size"] == 64 * MiB
    assert found["allocated"] < 64 * KiB


def test_info_is_aligned_lines_that_fit_a_terminal(blob: Blob, data: str) -> None:
    text = ok(blob("info", data))
    assert "size:             1 MiB (1048576 bytes)\n" in text
    assert "lease:            available\n" in text
    assert {line.index(line.split(": ")[1].lstrip()) for line in text.splitlines()} == {18}
    assert max(map(len, text.splitlines())) <= 80


def test_a_line_feed_in_a_name_makes_no_line(blob: Blob) -> None:
    ok(blob("create", "a\nname", "--size", "1M"))
    assert ok(blob("info", "a\nname")).startswith("path:             a\\nname\nformat:           blob\n")
    assert json.loads(ok(blob("info", "a\nname", "--json")))["path"] == "a\nname"


def test_info_lists_snapshots(blob: Blob, data: str) -> None:
    first, second = (ok(blob("snapshot", data)).strip() for _ in range(2))
    text = ok(blob("info", data))
    assert text.index(first) < text.index(second)
    assert [found["id"] for found in json.loads(ok(blob("info", data, "--json")))["snapshots"]] == [first, second]


@pytest.mark.parametrize("format", ["raw", "vhd-fixed", "vhd-dynamic"])
def test_files_are_made_as_the_format_says(blob: Blob, format: str) -> None:
    assert ok(blob("create", "disk", "--size", "1M", "--format", format)) == ""
    found = json.loads(ok(blob("info", "disk", "--format", format.partition("-")[0], "--json")))
    assert (found["format"], found["size"]) == (format, MiB)
    assert os.stat("disk").st_blocks * 512 <= 64 * KiB


# --- snapshots, ranges, resize ----------------------------------------------------------------------------------


def test_a_snapshot_is_its_id_and_keeps_what_was_there(blob: Blob, data: str) -> None:
    taken = ok(blob("snapshot", data))
    assert ID.fullmatch(taken)
    write(data, 0, bytes(512))
    with PageBlob.open(data, snapshot=taken.strip()) as kept:
        assert kept.read(0, 512) == b"a" * 512
    assert read(data, 0, 512) == bytes(512)


def test_a_deleted_snapshot_is_gone(blob: Blob, data: str) -> None:
    taken = ok(blob("snapshot", data)).strip()
    assert ok(blob("snapshot", data, "--delete", taken)) == ""
    assert json.loads(ok(blob("info", data, "--json")))["snapshots"] == []


def test_ranges_are_a_table(blob: Blob, data: str) -> None:
    assert ok(blob("ranges", data)) == (
        "offset   size\n"
        "0x00000  512 bytes\n"
        "0x10000  1 KiB (1024 bytes)\n"
        "total    1.5 KiB (1536 bytes)\n"
    )  # fmt: skip


def test_ranges_since_a_snapshot_say_what_was_cleared(blob: Blob, data: str) -> None:
    taken = ok(blob("snapshot", data)).strip()
    assert ok(blob("ranges", data, "--since", taken)) == "nothing has changed\n"
    with PageBlob.open(data) as opened:
        opened.clear(0, 512)
        opened.write(0x20000, b"c" * 512)
    assert ok(blob("ranges", data, "--since", taken)) == (
        "offset   size\n"
        "0x00000  512 bytes           cleared\n"
        "0x20000  512 bytes\n"
        "total    1 KiB (1024 bytes)\n"
    )  # fmt: skip
    assert json.loads(ok(blob("ranges", data, "--since", taken, "--json"))) == {
        "path": data,
        "since": taken,
        "ranges": [
            {"offset": 0, "size": 512, "cleared": True},
            {"offset": 0x20000, "size": 512, "cleared": False},
        ],
    }


def test_a_blob_of_zeros_says_so(blob: Blob) -> None:
    ok(blob("create", "data.blob", "--size", "1M"))
    assert ok(blob("ranges", "data.blob")) == "all zeros\n"
    assert json.loads(ok(blob("ranges", "data.blob", "--json")))["ranges"] == []


def test_a_resized_blob_keeps_what_fits(blob: Blob, data: str) -> None:
    assert ok(blob("resize", data, "2M")) == ""
    assert read(data, 2 * MiB - 512, 512) == bytes(512)
    assert ok(blob("resize", data, "512")) == ""
    assert ok(blob("resize", data, "1M")) == ""
    assert read(data, 0, 512) == b"a" * 512
    assert read(data, 0x10000, 1024) == bytes(1024)


# --- copies and conversions -------------------------------------------------------------------------------------


def test_a_copy_goes_its_own_way(blob: Blob, data: str) -> None:
    taken = ok(blob("snapshot", data)).strip()
    write(data, 0, b"x" * 512)
    assert ok(blob("copy", data, "copy.blob")) == ""
    assert ok(blob("copy", data, "old.blob", "--snapshot", taken)) == ""
    write(data, 0, b"y" * 512)
    assert ok(blob("delete", data)) == ""
    assert not os.path.lexists(data)
    assert (read("copy.blob", 0, 512), read("old.blob", 0, 512)) == (b"x" * 512, b"a" * 512)
    assert ok(blob("check", "copy.blob")) == "clean\n"


@pytest.mark.parametrize("format", ["raw", "vhd-fixed", "vhd-dynamic"])
def test_what_is_exported_and_imported_is_the_same(blob: Blob, data: str, format: str) -> None:
    assert ok(blob("export", data, "disk", "--format", format)) == ""
    assert ok(blob("import", "disk", "again.blob", "--format", format.partition("-")[0])) == ""
    assert read("again.blob", 0, MiB) == read(data, 0, MiB)
    assert ok(blob("ranges", "again.blob")) == ok(blob("ranges", data))


def test_a_snapshot_can_be_exported(blob: Blob, data: str) -> None:
    taken = ok(blob("snapshot", data)).strip()
    write(data, 0, b"x" * 512)
    ok(blob("export", data, "disk", "--format", "raw", "--snapshot", taken))
    assert Path("disk").read_bytes()[:512] == b"a" * 512


# --- check and lease --------------------------------------------------------------------------------------------


def test_a_sound_disk_is_clean(blob: Blob, data: str) -> None:
    assert ok(blob("check", data)) == "clean\n"
    for format in ("raw", "vhd-fixed", "vhd-dynamic"):
        ok(blob("export", data, format, "--format", format))
        assert ok(blob("check", format, "--format", format.partition("-")[0])) == "clean\n"


def test_damage_is_a_line_each_and_the_status_of_a_bad_disk(blob: Blob, data: str) -> None:
    meta = Path(data, "meta")
    damaged = bytearray(meta.read_bytes())
    damaged[-1] ^= 1
    meta.write_bytes(damaged)
    done = blob("check", data)
    assert (done.returncode, done.stderr) == (194, "")
    assert "meta" in done.stdout


def test_a_line_feed_in_a_name_makes_no_problem_more(blob: Blob) -> None:
    ok(blob("create", "a\nname", "--size", "1M"))
    os.unlink("a\nname/meta")
    assert blob("check", "a\nname").stdout.splitlines() == ["a\\nname/meta: is missing (at offset 0x0)"]


def test_a_damaged_vhd_is_named_with_the_offset(blob: Blob, data: str) -> None:
    ok(blob("export", data, "disk.vhd", "--format", "vhd-dynamic"))
    with open("disk.vhd", "r+b") as file:
        file.seek(600)
        file.write(b"\xff")
    done = blob("check", "disk.vhd", "--format", "vhd")
    assert (done.returncode, done.stderr) == (194, "")
    assert re.search(r"disk.vhd: .*offset 0x", done.stdout)


def test_a_lease_says_who_holds_it(blob: Blob, data: str) -> None:
    assert ok(blob("lease", data)) == "available\n"
    with acquire(data):
        assert re.match(rf"leased by process {os.getpid()} on \S+ since \S+\n$", ok(blob("lease", data)))
        assert f"leased by process {os.getpid()}" in ok(blob("info", data))
    assert ok(blob("lease", data)) == "available\n"


def test_a_lease_is_held_for_as_long_as_was_said(blob: Blob, data: str) -> None:
    done = blob("lease", data, "--hold", "0.01")
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == "kvmpy: data.blob: the lease is held for 0.01 s; Ctrl-C gives it up\n"


# --- help -------------------------------------------------------------------------------------------------------

COMMANDS = ["create", "info", "copy", "snapshot", "ranges", "resize", "import", "export", "check", "lease", "delete"]


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help_fits_into_80_columns(blob: Blob, command: list[str]) -> None:
    text = ok(blob(*command, "--help"))
    assert text.startswith(f"usage: kvmpy {' '.join(['blob', *command])} ")
    assert max(map(len, text.splitlines())) < 80


def test_help_names_every_command(blob: Blob) -> None:
    assert re.findall(r"^  ([a-z]+) ", ok(blob("--help")), re.MULTILINE) == COMMANDS

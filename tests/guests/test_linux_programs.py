"""What the Linux guests run and boot from: archives and disks, and the programs, tried on the host as they are."""

import itertools
import os
import shutil
import stat
import subprocess
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import linux_guest
import pytest

newc = linux_guest.module("newc")
rootfs = linux_guest.module("rootfs")
programs = linux_guest.module("programs")

ENTRIES = [
    newc.folder("bin"),
    newc.program("bin/tool", b"#!/bin/sh\n" * 1000),
    newc.link("bin/sh", "tool"),
    newc.folder("dev"),
    newc.character_device("dev/console", 5, 1),
    newc.program("empty", b""),
]

# --- archives ---------------------------------------------------------------------------------------------------


def unpacked(data: bytes) -> Iterator[tuple[str, int, bytes, tuple[int, int]]]:
    """Yield what the kernel would find: its own description of the format, read anew."""
    at = 0
    while True:
        assert data[at : at + 6] == b"070701"
        fields = [int(data[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        assert data[at + 110 + fields[11] - 1] == 0
        name = data[at + 110 : at + 110 + fields[11] - 1].decode()
        at = (at + 110 + fields[11] + 3) & ~3
        content = data[at : at + fields[6]]
        assert len(content) == fields[6]
        at = (at + fields[6] + 3) & ~3
        if name == "TRAILER!!!":
            assert at == len(data)
            return
        assert fields[2] == fields[3] == 0
        yield name, fields[1], content, (fields[9], fields[10])


def test_an_archive_has_what_was_put_in() -> None:
    assert list(unpacked(newc.archive(ENTRIES))) == [tuple(entry) for entry in ENTRIES]


def test_each_file_of_an_archive_has_its_own_number() -> None:
    """The kernel takes two files of one number, with more than one link, for the same file."""
    data = newc.archive(ENTRIES)
    numbers = [data[at + 6 : at + 14] for at in range(len(data)) if data[at : at + 6] == b"070701"]
    assert len(set(numbers)) == len(numbers) == len(ENTRIES) + 1


# --- disks ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def e2fsprogs() -> None:
    for name in ("mke2fs", "debugfs", "e2fsck"):
        if shutil.which(name, path=rootfs.SYSTEM_PATH) is None:
            pytest.skip(f"{name} is not installed")


def debugfs(image: Path, command: str) -> str:
    result = subprocess.run([rootfs.tool("debugfs"), "-R", command, image], capture_output=True, text=True, check=True)
    return result.stdout


@pytest.fixture
def foreign_files(e2fsprogs: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is laid out for mke2fs has times that are never the same, and belongs to a user."""
    stage = rootfs.stage
    seconds = itertools.count(1_000_000_000)

    def foreign(entries: Any, root: Path) -> Any:
        names = stage(entries, root)
        for path in [*root.rglob("*"), root]:
            os.utime(path, (next(seconds), next(seconds)), follow_symlinks=False)
            if os.geteuid() == 0:
                os.lchown(path, 1234, 1234)
        return names

    monkeypatch.setattr(rootfs, "stage", foreign)


@pytest.mark.usefixtures("foreign_files")
def test_a_disk_has_what_was_put_in(tmp_path: Path) -> None:
    """It needs no repair, and belongs to root whoever made it."""
    image = tmp_path / "disk"
    rootfs.make_ext4(image, ENTRIES, size=8 * rootfs.MiB)
    assert image.stat().st_size == 8 * rootfs.MiB
    subprocess.run([rootfs.tool("e2fsck"), "-fn", image], capture_output=True, check=True)
    assert debugfs(image, "cat /bin/tool").encode() == ENTRIES[1].data
    assert 'Fast link dest: "tool"' in debugfs(image, "stat /bin/sh")
    for name in ("/", "/bin", "/bin/tool", "/bin/sh"):
        assert "User:     0   Group:     0" in debugfs(image, f"stat {name}")
    assert "Mode:  0755" in debugfs(image, "stat /bin/tool")


@pytest.mark.usefixtures("e2fsprogs")
@pytest.mark.parametrize("journal", [True, False])
def test_a_disk_has_a_journal_if_wanted(tmp_path: Path, journal: bool) -> None:
    image = tmp_path / "disk"
    rootfs.make_ext4(image, journal=journal, features="^metadata_csum")
    features = next(line for line in debugfs(image, "stats").splitlines() if "features" in line.lower())
    assert ("has_journal" in features.split()) == journal
    assert "metadata_csum" not in features.split()


@pytest.mark.usefixtures("foreign_files")
def test_the_same_entries_give_the_same_disk(tmp_path: Path) -> None:
    """Laid out in another order, at another time."""
    images = [tmp_path / "one", tmp_path / "two"]
    for image, entries in zip(images, (ENTRIES, [*ENTRIES[3:], *ENTRIES[:3]]), strict=True):
        rootfs.make_ext4(image, entries, size=8 * rootfs.MiB)
    assert images[0].read_bytes() == images[1].read_bytes()


@pytest.mark.usefixtures("e2fsprogs")
def test_a_disk_that_is_too_small_is_refused(tmp_path: Path) -> None:
    entries = [newc.program("large", bytes(range(256)) * 40_000)]
    with pytest.raises(SystemExit, match="mke2fs"):
        rootfs.make_ext4(tmp_path / "disk", entries, size=8 * rootfs.MiB)


# --- programs ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every program."""
    folder = tmp_path_factory.mktemp("programs")
    for name in programs.PROGRAMS:
        programs.compile_program(name, folder / name)
    return folder


def test_the_same_program_is_compiled_to_the_same_bytes(compiled: Path, tmp_path: Path) -> None:
    programs.compile_program("bench", tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere").read_bytes() == (compiled / "bench").read_bytes()


def run(program: Path, *arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=False, timeout=60)


def test_tiny_init_says_how_long_the_boot_took(compiled: Path) -> None:
    result = run(compiled / "init_tiny")
    words = result.stdout.split()
    assert (result.returncode, words[:2]) == (0, ["init:", "up"])
    assert abs(float(words[2]) - float(Path("/proc/uptime").read_text().split()[0])) < 60


def test_avx_registers_survive_on_the_host(compiled: Path) -> None:
    """The program sees no corruption where there is none."""
    result = run(compiled / "avx_pair")
    expected = {0: "avx_pair: 0 of 300 rounds corrupt\n", 2: "avx_pair: no AVX\n"}
    assert result.stdout == expected[result.returncode]


def test_corrupt_avx_registers_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One register's upper half, lost by one of the two processes in every third round."""
    source = (linux_guest.SOURCES / "avx_pair.c").read_text()
    call = "        CALL0(__NR_sched_yield);\n"
    loss = '        if (which && round % 3 == 0)\n            __asm__ volatile("vmovdqa %xmm9, %xmm9");\n'
    assert source.count(call) == 1
    (tmp_path / "avx_pair.c").write_text(source.replace(call, call + loss))
    shutil.copy(linux_guest.SOURCES / "user.h", tmp_path)
    monkeypatch.setattr(programs, "HERE", tmp_path)
    programs.compile_program("avx_pair", tmp_path / "avx_pair")
    result = run(tmp_path / "avx_pair")
    expected = {1: "avx_pair: 100 of 300 rounds corrupt\n", 2: "avx_pair: no AVX\n"}
    assert result.stdout == expected[result.returncode]


@pytest.fixture
def written(compiled: Path, tmp_path: Path) -> tuple[Path, list[list[str]]]:
    """A folder that the writer was killed in after ten promises, and their lines."""
    with subprocess.Popen([compiled / "ext4_writer", tmp_path], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        lines = [writer.stdout.readline().split() for _ in range(10)]
        writer.kill()
    return tmp_path, lines


def verdicts(compiled: Path, *arguments: str | Path) -> list[str]:
    return run(compiled / "ext4_writer", "verify", *arguments).stdout.splitlines()


def test_the_writer_promises_what_it_wrote(written: tuple[Path, list[list[str]]]) -> None:
    """The CRC on the console is zlib's, of what the file holds behind its header of 24 bytes."""
    folder, lines = written
    assert [line[:2] for line in lines] == [["synced", str(number)] for number in range(1, 11)]
    for _, number, crc in lines:
        content = (folder / f"file.{int(number):06}").read_bytes()[24:]
        assert f"{zlib.crc32(content):08x}" == crc


def test_whole_torn_and_missing_files_are_told_apart(compiled: Path, written: tuple[Path, list[list[str]]]) -> None:
    folder, lines = written
    whole = [f"whole {number} {crc}" for _, number, crc in lines]
    assert verdicts(compiled, "10", folder) == [*whole, "verified 10 of 10"]
    changed = bytearray((folder / "file.000003").read_bytes())
    changed[-1] ^= 1
    (folder / "file.000003").write_bytes(changed)
    (folder / "file.000004").write_bytes((folder / "file.000004").read_bytes()[:-1])
    (folder / "file.000005").write_bytes((folder / "file.000005").read_bytes() + b"\0")
    (folder / "file.000006").write_bytes(b"")
    (folder / "file.000007").write_bytes((folder / "file.000008").read_bytes())
    (folder / "file.000009").unlink()
    torn = [f"torn {number}" for number in range(3, 8)]
    seen = verdicts(compiled, "10", folder)
    assert seen == [*whole[:2], *torn, whole[7], "missing 9", whole[9], "verified 4 of 10"]
    assert verdicts(compiled, folder)[-1] == "verified 3 of 8"


def test_the_writer_goes_on_behind_what_is_whole(compiled: Path, written: tuple[Path, list[list[str]]]) -> None:
    """A file that a cut left torn was never promised: it is written again."""
    folder, _ = written
    last = max(folder.glob("file.*"))
    last.write_bytes(b"")
    with subprocess.Popen([compiled / "ext4_writer", folder], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline().split()[1] == str(int(last.suffix[1:]))
        writer.kill()


def test_init_script_runs_in_a_guest_only() -> None:
    """It mounts, and it ends the machine: as any but the first process it does nothing. Tried up to its first act."""
    before, act, _ = (linux_guest.SOURCES / "init.sh").read_text().partition("\nexport PATH=")
    assert act
    result = subprocess.run(["sh"], input=before + "\necho on\n", capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (1, "")
    assert "only as the first process" in result.stderr


def test_initramfs_has_a_console_and_an_init(compiled: Path, tmp_path: Path) -> None:
    """Without /dev/console the kernel starts init deaf and dumb."""
    contents = {name: (compiled / name).read_bytes() for name in programs.PROGRAMS}
    entries: list[Any] = programs.user_space(b"busybox", contents)
    programs.make_initramfs(tmp_path / "archive", b"init", entries)
    found = {name: (mode, data) for name, mode, data, _ in unpacked((tmp_path / "archive").read_bytes())}
    assert found["init"] == (stat.S_IFREG | 0o755, b"init")
    assert stat.S_ISCHR(found["dev/console"][0])
    assert found["bin/sh"] == (stat.S_IFLNK | 0o777, b"busybox")
    assert found["bin/bench"][1] == contents["bench"]
    folders = [""] + [name for name, (mode, _) in found.items() if stat.S_ISDIR(mode)]
    assert all(name.rpartition("/")[0] in folders for name in found)

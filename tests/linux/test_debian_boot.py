"""Debian's stock kernel: what can be told of it without a boot, a package, or a network. The boot is a make target."""

import os
import re
import subprocess
import sys
from pathlib import Path

import linux_guest
import pytest

from kvmpy.machine.boot.linux import COMMAND_LINE_SIZE

image, initramfs, milestones, words, boot = (
    linux_guest.module(f"debian_{name}") for name in ("image", "initramfs", "milestones", "words", "boot")
)


def module_file(*needs: str) -> bytes:
    return b"\x7fELF...\0license=GPL\0depends=" + ",".join(needs).encode() + b"\0retpoline=Y\0"


MODULES = {
    "virtio": module_file(),
    "virtio_ring": module_file(),
    "virtio_mmio": module_file("virtio", "virtio_ring"),
    "virtio_rng": module_file("virtio-ring", "virtio"),
    "unused": module_file("virtio"),
}


def test_module_comes_behind_what_it_needs() -> None:
    order = image.in_order(["virtio_rng", "virtio_mmio", "ext4"], MODULES, built_in=["ext4"])
    assert order == ["virtio_ring", "virtio", "virtio_rng", "virtio_mmio"]


def test_module_that_is_nowhere_is_named() -> None:
    with pytest.raises(SystemExit, match="no ext4"):
        image.in_order(["virtio_mmio", "ext4"], MODULES)


def test_modules_that_need_one_another_end() -> None:
    circle = {"a": module_file("b"), "b": module_file("a")}
    with pytest.raises(SystemExit, match="a b a"):
        image.in_order(["a"], circle)


def test_kernel_is_what_the_meta_package_depends_on() -> None:
    assert image.image_name("linux-image-6.1.0-56-cloud-amd64 (= 6.1.192-2)") == "linux-image-6.1.0-56-cloud-amd64"
    with pytest.raises(SystemExit, match="depends on 'libc6'"):
        image.image_name("libc6")


def package(target: Path) -> Path:
    """Write a package as small as `image.unpack` can take: skips where there is no dpkg-deb."""
    tree = target.with_suffix("")
    lib = tree / "lib/modules/6.1.0-1-cloud-amd64"
    files = {
        tree / "DEBIAN/control": b"Package: k\nVersion: 1\nArchitecture: all\nMaintainer: k <k@k>\nDescription: k\n",
        tree / "boot/vmlinuz-6.1.0-1-cloud-amd64": b"kernel",
        lib / "modules.builtin": b"kernel/fs/ext4/ext4.ko\nkernel/crypto/crc32c_generic.ko\n",
        **{lib / f"kernel/{name.replace('_', '-')}.ko": data for name, data in MODULES.items()},
    }
    for path, data in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    try:
        subprocess.run(["dpkg-deb", "--root-owner-group", "--build", tree, target], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("dpkg-deb is not installed")
    return target


def test_package_gives_kernel_and_modules(tmp_path: Path) -> None:
    got = image.unpack(package(tmp_path / "k.deb"), ["virtio_mmio", "ext4"])
    assert got.release == "6.1.0-1-cloud-amd64"
    assert got.vmlinuz == b"kernel"
    assert got.modules == {name: MODULES[name] for name in ("virtio", "virtio_ring", "virtio_mmio")}


def test_initramfs_has_the_modules_in_their_order() -> None:
    modules = {name: MODULES[name] for name in ("virtio_ring", "virtio", "virtio_mmio")}
    entries = {entry.name: entry for entry in initramfs.entries(b"busybox", modules)}
    assert entries["modules/order"].data == b"virtio_ring.ko\nvirtio.ko\nvirtio_mmio.ko\n"
    assert {name: entries[f"modules/{name}.ko"].data for name in modules} == modules
    assert entries["bin/busybox"].data == b"busybox"
    names = list(entries)
    assert all(os.path.dirname(name) in ("", *names[: names.index(name)]) for name in names)
    assert initramfs.archive(b"busybox", modules).startswith(b"070701")


def test_init_is_a_script_that_a_shell_takes() -> None:
    subprocess.run(["sh", "-n", initramfs.INIT], check=True)


RECORDED = """\
   16.40 [    0.000000] Linux version 6.1.0-56-cloud-amd64 (debian-kernel@lists.debian.org)
   50.12 [   33.684024] printk: console [ttyS0] enabled
  180.01 [   94.581044] NET: Registered PF_INET protocol family
  240.00 [  150.000000] Run /init as init process
  241.50 init: the first process
  241.60
"""


def recorded() -> list[object]:
    pairs = (re.fullmatch(r" *([\d.]+) ?(.*)", line) for line in RECORDED.splitlines())
    return [milestones.Line(float(pair[1]), pair[2]) for pair in pairs if pair]


def test_milestones_are_read_off_the_console() -> None:
    progress = milestones.progress_of(recorded())
    assert progress.reached == {
        "first byte": 16.40,
        "console enabled": 50.12,
        "drivers": 180.01,
        "kernel done": 240.00,
        "init": 241.50,
    }
    assert progress.last.text == "init: the first process"
    assert re.search(r"^init +241\.5 s$", progress.report(), re.MULTILINE)
    assert re.search(r"^shell +-$", progress.report(), re.MULTILINE)
    assert progress.report().endswith("last line, at 241.5 s: init: the first process")


def test_milestones_of_init_are_what_init_says() -> None:
    script = initramfs.INIT.read_text()
    for name in ("init", "disk mounted", "shell"):
        assert re.search(milestones.MILESTONES[name], script), name


def test_watch_keeps_the_console_and_the_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = "import sys; print('[1.0] printk: console [ttyS0] enabled\\nRun /init as'); sys.exit(7)"
    status, progress = boot.watch([sys.executable, "-c", script], tmp_path / "console.txt")
    assert status == 7
    assert list(progress.reached) == ["first byte", "console enabled"]
    assert (tmp_path / "console.txt").read_text().endswith(" Run /init as\n")
    assert "console enabled" in capsys.readouterr().out


@pytest.mark.parametrize("slow", [False, True])
def test_command_line_fits_and_each_word_has_a_reason(slow: bool) -> None:
    """With what `kvmpy.pc.linux` adds: at most 100 bytes."""
    line = words.command_line(slow=slow, command=boot.LOOK_AROUND)
    assert len(line) < COMMAND_LINE_SIZE - 100
    assert line.startswith("console=ttyS0 ")
    assert line.endswith(f" -- {boot.LOOK_AROUND}")
    assert ("initcall_blacklist=" in line) == slow
    assert all(word.why for word in words.words(slow=slow))
    assert len(words.explained(slow=slow).splitlines()) >= len(words.words(slow=slow))


def test_hidden_features_leave_room_for_those_of_the_host() -> None:
    """Linux reads 127 characters of clearcpuid=, and kvmpy puts up to four numbers before ours."""
    assert len(",".join(map(str, words.FEATURES))) + len("534,150,197,291,319,") < 127

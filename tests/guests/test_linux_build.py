"""guests/linux/build.py: fragments that hold, packages that are what they claim, nothing half that looks finished."""

import itertools
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import linux_guest
import pytest

debian = linux_guest.module("debian")
kernel = linux_guest.module("kernel")
build = linux_guest.module("build")

FRAGMENTS = sorted({name for names in kernel.VARIANTS.values() for name in names})

# --- fragments --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FRAGMENTS)
def test_every_option_has_its_reason_above_it(name: str) -> None:
    """A fragment is a text: no option without a comment of its own."""
    lines = kernel.fragment(name).read_text().splitlines()
    for above, line in itertools.pairwise(["", *lines]):
        if line.startswith("CONFIG_"):
            assert re.fullmatch(r'CONFIG_[A-Z0-9_]+=(y|n|\d+|"[\w-]*")', line)
            assert re.match(r"# (?!---|CONFIG_)", above), line
        else:
            assert re.fullmatch(r"(#( .*)?)?", line)


@pytest.mark.parametrize("name", FRAGMENTS)
def test_no_option_stands_twice_in_a_fragment(name: str) -> None:
    names = re.findall(r"^(CONFIG_\w+)=", kernel.fragment(name).read_text(), re.MULTILINE)
    assert len(names) == len(set(names)) > 0


def test_a_later_fragment_overrides() -> None:
    """The full kernel is the fast one and more."""
    assert kernel.wanted("")["CONFIG_LOCALVERSION"] == '"-fast"'
    assert kernel.wanted("-full")["CONFIG_LOCALVERSION"] == '"-full"'
    assert kernel.wanted("-full")["CONFIG_SMP"] == "y"
    assert "CONFIG_SMP" not in kernel.wanted("")


def test_an_option_that_the_source_drops_is_seen() -> None:
    """Kconfig drops silently what lacks another option; the build does not."""
    asked = kernel.options("CONFIG_A=y\nCONFIG_B=y\nCONFIG_C=n\nCONFIG_D=17\nCONFIG_E=n\n")
    built = kernel.options("# CONFIG_A is not set\nCONFIG_D=14\nCONFIG_E=y\n# a remark\n")
    assert kernel.dropped(asked, built) == ["CONFIG_A=y", "CONFIG_B=y", "CONFIG_D=17", "CONFIG_E=n"]
    assert kernel.dropped(asked, asked) == []


@pytest.mark.parametrize("variant", kernel.VARIANTS)
def test_built_kernel_has_every_option_of_its_fragments(variant: str) -> None:
    """What ``make linux-guest`` left in build/linux, if it did, is what the fragments say."""
    group = next(group for group in build.kernel_groups(build.OUTPUT) if group.name == f"kernel{variant}")
    if build.is_finished(group, build.OUTPUT):
        config = (build.OUTPUT / f"config{variant}").read_text()
        assert kernel.dropped(kernel.wanted(variant), kernel.options(config)) == []
        assert (build.OUTPUT / f"bzImage{variant}").read_bytes()[0x202:0x206] == b"HdrS"
        # The ELF note with the PVH entry: owner "Xen", 4 or 8 bytes, type 18.
        note = rb"\x04\0\0\0[\x04\x08]\0\0\0\x12\0\0\0Xen\0"
        assert re.search(note, (build.OUTPUT / f"vmlinux{variant}").read_bytes())


# --- packages ---------------------------------------------------------------------------------------------------

CONTENT = b"a package"


def package(version: str = "1:1.0-1", content: bytes = CONTENT) -> Any:
    return debian.Package(debian.hashlib.sha256(content).hexdigest(), "guest-source", version, "all")


def leaving(content: bytes) -> Callable[[Any, Path], None]:
    """Return a download that leaves ``content`` under apt's name."""
    return lambda wanted, folder: (folder / wanted.file_name).write_bytes(content) and None


def refusing(wanted: Any, folder: Path) -> None:
    pytest.fail(f"{wanted.file_name} was fetched")


def test_a_download_is_kept_and_not_repeated(tmp_path: Path) -> None:
    path = debian.fetch(package(), tmp_path, get=leaving(CONTENT))
    assert (path.name, path.read_bytes()) == ("guest-source_1%3a1.0-1_all.deb", CONTENT)
    assert debian.fetch(package(), tmp_path, get=refusing) == path
    assert list(tmp_path.iterdir()) == [path]


def test_a_wrong_checksum_is_refused(tmp_path: Path) -> None:
    """Nothing of it is kept: the next build cannot take it either."""
    with pytest.raises(SystemExit, match=r"guest-source_1%3a1\.0-1_all\.deb: its sha256 is \w{64}, expected \w{64}"):
        debian.fetch(package(), tmp_path, get=leaving(b"another package"))
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_was_damaged_is_fetched_again(tmp_path: Path) -> None:
    path = debian.fetch(package(), tmp_path, get=leaving(CONTENT))
    path.write_bytes(CONTENT[:-1])
    assert debian.fetch(package(), tmp_path, get=leaving(CONTENT)).read_bytes() == CONTENT


def test_an_interrupted_download_leaves_nothing(tmp_path: Path) -> None:
    def cut(wanted: Any, folder: Path) -> None:
        (folder / wanted.file_name).write_bytes(CONTENT[:3])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        debian.fetch(package(), tmp_path, get=cut)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A table of ours that names `package`."""
    path = tmp_path / "packages.sha256"
    ours = package()
    path.write_text(f"{ours.sha256}  {ours.name} {ours.version} {ours.architecture}\n")
    return path


@pytest.mark.parametrize("versions", [["1:1.0-2", "1:1.0-1"], []])
def test_our_version_is_taken_while_apt_has_it(tmp_path: Path, table: Path, versions: list[str]) -> None:
    """And where apt knows nothing: the download then says so."""
    offers = [package(version) for version in versions]
    assert debian.choose("guest-source", tmp_path, table=table, offers=lambda name: offers) == package()


def test_a_newer_version_is_taken_with_the_checksum_of_apt(
    tmp_path: Path, table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Debian keeps no old versions for ever."""
    newer = package("1:1.0-2", b"a newer package")
    assert debian.choose("guest-source", tmp_path, table=table, offers=lambda name: [newer]) == newer
    assert "no longer has 1:1.0-1; 1:1.0-2 is taken" in capsys.readouterr().out


def test_a_file_of_our_version_is_enough(tmp_path: Path, table: Path) -> None:
    """What lies here needs no apt."""
    (tmp_path / package().file_name).write_bytes(CONTENT)
    assert debian.choose("guest-source", tmp_path, table=table, offers=refusing) == package()


def test_two_checksums_for_one_version_are_refused(tmp_path: Path, table: Path) -> None:
    offers = [package(content=b"another package")]
    with pytest.raises(SystemExit, match=r"guest-source 1:1\.0-1: apt's lists say sha256"):
        debian.choose("guest-source", tmp_path, table=table, offers=lambda name: offers)


def test_our_table_names_every_package() -> None:
    for name in (kernel.SOURCE, "busybox-static"):
        assert re.fullmatch(r"[0-9a-f]{64}", debian.pinned(name).sha256)


# --- groups of files --------------------------------------------------------------------------------------------


def writing(files: dict[str, bytes]) -> Callable[[Path], None]:
    def make(scratch: Path) -> None:
        for name, content in files.items():
            (scratch / name).write_bytes(content)

    return make


def group(name: str = "kernel", made_from: str = "0123", files: dict[str, bytes] | None = None) -> Any:
    files = files or {"vmlinux": b"kernel", "config": b"options"}
    return build.Group(name, tuple(files), made_from, writing(files))


def test_a_group_is_finished_once_it_was_made(tmp_path: Path) -> None:
    assert not build.is_finished(group(), tmp_path)
    build.finish(group(), tmp_path)
    assert build.is_finished(group(), tmp_path)
    sums = (tmp_path / "SHA256SUMS").read_text()
    assert f"{debian.hashlib.sha256(b'kernel').hexdigest()}  vmlinux\n" in sums
    assert not build.is_finished(group(made_from="4567"), tmp_path)


@pytest.mark.parametrize("harm", [lambda path: path.write_bytes(b"Kernel"), Path.unlink])
def test_a_harmed_file_is_made_again(tmp_path: Path, harm: Callable[[Path], Any]) -> None:
    """The checksums are held against the files on each use."""
    build.finish(group(), tmp_path)
    harm(tmp_path / "vmlinux")
    assert not build.is_finished(group(), tmp_path)
    build.finish(group(), tmp_path)
    assert build.is_finished(group(), tmp_path)


def test_an_interrupted_build_is_not_finished(tmp_path: Path) -> None:
    """The files of the one before stay whole, but are not taken for what was asked for."""

    def cut(scratch: Path) -> None:
        (scratch / "vmlinux").write_bytes(b"ker")
        raise KeyboardInterrupt

    build.finish(group(), tmp_path)
    newer = build.Group("kernel", ("vmlinux", "config"), "4567", cut)
    with pytest.raises(KeyboardInterrupt):
        build.finish(newer, tmp_path)
    assert not build.is_finished(newer, tmp_path)
    assert not build.is_finished(group(), tmp_path)
    assert (tmp_path / "vmlinux").read_bytes() == b"kernel"


@pytest.mark.parametrize("cut_at", range(5))
def test_a_build_cut_between_two_files_is_not_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut_at: int
) -> None:
    """Each move of a file may be the last: old and new side by side are no group. The next build makes it whole."""
    build.finish(group(), tmp_path)
    build.finish(group("other", files={"init": b"program"}), tmp_path)
    newer = group(made_from="4567", files={"vmlinux": b"a newer kernel", "config": b"options"})
    moves = itertools.count()
    replace = os.replace

    def cut(source: Path, target: Path) -> None:
        if next(moves) == cut_at:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", cut)
        with pytest.raises(KeyboardInterrupt):
            build.finish(newer, tmp_path)
    assert not build.is_finished(newer, tmp_path)
    assert build.is_finished(group("other", files={"init": b"program"}), tmp_path)
    build.finish(newer, tmp_path)
    assert build.is_finished(newer, tmp_path)


def test_what_is_finished_is_not_made_again(tmp_path: Path) -> None:
    build.finish(group(), tmp_path)
    build.build_all([group()._replace(make=refusing)], tmp_path)


def test_missing_tools_are_named_in_one_line() -> None:
    """With the one command that installs them."""
    tools = {"gcc": "gcc", "no-such-tool": "some-package", "nor-this": "some-package"}
    line = build.missing(tools, {"no/such/header.h": "some-header"})
    assert line == "missing: some-package some-header -- install with: sudo apt install some-package some-header"
    assert build.missing({"gcc": "gcc"}, {"stdlib.h": "libc6-dev"}) is None

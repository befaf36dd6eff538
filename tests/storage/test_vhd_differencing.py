"""Differencing VHDs: read through their parents, which must be the ones they were made of."""

import os
import struct

import pytest
from vhd_files import CHILD, PARENT, TABLE, dynamic, fixed, footer, read_disk

from kvmpy.errors import DiskError, VhdFormatError
from kvmpy.storage.convert import check_disk, disk_info
from kvmpy.storage.disk import DiskImage
from kvmpy.storage.open import open_disk
from kvmpy.storage.vhd import DiskType, DynamicHeader

SIZE = 4 * 4096
BASE = b"".join(bytes([65 + sector]) * 512 for sector in range(SIZE // 512))
LENGTH = TABLE + 3 * 512
"""Bytes of a child that has no block: the table, the path of its parent and the footer follow the headers."""
STAMP = footer(SIZE, DiskType.FIXED).timestamp


def header(**fields) -> DynamicHeader:
    """Return what a child says of its parent, as it is right."""
    return DynamicHeader(0, 0, 0, parent_unique_id=PARENT, parent_timestamp=STAMP)._replace(**fields)


def child(blocks=None, *, paths=((b"W2ru", "base.vhd"),), size=SIZE, unique_id=CHILD, **fields) -> bytes:
    """Return a differencing VHD of ``base.vhd`` beside it, unless ``paths`` or ``fields`` say otherwise."""
    return dynamic(size, blocks or {}, parent=header(**fields), paths=paths, unique_id=unique_id)


@pytest.fixture
def base(tmp_path):
    path = tmp_path / "base.vhd"
    path.write_bytes(fixed(BASE, PARENT))
    return path


@pytest.fixture
def put(tmp_path):
    """Return a function that writes a differencing VHD and returns its path."""

    def put(content: bytes, name: str = "child.vhd"):
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    return put


def opened(path) -> DiskImage:
    return open_disk(path, format="vhd", readonly=True)


def test_what_the_child_does_not_have_is_read_from_the_parent(base, put):
    """Unallocated blocks, and sectors whose bit is 0, are the parent's."""
    path = put(child({1: ("1" * 8, b"x" * 4096), 2: ("10100000", b"y" * 4096)}))
    y = b"y" * 512
    with opened(path) as disk:
        assert disk.size == SIZE
        assert read_disk(disk) == BASE[:4096] + b"x" * 4096 + y + BASE[8704:9216] + y + BASE[9728:]
        assert not any(extent.writable for extent in disk.map(0, SIZE // 512, write=False))
        assert read_disk(disk, 15, 3) == b"x" * 512 + y + BASE[8704:9216]


@pytest.mark.parametrize("parent_size", [512, 4096, 4096 + 512, 2 * SIZE])
def test_behind_the_end_of_a_smaller_parent_are_zeros(tmp_path, put, parent_size):
    data = (BASE * 2)[:parent_size]
    (tmp_path / "base.vhd").write_bytes(fixed(data, PARENT))
    path = put(child({3: ("1" * 8, b"x" * 4096)}))
    with opened(path) as disk:
        assert read_disk(disk) == data.ljust(SIZE, b"\0")[: SIZE - 4096] + b"x" * 4096


@pytest.mark.parametrize("parent", ["fixed", "dynamic", "differencing"])
def test_parent_may_be_of_any_kind(base, put, tmp_path, parent):
    if parent == "dynamic":
        base.write_bytes(dynamic(SIZE, {0: ("1" * 8, BASE[:4096])}, unique_id=PARENT))
    elif parent == "differencing":
        base.rename(tmp_path / "root.vhd")
        put(child({0: ("11110000", BASE[:4096])}, paths=[(b"W2ru", "root.vhd")], unique_id=PARENT), "base.vhd")
    path = put(child({1: ("1" * 8, b"x" * 4096)}))
    with opened(path) as disk:
        rest = bytes(2 * 4096) if parent == "dynamic" else BASE[8192:]
        assert read_disk(disk) == BASE[:4096] + b"x" * 4096 + rest
        depth = len(os.listdir("/proc/self/fd"))
    assert len(os.listdir("/proc/self/fd")) < depth


def test_it_is_only_read(base, put):
    path = put(child())
    with pytest.raises(DiskError, match="a differencing VHD is only read: export it"):
        open_disk(path, format="vhd")
    with opened(path) as disk:
        for change in (lambda: disk.map(0, 1, write=True), lambda: disk.zero(0, 1)):
            with pytest.raises(DiskError, match="is open read-only"):
                change()
    with pytest.raises(DiskError, match="is a differencing VHD, not a dynamic one"):
        open_disk(path, format="vhd-dynamic", readonly=True)


def test_its_footer_must_be_at_the_end(base, put):
    """The copy does not count: in what was a fixed VHD, a guest could have written it to name somebody's disk."""
    path = put(child()[:-512])
    for format in ("vhd", "vhd-dynamic"):
        with pytest.raises(VhdFormatError, match="no VHD footer here"):
            open_disk(path, format=format, readonly=True)


# --- finding the parent ---


@pytest.mark.parametrize(
    "paths",
    [
        [(b"W2ru", ".\\base.vhd")],
        [(b"W2ru", "nowhere\\..\\missing.vhd"), (b"W2ru", "base.vhd")],
        [(b"W2ku", "C:\\machines\\base.vhd")],
        [(b"W2ku", "{folder}/base.vhd")],
        [(b"Wi2r", "other.vhd"), (b"W2ru", "base.vhd\0\0junk")],
        [(b"W2ku", "{folder}/stranger.vhd"), (b"W2ru", "sub\\..\\base.vhd")],
    ],
)
def test_parent_is_found_by_its_locators(base, put, tmp_path, paths):
    (tmp_path / "sub").mkdir()
    (tmp_path / "stranger.vhd").write_bytes(fixed(BASE, b"somebody else..."))
    locators = [(code, path.format(folder=tmp_path)) for code, path in paths]
    with opened(put(child(paths=locators))) as disk:
        assert read_disk(disk) == BASE


def test_parent_is_found_by_its_name(base, put):
    with opened(put(child(paths=(), parent_name="D:\\base.vhd"))) as disk:
        assert read_disk(disk) == BASE


def test_path_counts_from_the_childs_folder_not_ours(base, put, tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    path = put(child(paths=[(b"W2ru", "..\\base.vhd")]), "sub/child.vhd")
    monkeypatch.chdir("/")
    with opened(path) as disk:
        assert read_disk(disk) == BASE
    monkeypatch.chdir(tmp_path / "sub")
    with opened("child.vhd") as disk:
        assert read_disk(disk) == BASE


def refused(path, message: str) -> int | None:
    """Return the offset that the refusal names; nothing stays open."""
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(DiskError, match=message) as caught:
        opened(path)
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert check_disk(str(path), format="vhd") == [str(caught.value)]
    return caught.value.offset


def test_missing_parent_is_told_with_where_it_was_looked_for(put, tmp_path):
    path = put(child())
    assert refused(path, f"its parent is missing: '{tmp_path}/base.vhd'") == 512 + 576
    assert disk_info(str(path), format="vhd")["format"] == "vhd-differencing"


def test_child_that_names_no_parent_is_refused(put):
    assert refused(put(child(paths=())), "its parent is missing: it names none") == 512 + 576


def test_parent_of_another_identity_is_refused(base, put):
    base.write_bytes(fixed(BASE, b"somebody else..."))
    assert refused(put(child()), "its parent has another identity") == 512 + 40


def test_parent_that_was_changed_is_refused(base, put):
    """Its time stamp, of the footer or of the file, must be the one that the child has written down."""
    path = put(child(parent_timestamp=STAMP + 1))
    assert refused(path, "base.vhd was changed: the time stamp is 0x4d2, and 0x") == 512 + 56
    os.utime(base, (0, 946684800 + STAMP + 1))
    opened(path).close()


def test_damaged_parent_is_refused_with_its_own_offset(base, put):
    content = bytearray(base.read_bytes())
    content[-1] ^= 1
    base.write_bytes(content)
    assert refused(put(child()), "base.vhd: the checksum of the footer") == SIZE + 64


@pytest.mark.timeout(10)
@pytest.mark.parametrize("kind", ["FIFO", "folder", "character device"])
def test_parent_that_is_no_file_is_refused_without_being_opened(put, tmp_path, kind):
    if kind == "FIFO":
        os.mkfifo(tmp_path / "base.vhd")
    elif kind == "folder":
        (tmp_path / "base.vhd").mkdir()
    path = put(child(paths=[(b"W2ku", "/dev/zero")] if kind == "character device" else [(b"W2ru", "base.vhd")]))
    assert refused(path, "its parent .*: is a (FIFO|directory|character device): a regular file is wanted") == 512 + 576


def test_disk_that_is_its_own_parent_is_refused(put):
    path = put(child(paths=[(b"W2ru", "child.vhd")], unique_id=PARENT))
    assert refused(path, "its parents are a circle") == 512 + 576


def test_circle_of_parents_is_refused(put):
    put(child(paths=[(b"W2ru", "b.vhd")], unique_id=PARENT), "a.vhd")
    path = put(child(paths=[(b"W2ru", "a.vhd")], unique_id=PARENT), "b.vhd")
    refused(path, "its parents are a circle")


def test_chain_of_parents_has_a_bound(base, put):
    for number in range(40):
        below = f"{number - 1}.vhd" if number else "base.vhd"
        put(child({0: ("0" * 8, bytes(4096))}, paths=[(b"W2ru", below)], unique_id=PARENT), f"{number}.vhd")
    refused(put(child(paths=[(b"W2ru", "39.vhd")])), "more than 32 parents")
    with opened(put(child(paths=[(b"W2ru", "30.vhd")]))) as disk:
        assert read_disk(disk) == BASE


@pytest.mark.parametrize(
    ("length", "offset"), [(20, 2**63), (20, 0), (20, 511), (2**32 - 1, TABLE), (0xFFFF, TABLE), (20, LENGTH - 19)]
)
def test_locator_outside_the_file_is_refused(put, length, offset):
    content = bytearray(child())
    struct.pack_into(">II4xQ", content, 512 + 576 + 4, 512, length, offset)
    content[512 + 36 : 512 + 40] = bytes(4)
    content[512 + 36 : 512 + 40] = (~sum(content[512:1536]) & 0xFFFFFFFF).to_bytes(4, "big")
    assert len(content) == LENGTH
    assert refused(put(bytes(content)), f"the path of its parent is at 0x{offset:x}, {length} bytes") == 512 + 576


def test_info_tells_the_parent_without_opening_it(put):
    info = disk_info(str(put(child({1: ("1" * 8, bytes(4096))}, parent_name="base.vhd"))), format="vhd")
    assert (info["parent"], info["parent_unique_id"], info["blocks"]) == ("base.vhd", PARENT.hex(), 1)

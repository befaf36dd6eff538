"""open_disk: what a disk is, is said."""

import errno
import os
import socket
from contextlib import contextmanager

import pytest
from vhd_files import dynamic, fixed, read_disk

from kvmpy.errors import DiskError
from kvmpy.storage import files
from kvmpy.storage.blob import PageBlob
from kvmpy.storage.open import open_disk
from kvmpy.units import MiB

NOBODY = 65534


@pytest.fixture
def raw(tmp_path):
    file = tmp_path / "disk"
    file.write_bytes(b"guest" + bytes(1019))
    return file


def test_format_of_a_file_is_never_guessed(raw):
    with pytest.raises(DiskError, match=r"disk: say what it is: format=raw or format=vhd"):
        open_disk(raw)


def test_guests_bytes_do_not_make_a_raw_disk_anything_else(tmp_path):
    """A guest can write any header to its disk: said to be raw, it stays raw."""
    file = tmp_path / "disk"
    file.write_bytes(dynamic(4096, {}))
    with open_disk(file, format="raw") as disk:
        assert disk.size == os.path.getsize(file)
        assert read_disk(disk)[:8] == b"conectix"


def test_guests_bytes_do_not_make_a_fixed_vhd_dynamic(tmp_path):
    """The first sector of a fixed VHD is the guest's: the footer at the end decides."""
    file = tmp_path / "disk"
    forged = dynamic(4096, {0: ("1" * 8, b"secret".ljust(4096))})
    file.write_bytes(fixed(forged))
    with open_disk(file, format="vhd") as disk:
        assert read_disk(disk) == forged


@pytest.mark.parametrize("kind", ["fixed", "dynamic"])
def test_kind_of_a_vhd_can_be_insisted_on(tmp_path, kind):
    file = tmp_path / "disk"
    file.write_bytes(fixed(bytes(4096)) if kind == "fixed" else dynamic(4096, {}))
    other = {"fixed": "dynamic", "dynamic": "fixed"}[kind]
    open_disk(file, format="vhd").close()
    open_disk(file, format=f"vhd-{kind}").close()
    with pytest.raises(DiskError, match=f"is a {kind} VHD, not a {other} one"):
        open_disk(file, format=f"vhd-{other}")
    open_disk(file, format="vhd").close()  # the refusal gave the lock up


@pytest.mark.parametrize("format", ["raw", "vhd", "vhd-fixed", "blob", None])
def test_missing_file_is_a_disk_error(tmp_path, format):
    with pytest.raises(DiskError, match="none: No such file or directory"):
        open_disk(tmp_path / "none", format=format)


@pytest.mark.parametrize("format", ["raw", "vhd"])
@pytest.mark.parametrize("kind", ["FIFO", "socket", "character device"])
def test_what_is_no_file_is_refused_without_being_opened(tmp_path, kind, format):
    path = str(tmp_path / "it")
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path)
    else:
        path = "/dev/zero"
    with pytest.raises(DiskError, match=f"is a {kind}: a regular file is wanted"):
        open_disk(path, format=format)


def test_folder_is_a_blob_and_a_file_is_none(tmp_path, raw):
    with pytest.raises(DiskError, match="is a folder: a disk of format=raw is a file"):
        open_disk(tmp_path, format="raw")
    with pytest.raises(DiskError, match="is no page blob, which is a folder"):
        open_disk(raw, format="blob")
    with pytest.raises(DiskError):
        open_disk(tmp_path)


def test_unknown_format_is_the_callers_mistake(raw):
    with pytest.raises(ValueError, match="'qcow2' is no disk format: allowed are blob, raw, vhd, vhd-fixed"):
        open_disk(raw, format="qcow2")


@contextmanager
def as_nobody():
    """Be a user who may read what everybody may, where we are root, to whom nothing is forbidden."""
    user = os.geteuid()
    os.seteuid(NOBODY if user == 0 else user)
    try:
        yield
    finally:
        os.seteuid(user)


def test_unreadable_file_is_a_disk_error(in_memory):
    in_memory.chmod(0o755)
    file = in_memory / "disk"
    file.write_bytes(bytes(1024))
    with as_nobody():
        open_disk(file, format="raw", readonly=True).close()
    file.chmod(0)
    with as_nobody(), pytest.raises(DiskError, match="Permission denied"):
        open_disk(file, format="raw", readonly=True)


def test_nobody_writes_into_a_page_blob_behind_its_back(tmp_path):
    """A layer is a plain file, shared with copies perhaps: writing it needs the blob's lease, so the blob."""
    PageBlob.create(tmp_path / "a.blob", MiB).close()
    (layer,) = (tmp_path / "a.blob").glob("*.layer")
    (tmp_path / "link").symlink_to(layer)
    for path in (layer, tmp_path / "link"):
        with pytest.raises(DiskError, match="is a part of the page blob"):
            open_disk(path, format="raw")
    open_disk(layer, format="raw", readonly=True).close()


def test_blob_that_the_host_refuses_is_a_disk_error_with_its_path(tmp_path, monkeypatch):
    """A full host, say: opening for writing makes a new journal."""
    PageBlob.create(tmp_path / "a.blob", MiB).close()

    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "create", refuse)
    with pytest.raises(DiskError, match=r"a\.blob: No space left on device"):
        open_disk(tmp_path / "a.blob")

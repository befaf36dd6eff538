"""Damaged and hostile metadata, one wrong thing at a time: a BlobError that names file and offset."""

import json
import os
import shutil
from struct import pack

import pytest
from blob_damage import fields_of, journal_of, sealed, text_size, with_text
from blob_engine import pages

from kvmpy.errors import BlobError
from kvmpy.storage.blob import PageBlob
from kvmpy.storage.blob_check import check
from kvmpy.storage.blob_journal import RECORD_SIZE, Change, Kind, encode_record
from kvmpy.storage.blob_layer import Folder, Layer
from kvmpy.storage.blob_meta_file import HEADER
from kvmpy.units import MiB


@pytest.fixture
def damaged(original, in_memory):
    return shutil.copytree(original, in_memory / "damaged")


def refused(path, match: str | None = None) -> BlobError:
    """Return the error with which the blob is refused, by everybody, and which names file and offset."""
    with pytest.raises(BlobError, match=match) as found:
        PageBlob.open(path, readonly=True)
    with pytest.raises(BlobError, match=match):
        PageBlob.open(path)
    assert check(path) != []
    assert found.value.offset is not None
    assert found.value.path.startswith(f"{path}/")
    return found.value


# --- the text ---


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("size", (0, 1, -512, 2**50, "512", True, 512.0)),
        ("content_format", ("vhdx", 1, None)),
        ("etag", ('"0xg"', '"0x-1"', '"0x1_0"', '"0x' + "F" * 32 + '"', 5, None)),
        ("created", ("yesterday", "9999-99-99T00:00:00.0000000Z", 1, None)),
        ("sequence_number", (-1, 2**63, "1", None)),
        ("layers", ([], ["../../etc/passwd"], ["../" + "0" * 29 + ".layer"], [1], ["0" * 32 + ".layer"] * 2, {}, None)),
        ("active", (-1, 99, None)),
        ("runs", (0, -1, 4, 1000, 10**9, 10**30, None)),
        ("snapshots", ({}, [1], [{}], None)),
        ("generation", (0, -1, 2**63, None)),
    ],
)
def test_wrong_value_is_refused_where_it_stands(damaged, key, values):
    """A sound CRC says that the file is as somebody wrote it, not who that was."""
    meta = (damaged / "meta").read_bytes()
    for value in values:
        changed = with_text(meta, lambda fields, value=value: fields.__setitem__(key, value))
        (damaged / "meta").write_bytes(changed)
        expected = {"runs": None, "snapshots": None, "layers": "layers is no list|named twice"}.get(key, key)
        error = refused(damaged, expected)
        assert error.offset >= HEADER.size
    (damaged / "meta").write_bytes(with_text(meta, lambda fields: fields.pop(key) and None))
    refused(damaged)


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"{", b'{"a": 1' + b"0" * 5000 + b"}", b"[" * 100_000, b"\xff{}", b'{"size": 1e999}', b"null"]
)
def test_text_that_is_no_json_of_ours_is_refused(damaged, text):
    (damaged / "meta").write_bytes(with_text((damaged / "meta").read_bytes(), lambda _: text))
    refused(damaged)


def test_layer_that_is_named_twice_is_refused(damaged):
    """It would be frozen and written."""

    def change(fields):
        fields["layers"][1] = fields["layers"][0]

    (damaged / "meta").write_bytes(with_text((damaged / "meta").read_bytes(), change))
    refused(damaged, "a layer is named twice")


def test_text_that_is_too_long_is_not_read(damaged):
    """Sound as it is: a few megabytes of JSON can be gigabytes of objects."""
    meta = (damaged / "meta").read_bytes()
    (damaged / "meta").write_bytes(with_text(meta, lambda fields: json.dumps(fields).encode() + b" " * 5 * MiB))
    refused(damaged, "bytes of text")


def test_snapshot_in_the_layer_that_is_written_is_refused(damaged):
    def change(fields):
        fields["active"] = 1

    (damaged / "meta").write_bytes(with_text((damaged / "meta").read_bytes(), change))
    refused(damaged, "a snapshot's pages are in the layer that is written")


def test_snapshots_that_do_not_ascend_are_refused(damaged):
    def change(fields):
        fields["snapshots"][0]["id"] = fields["snapshots"][1]["id"]

    (damaged / "meta").write_bytes(with_text((damaged / "meta").read_bytes(), change))
    refused(damaged, "do not ascend")


# --- the maps ---


@pytest.mark.parametrize(
    ("at", "value", "complaint"),
    [
        (0, pack("<Q", 1), "does not begin with page 0"),
        (8, pack("<Q", 0), "does not begin behind"),
        (8, pack("<Q", 2**63), "does not begin behind|begins with page"),
        (16, pack("<Q", 2048), "begins with page 2048 of 2048"),
        (-4, pack("<I", 3), "there is no layer 3"),
        (-4, pack("<I", 2**32 - 1), "there is no layer"),
    ],
)
def test_map_that_is_none_is_refused_where_it_stands(damaged, at, value, complaint):
    """It covers each page once, in layers that there are."""
    meta = (damaged / "meta").read_bytes()
    maps = HEADER.size + text_size(meta)
    place = maps + at if at >= 0 else len(meta) + at
    changed = meta[:place] + value + meta[place + len(value) :]
    (damaged / "meta").write_bytes(sealed(changed[16:]))
    assert refused(damaged, complaint).offset >= maps


def test_header_is_checked(damaged):
    meta = (damaged / "meta").read_bytes()
    for changed, complaint, offset in (
        (b"", "truncated", 0),
        (meta[:31], "truncated", 31),
        (b"X" + meta[1:], "is not the metadata", 0),
        (meta[:8] + pack("<I", 2) + meta[12:], "version 2", 8),
        (meta[:-1], "in a file of", 16),
        (meta + b"\0", "in a file of", 16),
        (meta[:16] + pack("<Q", 2**64 - 1) + meta[24:], "in a file of", 16),
        (meta[:40] + b"!" + meta[41:], "the CRC is another", 12),
    ):
        (damaged / "meta").write_bytes(changed)
        assert refused(damaged, complaint).offset == offset


# --- the journal ---


def test_journal_that_a_power_cut_ended_is_read_up_to_there(damaged):
    """Incomplete, or zeros, or zeros and then others of the same writing."""
    journal = journal_of(damaged)
    whole = journal.read_bytes()
    seed = int(journal.name.removeprefix("journal-"))
    records = len(whole) // RECORD_SIZE
    touch = Change(Kind.TOUCH, 3 * 10**18, 0)
    with PageBlob.open(damaged, readonly=True) as blob:
        etag = blob.etag
    for tail in (b"", b"\1" * 31, bytes(32), bytes(5000), bytes(32) + encode_record(touch, records + 1, records, seed)):
        journal.write_bytes(whole + tail)
        with PageBlob.open(damaged, readonly=True) as blob:
            assert (blob.read(0, 512), blob.etag) == (pages("c"), etag)
    journal.write_bytes(whole[:-32])
    with PageBlob.open(damaged, readonly=True) as blob:
        assert blob.read(256 * 1024, 512) == pages("b")


def test_record_that_is_none_is_damage(damaged):
    """A bad CRC, a kind that there is not, another place, pages that are not there, an ETag that goes back."""
    journal = journal_of(damaged)
    whole = journal.read_bytes()
    seed = int(journal.name.removeprefix("journal-"))
    at = len(whole) // RECORD_SIZE
    sound = encode_record(Change(Kind.CLAIM, 0, 1), at, at, seed)
    for record, complaint in (
        (sound[:-1] + b"\0", "CRC"),
        (encode_record(Change(Kind.CLAIM, 0, 1), at, at, seed + 1), "CRC"),
        (encode_record(Change(3, 0, 1), at, at, seed), "kind 3"),
        (encode_record(Change(Kind.CLAIM, 0, 1), at + 1, at, seed), "not in its place"),
        (encode_record(Change(Kind.CLAIM, 0, 1), at, at + 1, seed), "not in its place"),
        (encode_record(Change(Kind.CLAIM, 2047, 2), at, at, seed), r"pages 2047\+2 of 2048"),
        (encode_record(Change(Kind.CLAIM, 2**64 - 1, 2**64 - 1), at, at, seed), "of 2048"),
        (encode_record(Change(Kind.CLAIM, 0, 0), at, at, seed), "of 2048"),
        (encode_record(Change(Kind.TOUCH, 1, 0), at, at, seed), "does not ascend"),
        (encode_record(Change(Kind.TOUCH, 2**64 - 1, 0), at, at, seed), "does not ascend"),
    ):
        journal.write_bytes(whole + record)
        assert refused(damaged, complaint).offset == len(whole)


def test_record_that_was_durable_and_is_missing_is_damage(damaged):
    """Later records tell: a power cut does not take what had been made durable before them."""
    journal = journal_of(damaged)
    whole = journal.read_bytes()
    journal.write_bytes(bytes(32) + whole[32:])
    assert refused(damaged, "missing that had been durable").offset == 0


def test_journal_that_is_missing_or_too_long_is_damage(damaged):
    journal = journal_of(damaged)
    os.truncate(journal, 2 * MiB)
    assert refused(damaged, "longer than").offset == 1 * MiB
    journal.unlink()
    refused(damaged, "is missing")


# --- the layers ---


def test_layer_that_is_missing_short_or_no_file_is_damage(damaged, tmp_path):
    """No symbolic link leads out of the folder, and a FIFO makes nobody wait."""
    layer = damaged / fields_of((damaged / "meta").read_bytes())["layers"][-1]
    secret = tmp_path / "secret"
    secret.write_bytes(b"s" * 1 * MiB)
    os.truncate(layer, 4096)
    assert refused(damaged, "the layer ends here").offset == 4096
    layer.unlink()
    refused(damaged, "the layer is missing")
    for make in (lambda: os.mkfifo(layer), lambda: layer.symlink_to(secret), lambda: layer.mkdir()):
        make()
        refused(damaged, "not a regular file")
        layer.rmdir() if layer.is_dir() and not layer.is_symlink() else layer.unlink()
    assert secret.read_bytes() == b"s" * 1 * MiB


def test_layer_is_opened_as_the_file_that_it_is(damaged, tmp_path):
    """Also when it became something else after it was looked at."""
    (tmp_path / "secret").write_bytes(b"s" * 1 * MiB)
    folder = Folder(os.open(damaged, os.O_RDONLY), str(damaged))
    name = next(damaged.glob("*.layer")).name
    (damaged / name).unlink()
    (damaged / name).symlink_to(tmp_path / "secret")
    with pytest.raises(BlobError, match="the layer is missing"):
        Layer(folder, name).read(0, 512)
    os.close(folder.fd)


def test_check_tells_all_that_is_wrong_with_the_layers(damaged):
    for layer in damaged.glob("*.layer"):
        layer.unlink()
    (damaged / "lock").unlink()
    problems = check(damaged)
    assert len(problems) == 4
    assert sum("the layer is missing (at offset 0x0)" in problem for problem in problems) == 3


@pytest.mark.parametrize("name", ["meta", "lock"])
def test_metadata_that_is_no_file_is_damage(damaged, name, tmp_path):
    (damaged / name).unlink()
    os.mkfifo(damaged / name)
    with pytest.raises(BlobError, match="not a regular file"):
        PageBlob.open(damaged)
    assert check(damaged) != []


def test_leftovers_are_no_damage_and_the_next_writer_removes_them(damaged):
    for name in ("meta.new", "journal-99", "0123456789abcdef" * 2 + ".layer"):
        (damaged / name).write_bytes(b"?" * 100)
    (damaged / "letter.txt").write_bytes(b"dear")
    assert check(damaged) == []
    PageBlob.open(damaged).close()
    names = set(os.listdir(damaged))
    assert "letter.txt" in names
    assert not {"meta.new", "journal-99", "0123456789abcdef" * 2 + ".layer"} & names


def test_links_to_a_whole_folder_do_not_share_what_is_written(damaged, in_memory):
    """``cp -al``: the active layer has two names, so whoever writes first leaves it alone."""
    other = in_memory / "linked"
    other.mkdir()
    for entry in damaged.iterdir():
        os.link(entry, other / entry.name)
    (other / "lock").unlink()
    (other / "lock").touch()
    with PageBlob.open(damaged) as blob:
        blob.write(0, pages("Q"))
    with PageBlob.open(other) as blob:
        assert blob.read(0, 512) == pages("c")

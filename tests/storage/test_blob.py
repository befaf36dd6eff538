"""A page blob by its operations, as Azure's documents tell them."""

import os

import pytest
from blob_engine import PAGE, Engine, contents, pages

from kvmpy.errors import BlobError, DiskError
from kvmpy.storage.blob import MAX_WRITE, PageBlob, PageRange
from kvmpy.storage.blob_check import check
from kvmpy.units import MiB, TiB

# --- creating and opening ---


def test_new_blob_is_zeros_and_takes_no_room(blob, path):
    """Create Blob: "a new page blob ... initialized with zeros"."""
    assert blob.read(0, 1 * MiB) == bytes(1 * MiB)
    assert blob.page_ranges() == []
    assert blob.allocated < 64 * 1024
    assert (blob.size, blob.content_length, blob.readonly, blob.alignment) == (1 * MiB, 1 * MiB, False, 1)
    assert check(path) == []


def test_blob_of_8_tib_is_made_at_once(path):
    """ "The maximum size for a page blob is 8 TiB." """
    with PageBlob.create(path, 8 * TiB) as blob:
        blob.write(8 * TiB - PAGE, pages("z"))
        assert blob.page_ranges() == [PageRange(8 * TiB - PAGE, PAGE)]
        blob.snapshot()
        blob.write(4 * TiB, pages("y"))
        blob.clear(8 * TiB - PAGE, PAGE)
        assert blob.page_ranges() == [PageRange(4 * TiB, PAGE)]
        assert blob.page_ranges_since(blob.snapshots[0].id) == [
            PageRange(4 * TiB, PAGE),
            PageRange(8 * TiB - PAGE, PAGE, cleared=True),
        ]
        assert blob.allocated < 32 * MiB
    assert os.stat(path / "meta").st_size < 4096


@pytest.mark.parametrize("size", [0, -512, 511, 513, 8 * TiB + 512])
def test_wrong_size_is_refused_and_nothing_is_left(tmp_path, size):
    with pytest.raises(BlobError, match=f"{size} bytes: allowed is a multiple of 512"):
        PageBlob.create(tmp_path / "x", size)
    assert os.listdir(tmp_path) == []


def test_existing_path_is_refused(path):
    path.write_bytes(b"mine")
    with pytest.raises(BlobError, match="exists already"):
        PageBlob.create(path, PAGE)
    assert path.read_bytes() == b"mine"
    assert os.listdir(path.parent) == [path.name]


def test_what_is_no_blob_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(bytes(4096))
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    for name in ("file", "folder", "fifo", "nothing"):
        for readonly in (False, True):
            with pytest.raises(BlobError, match=name):
                PageBlob.open(tmp_path / name, readonly=readonly)
        assert check(tmp_path / name) != []


def test_content_survives_closing(path):
    with PageBlob.create(path, 1 * MiB) as blob:
        blob.write(512, pages("ab"))
    with PageBlob.open(path) as blob:
        assert blob.read(0, 2048) == pages(".ab.")
    assert contents(path)[:2048] == pages(".ab.")


def test_open_readonly_changes_nothing(path):
    PageBlob.create(path, 1 * MiB).close()
    before = {name: (path / name).read_bytes() for name in os.listdir(path)}
    with PageBlob.open(path, readonly=True) as blob:
        for change in (
            lambda: blob.write(0, pages("a")),
            lambda: blob.clear(0, 512),
            lambda: blob.resize(512),
            blob.snapshot,
            lambda: blob.set_sequence_number("increment"),
            lambda: blob.map(0, 1, write=True),
            lambda: blob.zero(0, 1),
        ):
            with pytest.raises(BlobError, match="is open read-only"):
                change()
        assert not any(extent.writable for extent in blob.map(0, 2048, write=False))
    assert {name: (path / name).read_bytes() for name in os.listdir(path)} == before


def test_closed_blob_refuses_everything(blob):
    blob.close()
    blob.close()
    for use in (lambda: blob.read(0, 512), lambda: blob.map(0, 1, write=False), blob.page_ranges):
        with pytest.raises(BlobError, match="is closed"):
            use()
    with pytest.raises(DiskError):
        blob.write(0, pages("a"))


# --- pages ---


def test_pages_are_written_and_cleared(blob):
    blob.write(512, pages("abc"))
    blob.clear(1024, 512)
    assert blob.read(0, 3072) == pages(".a.c..")
    assert blob.page_ranges() == [PageRange(512, 512), PageRange(1536, 512)]


@pytest.mark.parametrize(
    ("offset", "size"), [(1, 512), (0, 511), (512, 1), (1 * MiB, 512), (1 * MiB - 512, 1024), (-512, 512), (2**70, 512)]
)
def test_range_that_is_not_pages_of_the_blob_is_refused(blob, offset, size):
    """Put Page: the range must be aligned with 512-byte boundaries and inside the blob."""
    etag = blob.etag
    for use in (
        lambda: blob.read(offset, size),
        lambda: blob.write(offset, bytes(size)),
        lambda: blob.clear(offset, size),
        lambda: blob.page_ranges(offset, size),
    ):
        with pytest.raises(BlobError):
            use()
    assert blob.etag == etag


def test_write_of_more_than_4_mib_is_refused(path):
    """Put Page: "up to 4 MiB"."""
    with PageBlob.create(path, 8 * MiB) as blob:
        blob.write(512, b"x" * MAX_WRITE)
        with pytest.raises(BlobError, match="one write has at most"):
            blob.write(0, b"x" * (MAX_WRITE + 512))
        blob.clear(0, 8 * MiB)
        assert blob.page_ranges() == []
        with pytest.raises(BlobError, match="one page is the least"):
            blob.write(0, b"")


def test_page_ranges_are_what_holds_anything(blob):
    """Get Page Ranges, but by the bytes: a page of written zeros is empty."""
    blob.write(0, pages("ab..c."))
    blob.write(512 * 1024, bytes(4096))
    assert blob.page_ranges() == [PageRange(0, 1024), PageRange(2048, 512)]
    assert blob.page_ranges(512, 2048) == [PageRange(512, 512), PageRange(2048, 512)]
    assert blob.page_ranges(1024, 512) == []


def test_clear_gives_room_back(path):
    with PageBlob.create(path, 8 * MiB) as blob:
        blob.write(0, b"x" * MAX_WRITE)
        full = blob.allocated
        blob.clear(0, MAX_WRITE)
        assert full - blob.allocated >= MAX_WRITE


# --- ETag, sequence number ---


def test_etag_changes_with_each_write_and_with_opening_and_closing(path):
    """What a guest writes in between is not seen in it, so both ends are."""
    blob = PageBlob.create(path, 1 * MiB)
    etags = [blob.etag]
    for change in (
        lambda: blob.write(0, pages("a")),
        lambda: blob.clear(0, 512),
        lambda: blob.resize(2 * MiB),
        lambda: blob.set_sequence_number("increment"),
        blob.close,
    ):
        change()
        etags.append(blob.etag)
    with PageBlob.open(path) as blob:
        etags.append(blob.etag)
    with PageBlob.open(path, readonly=True) as blob:
        etags.append(blob.etag)
    assert len(set(etags)) == len(etags)
    assert all(etag.startswith('"0x') and etag.endswith('"') for etag in etags)
    with PageBlob.open(path, readonly=True) as blob:
        assert blob.etag == etags[-1]


def test_etag_stays_with_reading_and_snapshots_and_what_a_guest_writes(blob):
    etag, modified = blob.etag, blob.last_modified
    Engine(blob).write(0, pages("a"))
    blob.read(0, 512)
    assert blob.snapshot().etag == etag
    assert (blob.etag, blob.last_modified) == (etag, modified)


def test_write_with_another_etag_is_refused(blob):
    """If-Match: the operation is performed only if the ETag is the value given."""
    etag = blob.etag
    blob.write(0, pages("a"), if_match=etag)
    for change in (lambda: blob.write(0, pages("b"), if_match=etag), lambda: blob.clear(0, 512, if_match=etag)):
        with pytest.raises(BlobError, match=f"the ETag is .*, not {etag}"):
            change()
    assert blob.read(0, 512) == pages("a")


def test_sequence_number_follows_its_action(path):
    """x-ms-sequence-number-action: max, update, increment."""
    with PageBlob.create(path, 512) as blob:
        numbers = [blob.sequence_number]
        for action, value in (("update", 7), ("max", 3), ("max", 9), ("increment", None), ("update", 2**63 - 1)):
            blob.set_sequence_number(action, value)
            numbers.append(blob.sequence_number)
        assert numbers == [0, 7, 7, 9, 10, 2**63 - 1]
        with pytest.raises(BlobError, match="sequence number"):
            blob.set_sequence_number("increment")
        for action, value in (("increment", 1), ("max", None), ("set", 1)):
            with pytest.raises(ValueError, match="allowed are"):
                blob.set_sequence_number(action, value)
    with PageBlob.open(path, readonly=True) as blob:
        assert blob.sequence_number == 2**63 - 1


# --- size ---


def test_blob_grows_with_zeros_and_shrinks(blob, path):
    blob.write(0, pages("ab"))
    blob.write(512 * 1024, b"x" * 256 * 1024)
    full = blob.allocated
    blob.resize(512)
    assert (blob.size, blob.read(0, 512)) == (512, pages("a"))
    assert full - blob.allocated >= 256 * 1024
    blob.resize(2048)
    assert blob.read(0, 2048) == pages("a...")
    blob.write(1536, pages("d"))
    blob.close()
    assert contents(path) == pages("a..d")


def test_what_was_cut_off_is_zeros_for_ever(path):
    """Set Blob Properties: "If the specified value is less than the current size, all pages above are cleared"."""
    with PageBlob.create(path, 1 * MiB) as blob:
        blob.write(0, b"x" * 1 * MiB)
        blob.snapshot()
        blob.write(512 * 1024, pages("y"))
        blob.resize(256 * 1024)
        blob.resize(1 * MiB)
        assert blob.read(0, 1 * MiB) == b"x" * (256 * 1024) + bytes(768 * 1024)
        Engine(blob).write(512 * 1024 + 512, pages("z"))
        assert blob.read(512 * 1024, 1536) == pages(".z.")
    assert contents(path, snapshot=blob.snapshots[0].id) == b"x" * 1 * MiB


def test_vhd_shows_the_guest_all_but_the_footer(path):
    """vhd.md: the last 512 bytes of a fixed VHD are its footer."""
    with PageBlob.create(path, 1 * MiB + 512, content_format="vhd") as blob:
        blob.write(1 * MiB, pages("F"))
        assert (blob.size, blob.content_length) == (1 * MiB, 1 * MiB + 512)
        blob.snapshot()
        assert [extent.end for extent in blob.table()] == [2048]
        for write in (False, True):
            extents = blob.map(0, 2048, write=write)
            assert (extents[0].sector, extents[-1].end) == (0, 2048)
        for use in (lambda: blob.map(2048, 1, write=True), lambda: blob.zero(2047, 2)):
            with pytest.raises(ValueError, match="of 2048"):
                use()
        assert blob.read(1 * MiB, 512) == pages("F")
    with PageBlob.open(path, readonly=True) as blob:
        assert blob.content_format == "vhd"
    with pytest.raises(BlobError, match="a footer and at least one sector"):
        PageBlob.create(path.with_name("small"), 512, content_format="vhd")
    with pytest.raises(ValueError, match="content_format"):
        PageBlob.create(path.with_name("other"), 512, content_format="vhdx")


def test_vhd_keeps_its_size(path):
    """The footer says it, and is the last page: cut off or moved, the guest would see it as data, or another size."""
    with PageBlob.create(path, 1 * MiB, content_format="vhd") as blob:
        with pytest.raises(BlobError, match="whose footer says its size"):
            blob.resize(2 * MiB)
        assert blob.content_length == 1 * MiB

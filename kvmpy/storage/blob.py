"""A page blob: a disk of 512-byte pages with the semantics of an Azure page blob, in a folder of files.

Two sides. As a `DiskImage` it gives engines extents: what a guest writes changes neither ETag nor metadata, and a blob
that was never copied or snapshotted is one extent. As a page blob it has operations, each durable when it returns::

    create open close       read write clear resize       page_ranges page_ranges_since
    etag sequence_number    snapshot delete_snapshot      (copy, delete: `blob_copy`; check: `blob_check`)

The ETag changes with each operation that changes the blob, before any byte does, and when it is opened and closed for
writing, as nothing that a guest writes in between is seen in it.

Not here: how all of it is kept so that a crash is harmless (`blob_writer`), the files (`blob_folder`). Source: Azure
Storage REST API, "Operations on Page Blobs". Floor: storage.
"""

import os
from contextlib import suppress
from typing import Literal, NamedTuple, Self

from kvmpy.errors import BlobError
from kvmpy.storage import files
from kvmpy.storage.blob_aside import Aside
from kvmpy.storage.blob_claim import claim_pages, zero_pages
from kvmpy.storage.blob_disk import FOOTER_SIZE, BlobDisk
from kvmpy.storage.blob_folder import load
from kvmpy.storage.blob_layer import Folder
from kvmpy.storage.blob_map import PageMap
from kvmpy.storage.blob_meta import (
    CONTENT_FORMATS,
    MAX_SEQUENCE_NUMBER,
    PAGE_SIZE,
    Meta,
    SavedSnapshot,
    as_it_was,
    find_snapshot,
    is_size,
    may_have_another_snapshot,
)
from kvmpy.storage.blob_ranges import PageRange, changed_ranges, page_ranges, read_pages
from kvmpy.storage.blob_time import format_etag, format_moment, next_after, now
from kvmpy.storage.blob_writer import BlobWriter
from kvmpy.storage.disk import Extent
from kvmpy.storage.disk_file import PAGE_CACHE_ALIGNMENT, direct_alignment
from kvmpy.storage.lease import Lease, open_blob_folder
from kvmpy.units import MiB

MAX_WRITE = 4 * MiB
"""Bytes of one `PageBlob.write` (Azure, Put Page)."""


class Snapshot(NamedTuple):
    """A moment of a blob that is kept; ``id`` says when, is unique in its blob, and ascends."""

    id: str
    size: int
    etag: str
    created: str


class PageBlob:
    """An open page blob; made by `create` or `open`. One thread at a time; beside engines as `DiskImage` says.

    Every method that changes it raises BlobError when it is open read-only, LeaseError when the lease is lost, and
    OSError when the host fails (ENOSPC: it is what it was before; a sync that fails: nothing more can be changed).
    """

    def __init__(self, folder: Folder, view: Meta, writer: BlobWriter | None) -> None:
        self._folder = folder
        self._writer = writer
        self._disk = BlobDisk(folder.path, view, writer)

    # --- making, opening, closing ---

    @classmethod
    def create(cls, path: str | os.PathLike[str], size: int, *, content_format: str = "raw") -> Self:
        """Make a blob of ``size`` bytes that are zeros, durable on return, and open it for writing.

        Raises:
            BlobError: something is there already; the size is no multiple of 512, or beyond 8 TiB.
            LeaseError: another process is making a blob there.
            OSError: the host refused; nothing is left behind.
        """
        path = os.fspath(path)
        if content_format not in CONTENT_FORMATS:
            raise ValueError(f"content_format {content_format!r}: allowed are {', '.join(CONTENT_FORMATS)}")
        _check_size(size, content_format, path)
        moment = now()
        with Aside(path) as aside:
            layer = aside.new_layer(size)
            files.fdatasync(layer.own_fd)  # its length: the map says that all pages are in it
            whole = PageMap(size // PAGE_SIZE, [0], [layer])
            writer = aside.publish(Meta(size, content_format, moment, 0, moment, moment, layer, whole))
        return cls(aside.folder, writer.meta, writer)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        readonly: bool = False,
        snapshot: str | None = None,
        direct: bool = False,
    ) -> Self:
        """Open a blob; for writing, unless ``readonly`` or a ``snapshot`` is named, which nothing can change.

        Raises:
            BlobError: it is no page blob, damaged (names file and offset), or has no such snapshot.
            LeaseError: another one has it open for writing.
        """
        path = os.fspath(path)
        folder = Folder(open_blob_folder(path), path, direct)
        try:
            if not readonly and snapshot is None:
                writer = _start_writing(folder)
                return cls(folder, writer.meta, writer)
            meta = load(folder).meta
            return cls(folder, meta if snapshot is None else as_it_was(meta, snapshot, path), None)
        except BaseException:
            os.close(folder.fd)
            raise

    def close(self) -> None:
        """Make all durable, change the ETag where it was open for writing, and close. Closing twice is harmless.

        A child made by fork() closes its descriptors and no more. Raises OSError (it is closed all the same).
        """
        if self.closed:
            return
        try:
            if self._writer is not None and self._writer.lease.held and not self._writer.broken:
                self._writer.finish()
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Close and make nothing durable, as if the process had died. Closing twice is harmless."""
        if self.closed:
            return
        self._disk.close()
        if self._writer is not None:
            self._writer.close()
        os.close(self._folder.fd)
        self._folder = self._folder._replace(fd=-1)

    @property
    def closed(self) -> bool:
        return self._folder.fd < 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- what it is ---

    @property
    def _meta(self) -> Meta:
        return self._disk.meta

    @property
    def path(self) -> str:
        return self._folder.path

    @property
    def readonly(self) -> bool:
        return self._writer is None

    @property
    def content_length(self) -> int:
        """Bytes of the blob."""
        return self._meta.size

    @property
    def size(self) -> int:
        """Bytes that a guest sees: the blob's, without the footer of a VHD."""
        return self._disk.size

    @property
    def alignment(self) -> int:
        """What O_DIRECT wants; 1 where the page cache is used."""
        return direct_alignment(os.fstat(self._folder.fd)) if self._folder.direct else PAGE_CACHE_ALIGNMENT

    @property
    def content_format(self) -> str:
        """``raw``, or ``vhd``: the last page is the footer of a fixed VHD."""
        return self._meta.content_format

    @property
    def etag(self) -> str:
        return format_etag(self._meta.etag)

    @property
    def sequence_number(self) -> int:
        return self._meta.sequence_number

    @property
    def created(self) -> str:
        return format_moment(self._meta.created)

    @property
    def last_modified(self) -> str:
        """When the ETag changed."""
        return format_moment(self._meta.last_modified)

    @property
    def snapshots(self) -> tuple[Snapshot, ...]:
        """Return them, oldest first; of a blob opened as a snapshot, those before it."""
        return tuple(_public(saved) for saved in self._meta.snapshots)

    @property
    def allocated(self) -> int:
        """Bytes on the host of all layers, those that other blobs share included."""
        return sum(layer.status().st_blocks * 512 for layer in self._meta.layers())

    # --- pages ---

    def read(self, offset: int, size: int) -> bytes:
        """Return the bytes of whole pages. Raises BlobError for a range that is not aligned or not in the blob."""
        self._check_range(offset, size)
        return read_pages(self._meta.map, offset, offset + size)

    def write(self, offset: int, data: bytes, *, if_match: str | None = None) -> None:
        """Write whole pages, at most 4 MiB; durable on return.

        Raises:
            BlobError: not aligned, not in the blob, or the ETag is not ``if_match``; nothing was written.
        """
        writer = self._begin_change(offset, len(data), if_match)
        if len(data) > MAX_WRITE:
            raise BlobError(f"{len(data)} bytes: one write has at most {MAX_WRITE}", path=self.path, offset=offset)
        claim_pages(writer, offset // PAGE_SIZE, (offset + len(data)) // PAGE_SIZE)
        files.reserve(writer.meta.active.own_fd, offset, len(data))
        writer.touch()
        files.pwrite_all(writer.meta.active.own_fd, data, offset)
        writer.sync_pages()

    def clear(self, offset: int, size: int, *, if_match: str | None = None) -> None:
        """Make whole pages zeros, durably, and give their room back. Raises as `write`; any size."""
        writer = self._begin_change(offset, size, if_match)
        writer.touch()
        zero_pages(writer, offset // PAGE_SIZE, (offset + size) // PAGE_SIZE)

    def page_ranges(self, offset: int = 0, size: int | None = None) -> list[PageRange]:
        """Return the runs of pages, in the range, that hold anything but zeros."""
        size = self.content_length - offset if size is None else size
        self._check_range(offset, size)
        return page_ranges(self._meta.map, offset, offset + size)

    def page_ranges_since(self, snapshot_id: str) -> list[PageRange]:
        """Return the runs of pages whose bytes are not those of the snapshot, which is zeros behind its end.

        Raises:
            BlobError: there is no such snapshot.
        """
        self._disk.check_open()
        return changed_ranges(self._meta.map, find_snapshot(self._meta, snapshot_id, self.path).map)

    # --- the blob as a whole ---

    def resize(self, size: int) -> None:
        """Cut off what is behind ``size``, or add zeros. Raises BlobError for a size that `create` refuses."""
        writer = self._disk.writer()
        if self.content_format == "vhd":
            raise BlobError("is a VHD, whose footer says its size: it keeps it", path=self.path)
        _check_size(size, self.content_format, self.path)
        active, old = writer.meta.active, writer.meta.size
        if size > old:
            files.truncate(active.own_fd, old)  # away with what a crash has left behind the end
            files.truncate(active.own_fd, size)
            writer.sync_pages()
        resized = writer.meta.map.resized(size // PAGE_SIZE, active)
        writer.commit(writer.meta.touched()._replace(size=size, map=resized))
        if size < old:
            with suppress(OSError):  # it has happened; only room is not given back
                files.truncate(active.own_fd, size)

    def set_sequence_number(self, action: Literal["max", "update", "increment"], value: int | None = None) -> None:
        """Change it (x-ms-sequence-number-action): to ``value`` if that is larger, to ``value``, or by one.

        Raises:
            ValueError: there is no such action, or ``value`` is missing, or there for increment.
            BlobError: not from 0 to 2**63 - 1.
        """
        writer = self._disk.writer()
        old = self.sequence_number
        match action, value:
            case "max", int():
                new = max(old, value)
            case "update", int():
                new = value
            case "increment", None:
                new = old + 1
            case _:
                raise ValueError(f"{action} {value}: allowed are max and update with a number, increment without")
        if not 0 <= new <= MAX_SEQUENCE_NUMBER:
            raise BlobError(f"sequence number {new}: allowed are 0 to {MAX_SEQUENCE_NUMBER}", path=self.path)
        writer.commit(writer.meta.touched()._replace(sequence_number=new))

    def snapshot(self) -> Snapshot:
        """Keep what the blob is now, durably, what engines wrote and did not flush included.

        What engines know of the blob is wrong then: they must read the table anew before they go on.
        """
        writer = self._disk.writer()
        if not may_have_another_snapshot(writer.meta):
            raise BlobError("has too many snapshots: delete some first", path=self.path)
        meta = writer.freeze()
        last = meta.snapshots[-1].id if meta.snapshots else 0
        saved = SavedSnapshot(next_after(last), meta.size, meta.etag, meta.map.copy())
        writer.commit(meta._replace(snapshots=(*meta.snapshots, saved)))
        return _public(saved)

    def delete_snapshot(self, snapshot_id: str) -> None:
        """Forget a snapshot, and give back the room that it alone has. Raises BlobError when there is none."""
        writer = self._disk.writer()
        gone = find_snapshot(writer.meta, snapshot_id, self.path)
        writer.commit(writer.meta._replace(snapshots=tuple(s for s in writer.meta.snapshots if s is not gone)))

    # --- the disk that engines see ---

    def table(self) -> list[Extent]:
        """Return the extents in the layers that are open: at first the active one."""
        return self._disk.table()

    def map(self, sector: int, sectors: int, *, write: bool) -> list[Extent]:
        """Return whole extents that cover the range, as `DiskImage.map`. Raises ValueError for one not on the disk."""
        return self._disk.map(sector, sectors, write=write)

    def zero(self, sector: int, sectors: int) -> list[Extent]:
        """Make the range zeros, as `DiskImage.zero`. Raises ValueError for one not on the disk."""
        return self._disk.zero(sector, sectors)

    # --- checks ---

    def _begin_change(self, offset: int, size: int, if_match: str | None) -> BlobWriter:
        writer = self._disk.writer()
        self._check_range(offset, size)
        if not size:
            raise BlobError("0 bytes: one page is the least", path=self.path, offset=offset)
        if if_match not in (None, self.etag):
            raise BlobError(f"the ETag is {self.etag}, not {if_match}", path=self.path)
        return writer

    def _check_range(self, offset: int, size: int) -> None:
        self._disk.check_open()
        if offset % PAGE_SIZE or size % PAGE_SIZE:
            raise BlobError(f"0x{offset:x}+{size}: not whole pages of {PAGE_SIZE} bytes", path=self.path, offset=offset)
        if not 0 <= offset <= offset + size <= self.content_length:
            message = f"0x{offset:x}+{size} is outside its {self.content_length} bytes"
            raise BlobError(message, path=self.path, offset=offset)


def _start_writing(folder: Folder) -> BlobWriter:
    lease = Lease(folder.fd, folder.path)
    try:
        state = load(folder)
    except BaseException:
        lease.close()
        raise
    writer = BlobWriter(folder, lease, state.meta, state.generation)
    try:
        writer.start()
    except BaseException:
        writer.close()
        raise
    return writer


def _check_size(size: int, content_format: str, path: str) -> None:
    if not is_size(size):
        raise BlobError(f"{size} bytes: allowed is a multiple of 512 from 512 to 8 TiB", path=path)
    if content_format == "vhd" and size <= FOOTER_SIZE:
        raise BlobError(f"{size} bytes: a VHD has a footer and at least one sector", path=path)


def _public(saved: SavedSnapshot) -> Snapshot:
    moment = format_moment(saved.id)
    return Snapshot(moment, saved.size, format_etag(saved.etag), moment)

"""The disk that engines see of a page blob: its map as extents.

Runs in layers that are not open yet are gaps in the table, filled when an engine asks for them: a blob copied from a
copy of a copy may have pages in many layers, most of which nobody reads.

Not here: how pages come into the active layer (`blob_claim`). Floor: storage.
"""

from kvmpy.errors import BlobError
from kvmpy.storage.blob_claim import claim_pages, zero_pages
from kvmpy.storage.blob_layer import Layer
from kvmpy.storage.blob_map import Run
from kvmpy.storage.blob_meta import PAGE_SIZE, Meta
from kvmpy.storage.blob_writer import BlobWriter
from kvmpy.storage.disk import Extent

FOOTER_SIZE = 512
"""Of a fixed VHD: the guest does not see the last page of a blob whose content is one."""
MOST_OPEN_LAYERS = 256
"""What a guest reads from more frozen layers is claimed, so that descriptors do not run out."""


class BlobDisk:
    """The blob that ``writer`` writes, or, without one, what ``view`` says it is."""

    def __init__(self, path: str, view: Meta, writer: BlobWriter | None) -> None:
        self._path = path
        self._view = view
        self._writer = writer
        self._read: set[Layer] = set()
        """Frozen layers that are open because an extent names them."""
        self._closed = False

    @property
    def meta(self) -> Meta:
        return self._view if self._writer is None else self._writer.meta

    @property
    def size(self) -> int:
        """Bytes that a guest sees: the blob's, without the footer of a VHD."""
        return self.meta.size - (FOOTER_SIZE if self.meta.content_format == "vhd" else 0)

    def writer(self) -> BlobWriter:
        """Return what changes the blob. Raises BlobError when it is open read-only, else as `BlobWriter.check`."""
        if self._writer is None:
            raise BlobError("is open read-only", path=self._path)
        self._writer.check()
        return self._writer

    def table(self) -> list[Extent]:
        """Return the extents in the layers that are open: at first the active one."""
        return [self._extent(run) for run in self.meta.map.runs(0, self._pages) if run.layer.is_open]

    def map(self, sector: int, sectors: int, *, write: bool) -> list[Extent]:
        """Return whole extents that cover the range; see `DiskImage.map`."""
        end = self._check_sectors(sector, sectors)
        if write:
            claim_pages(self.writer(), sector, end)
        elif self._writer is not None and self._needs_too_many(sector, end):
            claim_pages(self._writer, sector, end)
        return self._extents(sector, end)

    def zero(self, sector: int, sectors: int) -> list[Extent]:
        """Make the range zeros; see `DiskImage.zero`."""
        end = self._check_sectors(sector, sectors)
        zero_pages(self.writer(), sector, end)
        return self._extents(sector, end)

    def close(self) -> None:
        """Close what was opened to be read. Nothing can be read from then on."""
        self._closed = True
        for layer in self._read:
            layer.close()

    @property
    def _pages(self) -> int:
        return self.size // PAGE_SIZE

    def _extents(self, start: int, end: int) -> list[Extent]:
        runs = list(self.meta.map.whole_runs(start, end))
        for run in runs:
            if not run.layer.is_open:
                run.layer.open_for_reading()
                self._read.add(run.layer)
        return [self._extent(run) for run in runs]

    def _extent(self, run: Run) -> Extent:
        end = min(run.end, self._pages)
        writable = self._writer is not None and run.layer is self.meta.active
        fd, unaligned_fd = run.layer.fd, run.layer.unaligned_fd
        return Extent(run.start, end - run.start, fd, run.start * PAGE_SIZE, writable, unaligned_fd)

    def _needs_too_many(self, start: int, end: int) -> bool:
        closed = {run.layer for run in self.meta.map.runs(start, end) if not run.layer.is_open}
        return len(closed) > 0 and len(self._read) + len(closed) > MOST_OPEN_LAYERS

    def check_open(self) -> None:
        """Raise BlobError when it is closed."""
        if self._closed:
            raise BlobError("is closed", path=self._path)

    def _check_sectors(self, sector: int, sectors: int) -> int:
        self.check_open()
        if not 0 <= sector <= sector + sectors <= self._pages:
            raise ValueError(f"sectors {sector}+{sectors} of {self._pages}")
        return sector + sectors

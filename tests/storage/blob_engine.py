"""What tests of page blobs share: an engine in a few lines, which follows the table as the real ones do."""

import os
from itertools import pairwise
from pathlib import Path

from kvmpy.storage import files
from kvmpy.storage.blob import PageBlob
from kvmpy.storage.disk import SECTOR_SIZE, DiskImage, Extent

PAGE = SECTOR_SIZE
CHUNK = 64 * 1024


class Engine:
    """Executes on the extents of ``image``; asks it only for what its table does not have."""

    def __init__(self, image: DiskImage) -> None:
        self.image = image
        self.refresh()

    def refresh(self) -> None:
        """Read the table anew, as after a change that the image made by itself."""
        self.extents = list(self.image.table())
        self.asked = 0

    def read(self, offset: int, size: int) -> bytes:
        data = bytearray(size)
        for extent, start, end in self._covering(offset, size, write=False):
            piece = files.pread_all(extent.fd, end - start, extent.offset + start - extent.sector * PAGE)
            assert len(piece) == end - start, "short read"
            data[start - offset : end - offset] = piece
        return bytes(data)

    def write(self, offset: int, data: bytes) -> None:
        for extent, start, end in self._covering(offset, len(data), write=True):
            files.pwrite_all(
                extent.fd, data[start - offset : end - offset], extent.offset + start - extent.sector * PAGE
            )

    def zero(self, offset: int, size: int) -> None:
        pieces = self._known(offset, size)
        if sum(end - start for _, start, end in pieces) == size and all(extent.writable for extent, _, _ in pieces):
            for extent, start, end in pieces:
                files.zero(extent.fd, extent.offset + start - extent.sector * PAGE, end - start)
        else:
            self._splice(self.image.zero(offset // PAGE, size // PAGE))

    def flush(self) -> None:
        for fd in {extent.fd for extent in self.extents if extent.writable}:
            os.fdatasync(fd)

    def _covering(self, offset: int, size: int, *, write: bool) -> list[tuple[Extent, int, int]]:
        at = offset
        while at < offset + size:
            known = [piece for piece in self._known(at, offset + size - at) if piece[0].writable or not write]
            if known and known[0][1] == at:
                at = known[0][2]
                continue
            stop = known[0][1] if known else offset + size
            self._splice(self.image.map(at // PAGE, (stop - at) // PAGE, write=write))
        return self._known(offset, size)

    def _known(self, offset: int, size: int) -> list[tuple[Extent, int, int]]:
        found = []
        for extent in self.extents:
            start, end = max(extent.sector * PAGE, offset), min(extent.end * PAGE, offset + size)
            if start < end:
                found.append((extent, start, end))
        return found

    def _splice(self, new: list[Extent]) -> None:
        self.asked += 1
        first, last = new[0].sector, new[-1].end
        assert all(a.end == b.sector for a, b in pairwise(new)), "a gap"
        kept = []
        for old in self.extents:
            if old.sector < first:
                kept.append(old._replace(sectors=min(old.end, first) - old.sector))
            if old.end > last:
                start = max(old.sector, last)
                kept.append(
                    old._replace(sector=start, sectors=old.end - start, offset=old.offset + (start - old.sector) * PAGE)
                )
        self.extents = sorted([*kept, *new])


def contents(path: Path, **options: str) -> bytes:
    """Return all bytes of the blob, or of its ``snapshot``, read as a second process would."""
    with PageBlob.open(path, readonly=True, **options) as blob:
        return blob.read(0, blob.content_length)


def pages(text: str) -> bytes:
    """Return a page full of each character; ``.`` is a page of zeros."""
    return b"".join(bytes(PAGE) if c == "." else c.encode() * PAGE for c in text)

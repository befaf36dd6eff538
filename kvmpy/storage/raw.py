"""A raw disk: byte x of the disk is byte x of the file, or of the host's block device.

One extent, written in place: an engine never has to ask. A fixed VHD is one too, with a footer behind it. Not here:
page blobs, which are more than a file.
"""

from typing import Self

from kvmpy.errors import DiskError
from kvmpy.storage import files
from kvmpy.storage.disk import SECTOR_SIZE, Extent
from kvmpy.storage.disk_file import DiskFile


class RawDisk:
    """A DiskImage of the first ``size`` bytes of ``file``, which it owns. Never grows."""

    def __init__(self, file: DiskFile, size: int) -> None:
        self._file = file
        self.size = size
        self.readonly = file.readonly
        self.alignment = file.alignment
        self._extent = Extent(0, size // SECTOR_SIZE, file.fd, 0, not file.readonly, file.unaligned_fd)

    def table(self) -> list[Extent]:
        """Return the one extent."""
        return [self._extent]

    def map(self, sector: int, sectors: int, *, write: bool) -> list[Extent]:
        """Return the one extent: there is nothing to allocate. Raises DiskError to write what is read-only."""
        self._file.check_access(sector, sectors, self.size, write=write)
        return [self._extent]

    def zero(self, sector: int, sectors: int) -> list[Extent]:
        """Punch a hole, or write zeros where the host makes none. Raises OSError, DiskError."""
        self._file.check_access(sector, sectors, self.size, write=True)
        files.zero(self._file.unaligned_fd, sector * SECTOR_SIZE, sectors * SECTOR_SIZE)
        files.fdatasync(self._file.unaligned_fd)
        return [self._extent]

    def close(self) -> None:
        """Make all durable and close; closing twice is harmless."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_raw(path: str, *, readonly: bool = False, direct: bool = False) -> RawDisk:
    """Open the file or block device at ``path``, whose size must be a multiple of 512 bytes and not 0.

    Raises:
        DiskError: it cannot be opened, or has another size.
        LeaseError: another process writes it.
    """
    file = DiskFile(path, readonly=readonly, direct=direct, devices=True)
    if not file.size or file.size % SECTOR_SIZE:
        file.close()
        raise DiskError(f"{file.size} bytes: a raw disk is a multiple of 512, and not 0", path=path, offset=file.size)
    return RawDisk(file, file.size)

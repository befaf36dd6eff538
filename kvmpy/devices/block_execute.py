"""Carries out block requests on the extents of a disk image, in readable Python.

::

    Read     gap? --> image.map              then each extent: preadv straight into guest RAM, or zeros
    Write    not writable? --> image.map     then each extent: pwritev straight out of guest RAM
    Zero     not writable? --> image.zero    else each extent: a hole is punched, or zeros are written
    Flush    fdatasync of all that was ever writable

Not one byte of a request moves before all its sectors may be read or written. Whatever the host refuses becomes IOERR,
and the disk lives on. Twin of csrc/block.c.

Source: virtio 1.2 §5.2.6.2. Floor: devices.
"""

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from kvmpy._shim import ffi, lib
from kvmpy.devices.block_request import (
    Command,
    Flush,
    GetId,
    Range,
    Read,
    Refused,
    Segments,
    Write,
    Zero,
    size_of,
    split,
)
from kvmpy.devices.extent_table import ExtentTable, Run
from kvmpy.devices.virtio_device import scatter
from kvmpy.errors import DiskError
from kvmpy.machine.memory import GuestMemory
from kvmpy.storage.disk import SECTOR_SIZE, ZEROS, DiskImage, Extent, SyncFailed

ZERO_BYTES = bytes(1 << 16)
"""Written again and again where a file system can do no better."""

Transfer = Callable[[int, list[memoryview], int], int]
"""os.preadv or os.pwritev: descriptor, buffers, offset in the file; returns the bytes moved."""


class Result(NamedTuple):
    """What the driver is told."""

    status: int
    """``lib.VIRTIO_BLK_S_*``."""
    data_written: int = 0
    """Bytes of data that were put into the driver's buffers."""
    data_read: int = 0
    """Bytes of data that were taken out of them, to the disk."""


OK = Result(lib.VIRTIO_BLK_S_OK)
IOERR = Result(lib.VIRTIO_BLK_S_IOERR)


class BlockExecutor:
    """One disk, executing one request at a time: its owner sees to that."""

    def __init__(self, memory: GuestMemory, image: DiskImage, serial: bytes) -> None:
        self.writeback = True
        """A write may complete before it is durable."""
        self._memory = memory
        self._image = image
        self._serial = serial.ljust(lib.VIRTIO_BLK_ID_BYTES, b"\0")
        self._sync_failed = False
        self._written_fds: dict[int, None] = {}  # in the order in which they came
        self.reload()

    def reload(self) -> None:
        """Take capacity and extents from the image anew."""
        self.capacity = self._image.size // SECTOR_SIZE
        self._table = ExtentTable()
        self._learn(self._image.table())

    def execute(self, command: Command) -> Result:
        """Do what ``command`` says, data first and all of it, and return what to answer."""
        try:
            return self._execute(command)
        except (OSError, DiskError):
            return IOERR

    def _execute(self, command: Command) -> Result:
        match command:
            case Read(sector, data):
                self._read(sector, data)
                return Result(lib.VIRTIO_BLK_S_OK, data_written=size_of(data))
            case Write(sector, data):
                self._write(sector, data)
                return Result(lib.VIRTIO_BLK_S_OK, data_read=size_of(data))
            case Zero(ranges):
                self._zero(ranges)
            case Flush():
                self._sync()
            case GetId(data):
                return self._get_id(data)
            case Refused(status):
                return Result(status)
        return OK

    # --- the commands -----------------------------------------------------------------------------------------------

    def _read(self, sector: int, data: Segments) -> None:
        self._map(sector, size_of(data) // SECTOR_SIZE, self._table.first_gap, write=False)
        self._move(os.preadv, sector, data)

    def _write(self, sector: int, data: Segments) -> None:
        self._map(sector, size_of(data) // SECTOR_SIZE, self._table.first_unwritable, write=True)
        self._move(os.pwritev, sector, data)
        self._complete_write()

    def _zero(self, ranges: tuple[Range, ...]) -> None:
        for sector, sectors, unmap in ranges:
            self._expect_on_disk(sector, sectors)
            if self._table.first_unwritable(sector, sectors):
                with self._image_at_work():
                    self._learn(self._image.zero(sector, sectors))
                continue
            for extent in self._table.covering(sector, sectors):
                self._zero_in_place(extent, lib.FALLOC_FL_PUNCH_HOLE if unmap else lib.FALLOC_FL_ZERO_RANGE)
        self._complete_write()

    def _get_id(self, data: Segments) -> Result:
        return Result(lib.VIRTIO_BLK_S_OK, data_written=scatter(self._memory, data, self._serial))

    # --- durability -------------------------------------------------------------------------------------------------

    def _complete_write(self) -> None:
        if not self.writeback:
            self._sync()

    def _sync(self) -> None:
        """Make durable what was written so far.

        When the kernel has failed once it has dropped the pages, and would report success the next time: what was
        lost stays lost, so from then on this fails for ever.
        """
        if self._sync_failed:
            raise SyncFailed(errno.EIO, "an earlier fdatasync failed")
        for fd in self._written_fds:
            try:
                os.fdatasync(fd)
            except OSError:
                self._sync_failed = True
                raise

    @contextmanager
    def _image_at_work(self) -> Iterator[None]:
        """Remember that a sync of the image failed: the kernel tells of it only once, whoever asks."""
        try:
            yield
        except SyncFailed:
            self._sync_failed = True
            raise

    # --- the extent table -------------------------------------------------------------------------------------------

    def _learn(self, extents: Sequence[Extent]) -> None:
        self._table.splice(extents)
        self._written_fds.update((extent.fd, None) for extent in extents if extent.writable)

    def _map(self, sector: int, sectors: int, first_missing: Callable[[int, int], Run | None], *, write: bool) -> None:
        """Ask the image for what is missing of the range, run by run, until nothing is."""
        self._expect_on_disk(sector, sectors)
        asked = None
        while missing := first_missing(sector, sectors):
            if missing == asked:
                raise DiskError(f"the image does not map sector {missing.sector}")
            with self._image_at_work():
                self._learn(self._image.map(*missing, write=write))
            asked = missing

    def _expect_on_disk(self, sector: int, sectors: int) -> None:
        """Raise DiskError where the disk ends before: it may have shrunk since the request was parsed."""
        if sector + sectors > self.capacity:
            raise DiskError(f"sectors {sector}+{sectors} are outside {self.capacity}")

    # --- moving bytes -----------------------------------------------------------------------------------------------

    def _move(self, transfer: Transfer, sector: int, data: Segments) -> None:
        """Move ``data`` from or to the sectors from ``sector`` on: segments and sectors ascending."""
        for extent in self._table.covering(sector, size_of(data) // SECTOR_SIZE):
            here, data = split(data, extent.sectors * SECTOR_SIZE)
            if extent.fd == ZEROS:
                for segment in here:
                    self._memory.fill(*segment)
            else:
                self._move_extent(transfer, extent, here)

    def _move_extent(self, transfer: Transfer, extent: Extent, data: Segments) -> None:
        offset = extent.offset
        while data:
            # A chain has at most QUEUE_SIZE_MAX buffers: fewer than one call may have (IOV_MAX, 1024).
            views = [self._memory.view(gpa, size) for gpa, size in data]
            moved = transfer(self._fd(extent, offset, data), views, offset)
            if not moved:
                raise OSError(errno.EIO, "the file ends early")
            offset += moved
            _, data = split(data, moved)

    def _fd(self, extent: Extent, offset: int, data: Segments) -> int:
        """Return the descriptor for a transfer: O_DIRECT only where all of it is aligned."""
        alignment = self._image.alignment
        if alignment == 1 or (
            offset % alignment == 0
            and all(size % alignment == 0 and self._hva(gpa, size) % alignment == 0 for gpa, size in data)
        ):
            return extent.fd
        return extent.unaligned_fd

    def _hva(self, gpa: int, size: int) -> int:
        region = self._memory.region_at(gpa, size)
        return region.hva + gpa - region.gpa

    def _zero_in_place(self, extent: Extent, mode: int) -> None:
        """Make ``extent`` read as zeros; ``mode`` says whether it keeps its room."""
        size = extent.sectors * SECTOR_SIZE
        try:
            _fallocate(extent.fd, mode | lib.FALLOC_FL_KEEP_SIZE, extent.offset, size)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            fd = extent.fd if self._image.alignment == 1 else extent.unaligned_fd
            _write_zeros(fd, extent.offset, extent.offset + size)


def _fallocate(fd: int, mode: int, offset: int, size: int) -> None:
    while lib.fallocate(fd, mode, offset, size):
        if ffi.errno != errno.EINTR:
            raise OSError(ffi.errno, os.strerror(ffi.errno))


def _write_zeros(fd: int, start: int, end: int) -> None:
    while start < end:
        start += os.pwrite(fd, ZERO_BYTES[: end - start], start)

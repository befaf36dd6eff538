"""The configuration space of a virtio block device.

::

     0 capacity, in sectors (8)                            32 writeback (1)    33 0 (1)    34 num_queues (2)
     8 size_max (4)         12 seg_max (4)                 36 max_discard_sectors (4)      40 max_discard_seg (4)
    16 geometry: cylinders (2), heads (1), sectors (1)     44 discard_sector_alignment (4)
    20 blk_size (4)                                        48 max_write_zeroes_sectors (4) 52 max_write_zeroes_seg (4)
    24 topology: physical_block_exp (1),                   56 write_zeroes_may_unmap (1)   57 0 (3)
       alignment_offset (1), min_io_size (2),              60 end: what would follow is of features that are
       opt_io_size (4)                                        not offered, as size_max and geometry, which are 0

Only writeback can be written, and it only by an access of its own width.

Source: virtio 1.2 §5.2.4.
"""

import struct
from collections.abc import Callable
from threading import Lock

from kvmpy.devices.block_request import RANGE_SECTORS_MAX, RANGES_MAX
from kvmpy.storage.disk import SECTOR_SIZE, DiskImage
from kvmpy.units import KiB

LAYOUT = struct.Struct("<Q II HBB I BBHI BxH II I II B3x")
WRITEBACK_OFFSET = 32

SEGMENTS_MAX = 254
"""Data segments in a request: with header and status it fills a queue of 256."""
DISCARD_ALIGNMENT = 4 * KiB // SECTOR_SIZE
"""In sectors: a smaller hole gives no room back."""
PHYSICAL_BLOCK = 4 * KiB
"""Bytes that the host's file system writes at least."""
OPTIMAL_IO = 64 * KiB
"""Bytes that a page blob copies at once on the first write."""


class BlkConfig:
    """The fields for ``image``; `refresh` sees its size anew. The driver's writes of writeback go to ``on_writeback``.

    blk_size is 512 whatever the image is, also behind O_DIRECT on a host's disk with blocks of 4 KiB: partition
    tables count in it, and a disk must read the same however it is opened. The topology says what is faster.
    """

    def __init__(self, image: DiskImage, *, queues: int, on_writeback: Callable[[bool], None]) -> None:
        self._image = image
        self._queues = queues
        self._on_writeback = on_writeback
        self._physical_block = max(PHYSICAL_BLOCK, image.alignment)
        self._lock = Lock()
        self._capacity = image.size // SECTOR_SIZE
        self._writeback = False
        self._generation = 0

    @property
    def capacity(self) -> int:
        """Sectors, as the driver sees them."""
        return self._capacity

    @property
    def generation(self) -> int:
        """How often a field has changed."""
        return self._generation

    @property
    def writeback(self) -> bool:
        """Whether a write may complete before it is durable."""
        return self._writeback

    @writeback.setter
    def writeback(self, writeback: bool) -> None:
        with self._lock:
            self._generation += writeback != self._writeback
            self._writeback = writeback

    def refresh(self) -> bool:
        """Show the size that the image has now; return whether it is another."""
        with self._lock:
            before, self._capacity = self._capacity, self._image.size // SECTOR_SIZE
            self._generation += before != self._capacity
            return before != self._capacity

    def read(self, offset: int, size: int) -> bytes:
        """Return ``size`` bytes of the space as it is at one moment; behind its end are zeros."""
        with self._lock:
            space = self._pack()
        return space[offset : offset + size].ljust(size, b"\0")

    def _pack(self) -> bytes:
        physical_blocks = self._physical_block // SECTOR_SIZE
        return LAYOUT.pack(
            self._capacity,
            0,
            SEGMENTS_MAX,
            *(0, 0, 0),
            SECTOR_SIZE,
            *(physical_blocks.bit_length() - 1, 0, physical_blocks, OPTIMAL_IO // SECTOR_SIZE),
            self._writeback,
            self._queues,
            *(RANGE_SECTORS_MAX, RANGES_MAX),
            DISCARD_ALIGNMENT,
            *(RANGE_SECTORS_MAX, RANGES_MAX, 1),
        )

    def write(self, offset: int, data: bytes) -> None:
        """Pass on a write of writeback; ignore any other."""
        if offset == WRITEBACK_OFFSET and data in (b"\0", b"\1"):
            self._on_writeback(data == b"\1")

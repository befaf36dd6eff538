"""What a descriptor chain means to a disk: a header, data, a status byte; parsed whole before anything is done.

::

    device-readable bytes                               device-writable bytes
    | type 4 | reserved 4 | sector 8 | data_out ... |   | data_in ...                           | status 1 |
      the first 16, wherever they lie                                          the very last byte, wherever it lies

    IN            data_in    whole sectors from ``sector`` on
    OUT           data_out   whole sectors from ``sector`` on
    FLUSH                    ``sector`` is 0
    GET_ID        data_in    up to 20 bytes of the serial number
    DISCARD       data_out   1 to 16 times | sector 8 | num_sectors 4 | flags 4 |
    WRITE_ZEROES  data_out   as DISCARD; flag 0 is "unmap"

How the driver cut the bytes into buffers says nothing (virtio 1.2 §2.7.4.1). The result is one of the commands below,
all of whose bytes are RAM and all of whose sectors are on the disk, or `Refused`. Executing it is the business of
`kvmpy.devices.block_execute`. Twin of csrc/block.c.

Source: virtio 1.2 §5.2.6. Floor: devices.
"""

import struct
from collections.abc import Iterable
from typing import NamedTuple

from kvmpy._shim import lib
from kvmpy.devices.virtqueue import Chain, Segment
from kvmpy.machine.memory import GuestMemory
from kvmpy.storage.disk import SECTOR_SIZE

HEADER = struct.Struct("<IIQ")
"""type, reserved, sector: the beginning of struct virtio_blk_req."""
RANGE = struct.Struct("<QII")
"""sector, num_sectors, flags: struct virtio_blk_discard_write_zeroes."""
RANGES_MAX = 16
"""max_discard_seg and max_write_zeroes_seg of the configuration space."""
RANGE_SECTORS_MAX = 1 << 22
"""max_discard_sectors and max_write_zeroes_sectors."""

Segments = tuple[Segment, ...]


class Limits(NamedTuple):
    """What a request may ask for."""

    capacity: int
    """Sectors of the disk."""
    readonly: bool
    features: int
    """Negotiated, as 64 bits."""

    def has(self, feature: int) -> bool:
        """Tell whether the feature with this bit number was negotiated."""
        return bool(self.features >> feature & 1)


class Read(NamedTuple):
    """Read the sectors that fill ``data``, from ``sector`` on."""

    sector: int
    data: Segments


class Write(NamedTuple):
    """Write ``data`` to the sectors from ``sector`` on."""

    sector: int
    data: Segments


class Flush(NamedTuple):
    """Make durable what was written before."""


class GetId(NamedTuple):
    """Put the serial number into ``data``: at most 20 bytes, without an end mark when it has as many."""

    data: Segments


class Range(NamedTuple):
    """One segment of DISCARD or WRITE_ZEROES. It may be empty."""

    sector: int
    sectors: int
    unmap: bool
    """Their room may be given back."""


class Zero(NamedTuple):
    """Make each of ``ranges`` read as zeros: what DISCARD and WRITE_ZEROES both do here."""

    ranges: tuple[Range, ...]


class Refused(NamedTuple):
    """Do nothing but answer with ``status``."""

    status: int


Command = Read | Write | Flush | GetId | Zero | Refused

IOERR = Refused(lib.VIRTIO_BLK_S_IOERR)
UNSUPP = Refused(lib.VIRTIO_BLK_S_UNSUPP)


class BlockRequest(NamedTuple):
    """A chain, understood."""

    type: int | None
    """``lib.VIRTIO_BLK_T_*`` or whatever else the driver wrote; None: there is no whole header."""
    command: Command
    status_gpa: int
    """Where the answer goes."""


def parse(memory: GuestMemory, chain: Chain, limits: Limits) -> BlockRequest | None:
    """Return the request that ``chain`` is, or None when it has no room for a status: then there is nobody to tell."""
    writable_bytes = size_of(chain.writable)
    if not writable_bytes:
        return None
    data_in, status = split(chain.writable, writable_bytes - 1)
    if size_of(chain.readable) < HEADER.size:
        return BlockRequest(None, IOERR, status[0].gpa)
    header, data_out = split(chain.readable, HEADER.size)
    type, _, sector = HEADER.unpack(gather(memory, header))
    return BlockRequest(type, _command(memory, type, sector, data_out, data_in, limits), status[0].gpa)


def _command(
    memory: GuestMemory, type: int, sector: int, data_out: Segments, data_in: Segments, limits: Limits
) -> Command:
    match type:
        case lib.VIRTIO_BLK_T_IN:
            return _read(sector, data_out, data_in, limits)
        case lib.VIRTIO_BLK_T_OUT:
            return _write(sector, data_out, data_in, limits)
        case lib.VIRTIO_BLK_T_FLUSH if limits.has(lib.VIRTIO_BLK_F_FLUSH):
            return IOERR if sector else Flush()
        case lib.VIRTIO_BLK_T_GET_ID:
            return IOERR if data_out else GetId(data_in)
        case lib.VIRTIO_BLK_T_DISCARD if limits.has(lib.VIRTIO_BLK_F_DISCARD):
            return _zero(memory, type, data_out, data_in, limits)
        case lib.VIRTIO_BLK_T_WRITE_ZEROES if limits.has(lib.VIRTIO_BLK_F_WRITE_ZEROES):
            return _zero(memory, type, data_out, data_in, limits)
        case _:
            return UNSUPP


def _read(sector: int, data_out: Segments, data_in: Segments, limits: Limits) -> Command:
    if data_out or not _are_on_disk(sector, data_in, limits):
        return IOERR
    return Read(sector, data_in)


def _write(sector: int, data_out: Segments, data_in: Segments, limits: Limits) -> Command:
    if limits.readonly or data_in or not _are_on_disk(sector, data_out, limits):
        return IOERR
    return Write(sector, data_out)


def _are_on_disk(sector: int, data: Segments, limits: Limits) -> bool:
    sectors, rest = divmod(size_of(data), SECTOR_SIZE)
    return not rest and sector + sectors <= limits.capacity


def _zero(memory: GuestMemory, type: int, data_out: Segments, data_in: Segments, limits: Limits) -> Command:
    count, rest = divmod(size_of(data_out), RANGE.size)
    if limits.readonly or data_in or not 0 < count <= RANGES_MAX or rest:
        return IOERR
    discard = type == lib.VIRTIO_BLK_T_DISCARD
    allowed_flags = 0 if discard else lib.VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP
    ranges = []
    for sector, sectors, flags in RANGE.iter_unpack(gather(memory, data_out)):
        # UNSUPP for a flag that is not defined, and for "unmap" in a DISCARD (virtio 1.2 §5.2.6.2).
        if flags & ~allowed_flags:
            return UNSUPP
        if sectors > RANGE_SECTORS_MAX or sector + sectors > limits.capacity:
            return IOERR
        ranges.append(Range(sector, sectors, unmap=discard or bool(flags)))
    return Zero(tuple(ranges))


# --- scattered bytes --------------------------------------------------------------------------------------------


def size_of(segments: Iterable[Segment]) -> int:
    """Return how many bytes ``segments`` have together."""
    return sum(segment.size for segment in segments)


def split(segments: Iterable[Segment], size: int) -> tuple[Segments, Segments]:
    """Return the first ``size`` bytes of ``segments``, and the rest; segments of size 0 are in neither."""
    front, back = [], []
    for gpa, length in segments:
        taken = min(length, size)
        size -= taken
        if taken:
            front.append(Segment(gpa, taken))
        if taken < length:
            back.append(Segment(gpa + taken, length - taken))
    return tuple(front), tuple(back)


def gather(memory: GuestMemory, segments: Iterable[Segment]) -> bytes:
    """Copy the bytes of ``segments`` out of the guest, each once."""
    return b"".join(memory.read(gpa, size) for gpa, size in segments)

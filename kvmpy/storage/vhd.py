"""The structures of a VHD, as bytes and as values: footer, dynamic header, geometry, checksum.

::

    fixed       | the disk's bytes                                            | footer |

    dynamic     | copy of | dynamic | block allocation | bitmap | block | ... | footer |
                | footer  | header  | table            |        |       |     |        |
      byte      0         512       1536               ...                          the last 512

All integers are big-endian. The disk's size is the footer's "current size", whoever wrote it: some programs take the
geometry instead and lose what it rounds away. That is why new files name `CREATOR` as the application that made them:
qemu honours the current size of that one's.

Not here: files. Source: Virtual Hard Disk Image Format Specification 1.0, "Hard Disk Footer Format", "Dynamic Disk
Header Format" and the appendix "CHS Calculation".
"""

import time
from enum import IntEnum
from struct import Struct
from typing import NamedTuple, NoReturn

from kvmpy.errors import VhdFormatError
from kvmpy.storage.disk import SECTOR_SIZE
from kvmpy.units import PAGE_SIZE, GiB, MiB

MAX_SIZE = 2040 * GiB
"""Bytes of the largest disk: what every reader of the format manages."""
BLOCK_SIZE = 2 * MiB
MAX_BLOCK_SIZE = 256 * MiB

FOOTER_SIZE = 512
HEADER_SIZE = 1024
UNALLOCATED = 0xFFFFFFFF
"""The entry of a block that is nowhere in the file."""
NOWHERE = 2**64 - 1
"""A data offset that points at nothing."""

CREATOR = b"win "
HOST_OS = b"Wi2k"
VERSION = 0x00010000
EPOCH = 946684800
"""2000-01-01 00:00 UTC, from which time stamps count, in seconds since 1970."""

FOOTER_COOKIE = b"conectix"
HEADER_COOKIE = b"cxsparse"
_FOOTER = Struct(">8sIIQI4sI4sQQHBBII16sB427x")
_HEADER = Struct(">8sQQIIII16sI4x512s192s256x")
_LOCATOR = Struct(">4sII4xQ")
_FOOTER_CHECKSUM = 64
_HEADER_CHECKSUM = 36


class DiskType(IntEnum):
    """What a VHD is; the footer's "disk type"."""

    FIXED = 2
    DYNAMIC = 3
    DIFFERENCING = 4


class Geometry(NamedTuple):
    """Cylinders, heads and sectors per track, which a PC's BIOS once wanted to know."""

    cylinders: int
    heads: int
    sectors_per_track: int


class Footer(NamedTuple):
    """What the footer says, without cookie and checksum."""

    disk_type: DiskType
    current_size: int
    original_size: int
    data_offset: int
    """Where the dynamic header is; NOWHERE in a fixed VHD."""
    geometry: Geometry
    unique_id: bytes
    timestamp: int
    """Seconds since `EPOCH`."""
    features: int = 2
    creator_application: bytes = CREATOR
    creator_version: int = VERSION
    creator_host_os: bytes = HOST_OS
    saved_state: int = 0

    def to_bytes(self) -> bytes:
        """Return the 512 bytes."""
        packed = _FOOTER.pack(
            *(FOOTER_COOKIE, self.features, VERSION, self.data_offset, self.timestamp),
            *(self.creator_application, self.creator_version, self.creator_host_os),
            *(self.original_size, self.current_size, *self.geometry, self.disk_type, 0),
            *(self.unique_id, self.saved_state),
        )
        return with_checksum(packed, at=_FOOTER_CHECKSUM)


class ParentLocator(NamedTuple):
    """Where the path of a differencing VHD's parent stands in the file, and in which platform's words."""

    platform_code: bytes = bytes(4)
    data_space: int = 0
    data_length: int = 0
    data_offset: int = 0


class DynamicHeader(NamedTuple):
    """What the dynamic header says, without cookie and checksum. The last four only count in a differencing VHD."""

    table_offset: int
    max_table_entries: int
    block_size: int
    parent_unique_id: bytes = bytes(16)
    parent_timestamp: int = 0
    parent_name: str = ""
    parent_locators: tuple[ParentLocator, ...] = ()

    def to_bytes(self) -> bytes:
        """Return the 1024 bytes."""
        locators = b"".join(_LOCATOR.pack(*locator) for locator in self.parent_locators)
        packed = _HEADER.pack(
            *(HEADER_COOKIE, NOWHERE, self.table_offset, VERSION, self.max_table_entries, self.block_size, 0),
            *(self.parent_unique_id, self.parent_timestamp, self.parent_name.encode("utf-16-be"), locators),
        )
        return with_checksum(packed, at=_HEADER_CHECKSUM)


def new_footer(size: int, disk_type: DiskType) -> Footer:
    """Return the footer of a new disk of ``size`` bytes, with an identity of its own."""
    from uuid import uuid4

    data_offset = NOWHERE if disk_type is DiskType.FIXED else FOOTER_SIZE
    timestamp = (int(time.time()) - EPOCH) & 0xFFFFFFFF
    return Footer(disk_type, size, size, data_offset, geometry(size // SECTOR_SIZE), uuid4().bytes, timestamp)


def new_header(size: int) -> DynamicHeader:
    """Return the dynamic header of a new disk of ``size`` bytes: its table follows it."""
    return DynamicHeader(FOOTER_SIZE + HEADER_SIZE, -(-size // BLOCK_SIZE), BLOCK_SIZE)


def parse_footer(data: bytes, *, path: str, offset: int) -> Footer:
    """Return what the 512 bytes from ``offset`` of the file say. Raises VhdFormatError."""

    def refuse(message: str, field: int) -> NoReturn:
        raise VhdFormatError(message, path=path, offset=offset + field)

    cookie, features, version, data_offset, timestamp, application, *rest = _FOOTER.unpack(data)
    application_version, host_os, original_size, current_size, cylinders, heads, sectors, *rest = rest
    disk_type, _, unique_id, saved_state = rest
    if cookie != FOOTER_COOKIE:
        refuse("no VHD footer here", 0)
    _check_sum(data, "the footer", path=path, offset=offset, at=_FOOTER_CHECKSUM)
    if version >> 16 != VERSION >> 16:
        refuse(f"version 0x{version:x} of the format: known is 0x{VERSION:x}", 12)
    if not current_size or current_size % SECTOR_SIZE or current_size > MAX_SIZE:
        refuse(f"a disk of {current_size} bytes: allowed is a multiple of 512 up to 2040 GiB, and not 0", 48)
    if disk_type not in list(DiskType):
        refuse(f"disk type {disk_type}: known are 2 (fixed), 3 (dynamic) and 4 (differencing)", 60)
    return Footer(
        *(DiskType(disk_type), current_size, original_size, data_offset, Geometry(cylinders, heads, sectors)),
        *(unique_id, timestamp, features, application, application_version, host_os, saved_state),
    )


def parse_header(data: bytes, footer: Footer, *, path: str) -> DynamicHeader:
    """Return what the 1024 bytes from the footer's data offset say. Raises VhdFormatError."""

    def refuse(message: str, field: int) -> NoReturn:
        raise VhdFormatError(message, path=path, offset=footer.data_offset + field)

    cookie, _, table_offset, version, entries, block_size, _, *parent = _HEADER.unpack(data)
    parent_unique_id, parent_timestamp, parent_name, locators = parent
    if cookie != HEADER_COOKIE:
        refuse("no dynamic header here", 0)
    _check_sum(data, "the dynamic header", path=path, offset=footer.data_offset, at=_HEADER_CHECKSUM)
    if version >> 16 != VERSION >> 16:
        refuse(f"version 0x{version:x} of the dynamic header: known is 0x{VERSION:x}", 24)
    if block_size & (block_size - 1) or not SECTOR_SIZE <= block_size <= MAX_BLOCK_SIZE:
        refuse(f"blocks of {block_size} bytes: allowed is a power of two from 512 to 256 MiB", 32)
    if entries * block_size < footer.current_size:
        refuse(f"{entries} blocks of {block_size} bytes are less than the disk's {footer.current_size}", 28)
    name = parent_name.decode("utf-16-be", "replace").partition("\0")[0]
    parents = tuple(ParentLocator(*fields) for fields in _LOCATOR.iter_unpack(locators))
    return DynamicHeader(table_offset, entries, block_size, parent_unique_id, parent_timestamp, name, parents)


def bitmap_size(block_size: int) -> int:
    """Return the bytes of the bitmap before a block: a bit for each sector, rounded up to a sector."""
    bits = block_size // SECTOR_SIZE
    return -(-bits // (8 * SECTOR_SIZE)) * SECTOR_SIZE


def whole_bitmap(block_size: int) -> bytes:
    """Return the bitmap of a block whose sectors are all there."""
    bits = block_size // SECTOR_SIZE
    size = bitmap_size(block_size)
    return (((1 << bits) - 1) << (8 * size - bits)).to_bytes(size, "big")


def block_place(end: int, block_size: int) -> int:
    """Return where a block (its bitmap) may lie at or behind ``end``: so that its data begin on a page of the host.

    The format does not ask for it. The host's cache and disks work in pages, as guests do.
    """
    alignment = min(block_size, PAGE_SIZE)
    return -(-(end + bitmap_size(block_size)) // alignment) * alignment - bitmap_size(block_size)


def geometry(sectors: int) -> Geometry:
    """Return the geometry of a disk: never more than its sectors, often fewer. Source: appendix "CHS Calculation"."""
    sectors = min(sectors, 65535 * 16 * 255)
    if sectors >= 65535 * 16 * 63:
        return Geometry(sectors // 255 // 16, 16, 255)
    tracks = sectors // 17
    heads = max(4, -(-tracks // 1024))
    if tracks < heads * 1024 and heads <= 16:
        return Geometry(tracks // heads, heads, 17)
    tracks = sectors // 31
    if tracks < 16 * 1024:
        return Geometry(tracks // 16, 16, 31)
    return Geometry(sectors // 63 // 16, 16, 63)


def checksum(data: bytes) -> int:
    """Return the one's complement of the sum of all bytes; the checksum's own four count as zeros."""
    return ~sum(data) & 0xFFFFFFFF


def with_checksum(data: bytes, *, at: int) -> bytes:
    """Return ``data`` with the checksum, of which ``data`` has zeros there, at offset ``at``."""
    return data[:at] + checksum(data).to_bytes(4, "big") + data[at + 4 :]


def _check_sum(data: bytes, what: str, *, path: str, offset: int, at: int) -> None:
    found = int.from_bytes(data[at : at + 4], "big")
    wanted = checksum(data[:at] + data[at + 4 :])
    if found != wanted:
        message = f"the checksum of {what} is 0x{found:08x}: its bytes give 0x{wanted:08x}"
        raise VhdFormatError(message, path=path, offset=offset + at)

"""Find the footer of a VHD: at the end of the file, or its copy.

The footer at the end decides. A dynamic VHD has a copy of it at offset 0, for whoever overwrites the end while the
file grows; but in a fixed VHD the guest's own bytes are there, and a guest could write a footer of its choice. So the
copy counts only for who says that the disk is dynamic; of a differencing VHD, which names other files, it never does.

A file whose size is no multiple of 512 is refused, and with it the footers of 511 bytes that were written before 2004.

Source: Virtual Hard Disk Image Format Specification 1.0, "Hard Disk Footer Format".
"""

from typing import NamedTuple

from kvmpy.errors import VhdFormatError
from kvmpy.storage.disk import SECTOR_SIZE
from kvmpy.storage.disk_file import DiskFile
from kvmpy.storage.vhd import FOOTER_SIZE, DiskType, Footer, parse_footer

Chain = tuple[tuple[int, int], ...]
"""Device and inode of each file from a disk down to one of its parents: what may not come again."""


class FoundFooter(NamedTuple):
    """A footer, its bytes, and the offset where it was found."""

    footer: Footer
    data: bytes
    offset: int
    end: int
    """Before this offset lies all that the file has beside the footer."""
    damage: VhdFormatError | None = None
    """What is wrong with the footer at the end, when this is the copy."""


def find_footer(file: DiskFile, kind: str | None) -> FoundFooter:
    """Return the footer at the end of ``file``; only for the kind ``dynamic`` its copy where that one is damaged.

    Raises:
        VhdFormatError: there is none.
    """
    if file.size % SECTOR_SIZE or not file.size:
        message = f"{file.size} bytes: a VHD is a multiple of 512, and not 0"
        raise VhdFormatError(message, path=file.path, offset=file.size)
    end = file.size - FOOTER_SIZE
    data = file.read(end, FOOTER_SIZE)
    try:
        return FoundFooter(parse_footer(data, path=file.path, offset=end), data, end, end)
    except VhdFormatError as damage:
        return _copy_instead(file, damage, kind)


def _copy_instead(file: DiskFile, damage: VhdFormatError, kind: str | None) -> FoundFooter:
    data = file.read(0, FOOTER_SIZE)
    try:
        footer = parse_footer(data, path=file.path, offset=0)
    except VhdFormatError:
        raise damage from None
    if footer.disk_type is not DiskType.DYNAMIC:
        raise damage from None
    if kind != "dynamic":
        message = f"{damage.message}; its copy at offset 0 is good, and counts with format=vhd-dynamic"
        raise VhdFormatError(message, path=file.path, offset=damage.offset) from None
    return FoundFooter(footer, data, 0, file.size, damage)

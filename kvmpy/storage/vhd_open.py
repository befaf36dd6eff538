"""Open a VHD: find its footer, and hand the file to what its disk type is.

Not here: the structures (`vhd`), and which footer counts (`vhd_footer`).
"""

from kvmpy.errors import VhdFormatError
from kvmpy.storage.disk import DiskImage
from kvmpy.storage.disk_file import DiskFile
from kvmpy.storage.raw import RawDisk
from kvmpy.storage.vhd import DiskType
from kvmpy.storage.vhd_footer import Chain, FoundFooter, find_footer


def open_vhd(path: str, *, kind: str | None = None, readonly: bool = False, direct: bool = False) -> DiskImage:
    """Open the VHD at ``path``; with ``kind`` (``fixed`` or ``dynamic``) no other than such a one.

    Raises:
        DiskError: it cannot be opened, is of another kind, or is a differencing one to be written.
        VhdFormatError: it is damaged.
        LeaseError: another process writes it.
    """
    file = DiskFile(path, readonly=readonly, direct=direct)
    try:
        found = find_footer(file, kind)
        found_kind = found.footer.disk_type.name.lower()
        if kind not in (None, found_kind):
            raise VhdFormatError(f"is a {found_kind} VHD, not a {kind} one", path=path, offset=found.offset + 60)
        return open_found(file, found)
    except BaseException:
        file.abandon()
        raise


def open_found(file: DiskFile, found: FoundFooter, chain: Chain = ()) -> DiskImage:
    """Return the disk of ``file``, which it owns from now on, as the footer found in it says; ``chain``: see Chain."""
    match found.footer.disk_type:
        case DiskType.FIXED:
            return _open_fixed(file, found)
        case DiskType.DYNAMIC:
            from kvmpy.storage.vhd_dynamic import DynamicVhd

            return DynamicVhd(file, found)
        case DiskType.DIFFERENCING:
            from kvmpy.storage.vhd_differencing import DifferencingVhd

            return DifferencingVhd(file, found, chain)


def _open_fixed(file: DiskFile, found: FoundFooter) -> RawDisk:
    """Return the disk of a fixed VHD: a raw disk before the footer. Raises VhdFormatError."""
    size = found.footer.current_size
    if size > found.end:
        message = f"a disk of {size} bytes: before the footer there are {found.end}"
        raise VhdFormatError(message, path=file.path, offset=found.offset + 48)
    return RawDisk(file, size)

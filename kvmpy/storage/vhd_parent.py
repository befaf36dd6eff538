"""Find and open the parent of a differencing VHD: by the paths that it names, and only the one it was made of.

A path counts relative to the child's folder, or absolute as it is written; one with a drive letter only by its last
part, in the child's folder. The first whose file has the identity that the child names is the parent; it must be a
VHD in a regular file, and not have changed since. Its time stamp is that of its footer or that of its file: programs
differ in what they write down.

Source: Virtual Hard Disk Image Format Specification 1.0, "Dynamic Disk Header Format", "Parent Locator Entry".
"""

import os
import re
from collections.abc import Iterator

from kvmpy.errors import DiskError, VhdFormatError
from kvmpy.storage.disk import DiskImage
from kvmpy.storage.disk_file import DiskFile
from kvmpy.storage.vhd import EPOCH, FOOTER_SIZE, DynamicHeader, Footer
from kvmpy.storage.vhd_footer import Chain, find_footer

MAX_DEPTH = 32
RELATIVE_PATH = b"W2ru"
ABSOLUTE_PATH = b"W2ku"
MAX_PATH = 0xFFFE
"""Bytes of a locator's path: what Windows allows, in UTF-16."""

# Offsets in the dynamic header.
_UNIQUE_ID, _TIMESTAMP, _NAME, _LOCATORS = 40, 56, 64, 576


def open_parent(file: DiskFile, header_offset: int, header: DynamicHeader, chain: Chain) -> DiskImage:
    """Open, read-only, the parent of the differencing VHD in ``file``, which is the last of ``chain`` after this.

    Raises:
        DiskError: it is missing or cannot be opened, or the chain is too long.
        VhdFormatError: the parent is damaged or another one, or the chain is a circle.
    """
    chain = (*chain, _identity(file))
    if len(chain) > MAX_DEPTH:
        raise VhdFormatError(f"more than {MAX_DEPTH} parents", path=file.path, offset=header_offset + _LOCATORS)
    paths = list(dict.fromkeys(_candidates(file, header_offset, header)))
    refusal: DiskError | None = None
    for path in paths:
        if os.path.lexists(path):
            try:
                return _open_this(path, file, header_offset, header, chain)
            except DiskError as error:
                refusal = refusal or error
    if refusal is not None:
        raise refusal
    looked_for = ", ".join(repr(path) for path in paths) or "it names none"
    raise DiskError(f"its parent is missing: {looked_for}", path=file.path, offset=header_offset + _LOCATORS)


def _open_this(path: str, child: DiskFile, header_offset: int, header: DynamicHeader, chain: Chain) -> DiskImage:
    """Open the parent at ``path`` when it is the one that ``header`` names."""
    from kvmpy.storage.vhd_open import open_found

    try:
        file = DiskFile(path, readonly=True, direct=child.direct)
    except DiskError as error:
        message = f"its parent {path}: {error.message}"
        raise DiskError(message, path=child.path, offset=header_offset + _LOCATORS) from error
    try:
        if _identity(file) in chain:
            raise VhdFormatError("its parents are a circle", path=child.path, offset=header_offset + _LOCATORS)
        found = find_footer(file, None)
        if found.footer.unique_id != header.parent_unique_id:
            message = f"its parent has another identity: {path} is {found.footer.unique_id.hex()}"
            raise VhdFormatError(message, path=child.path, offset=header_offset + _UNIQUE_ID)
        _check_timestamp(file, found.footer, child, header_offset, header)
        return open_found(file, found, chain)
    except BaseException:
        file.abandon()
        raise


def _check_timestamp(
    file: DiskFile, footer: Footer, child: DiskFile, header_offset: int, header: DynamicHeader
) -> None:
    modified = (int(os.fstat(file.fd).st_mtime) - EPOCH) & 0xFFFFFFFF
    if header.parent_timestamp not in (0, footer.timestamp, modified):
        stamps = f"0x{footer.timestamp:x}, and 0x{modified:x} of its file"
        message = f"its parent {file.path} was changed: the time stamp is {stamps}, not 0x{header.parent_timestamp:x}"
        raise VhdFormatError(message, path=child.path, offset=header_offset + _TIMESTAMP)


def _candidates(file: DiskFile, header_offset: int, header: DynamicHeader) -> Iterator[str]:
    """Yield the paths where the parent may be, the best first."""
    folder = os.path.dirname(file.path)
    relative, absolute = (_located(file, header_offset, header, code) for code in (RELATIVE_PATH, ABSOLUTE_PATH))
    for name in (*relative, *absolute, header.parent_name):
        path = name.replace("\\", "/").partition("\0")[0]
        if re.match("[A-Za-z]:", path):
            path = path[2:].rpartition("/")[2]
        if path:
            yield os.path.join(folder, path)


def _located(file: DiskFile, header_offset: int, header: DynamicHeader, platform_code: bytes) -> Iterator[str]:
    """Yield the paths of the locators of one platform."""
    for number, locator in enumerate(header.parent_locators):
        if locator.platform_code != platform_code:
            continue
        offset, length = locator.data_offset, locator.data_length
        if length > MAX_PATH or offset < FOOTER_SIZE or offset + length > file.size:
            message = f"the path of its parent is at 0x{offset:x}, {length} bytes: allowed are {MAX_PATH}, in the file"
            raise VhdFormatError(message, path=file.path, offset=header_offset + _LOCATORS + 24 * number)
        yield file.read(offset, length).decode("utf-16-le", "replace")


def _identity(file: DiskFile) -> tuple[int, int]:
    status = os.fstat(file.fd)
    return status.st_dev, status.st_ino

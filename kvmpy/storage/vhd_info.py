"""What a VHD says of itself, and what is wrong with one. Nothing is changed, no parent is opened for the former.

Not here: page blobs (`blob_check`).
"""

import os
import time
from typing import Any

from kvmpy.errors import DiskError, VhdFormatError
from kvmpy.storage.disk import SECTOR_SIZE
from kvmpy.storage.disk_file import DiskFile
from kvmpy.storage.open import kind_of, open_disk
from kvmpy.storage.vhd import EPOCH, FOOTER_SIZE, DiskType
from kvmpy.storage.vhd_blocks import BlockTable
from kvmpy.storage.vhd_footer import find_footer


def vhd_info(path: str, format: str) -> dict[str, Any]:
    """Return what footer and dynamic header of the VHD at ``path`` say, in values that JSON has. Raises DiskError."""
    with DiskFile(path, readonly=True) as file:
        found = find_footer(file, kind_of(format))
        footer = found.footer
        info = {
            "format": f"vhd-{footer.disk_type.name.lower()}",
            "size": footer.current_size,
            "allocated": os.fstat(file.fd).st_blocks * SECTOR_SIZE,
            "geometry": footer.geometry._asdict(),
            "creator_application": footer.creator_application.decode("latin-1").rstrip("\0 "),
            "unique_id": footer.unique_id.hex(),
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(footer.timestamp + EPOCH)),
        }
        if footer.disk_type is DiskType.FIXED:
            return info
        blocks = BlockTable(file, found)
        info |= {"block_size": blocks.block_size, "blocks": len(blocks.allocated())}
        if footer.disk_type is DiskType.DIFFERENCING:
            header = blocks.header
            info |= {"parent": header.parent_name, "parent_unique_id": header.parent_unique_id.hex()}
        return info


def check_vhd(path: str, format: str) -> list[str]:
    """Return what is wrong with the VHD at ``path``, one line for each; empty when it is clean."""
    problems: list[str] = []
    try:
        open_disk(path, format=format, readonly=True).close()
        with DiskFile(path, readonly=True) as file:
            found = find_footer(file, kind_of(format))
            if found.damage is not None:
                problems.append(str(found.damage))
            elif found.footer.disk_type is not DiskType.FIXED and file.read(0, FOOTER_SIZE) != found.data:
                problems.append(str(VhdFormatError("is not the copy of the footer", path=path, offset=0)))
    except DiskError as error:
        problems.append(str(error))
    return problems

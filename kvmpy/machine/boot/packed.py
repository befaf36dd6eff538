"""Packings of whole files and of the kernel inside a bzImage: each is told by its first bytes.

Not here: undoing one, which `kvmpy.machine.boot.unpack` does where Python's own library can.
"""

from typing import NamedTuple


class Packing(NamedTuple):
    """A way to pack data. ``command`` unpacks a file to standard output."""

    name: str
    magic: bytes
    command: str


PACKINGS = (
    Packing("gzip", b"\x1f\x8b\x08", "gzip -dc"),
    Packing("bzip2", b"BZh", "bzip2 -dc"),
    Packing("xz", b"\xfd7zXZ\0", "xz -dc"),
    Packing("LZMA", b"\x5d\0\0", "xz -dc"),
    Packing("legacy LZ4", b"\x02\x21\x4c\x18", "lz4 -dc"),
    Packing("LZ4 in its frame format", b"\x04\x22\x4d\x18", "lz4 -dc"),
    Packing("zstd", b"\x28\xb5\x2f\xfd", "zstd -dc"),
    Packing("LZO", b"\x89LZO\0\r\n\x1a\n", "lzop -dc"),
    Packing("lzip", b"LZIP", "lzip -dc"),
    Packing("zip", b"PK\3\4", "unzip -p"),
)
LONGEST_MAGIC = max(len(packing.magic) for packing in PACKINGS)


def recognise(head: bytes) -> Packing | None:
    """Return the packing of data that begins with ``head``, or None when it is none of `PACKINGS`."""
    return next((packing for packing in PACKINGS if head.startswith(packing.magic)), None)

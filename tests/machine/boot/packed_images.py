"""Packed kernels for tests: a packer for LZ4's legacy frame, and what stands behind the payload of a bzImage."""

import bz2
import gzip
import lzma
from collections.abc import Callable

BLOCK_SIZE = 8 << 20


def lz4(data: bytes) -> bytes:
    """Pack ``data`` into a legacy frame."""
    blocks = (lz4_block(data[at : at + BLOCK_SIZE]) for at in range(0, len(data), BLOCK_SIZE))
    return b"\x02\x21\x4c\x18" + b"".join(len(block).to_bytes(4, "little") + block for block in blocks)


def lz4_block(data: bytes) -> bytes:
    """Pack one block: the last match of the same four bytes is taken, and nothing better looked for."""
    out, seen = bytearray(), dict[bytes, int]()
    done = at = 0
    while at < len(data) - 12:
        word = data[at : at + 4]
        match = seen.get(word, -1)
        seen[word] = at
        if match < 0 or at - match > 0xFFFF:
            at += 1
            continue
        length = 4
        while at + length < len(data) - 5 and data[match + length] == data[at + length]:
            length += 1
        out += sequence(data[done:at], at - match, length)
        at += length
        done = at
    return bytes(out + sequence(data[done:]))


def sequence(literals: bytes, offset: int = 0, length: int = 4) -> bytes:
    """Return one sequence; without ``offset`` the last one, which has no match."""
    extra = length - 4
    token = min(len(literals), 15) << 4 | (min(extra, 15) if offset else 0)
    match = offset.to_bytes(2, "little") + more(extra) if offset else b""
    return bytes([token]) + more(len(literals)) + literals + match


def more(length: int) -> bytes:
    """Return the bytes with which a length of 15 and above goes on."""
    return b"\xff" * ((length - 15) // 255) + bytes([(length - 15) % 255]) if length >= 15 else b""


PACK: dict[str, Callable[[bytes], bytes]] = {
    "gzip": lambda data: gzip.compress(data, 1),
    "bzip2": lambda data: bz2.compress(data, 1),
    "xz": lambda data: lzma.compress(data, preset=0),
    "LZMA": lambda data: lzma.compress(data, lzma.FORMAT_ALONE, preset=0),
    "legacy LZ4": lz4,
}
"""Every packing that is unpacked here."""


def payload(packing: str, kernel: bytes) -> bytes:
    """Return ``kernel`` as the payload of a bzImage (arch/x86/boot/compressed/Makefile: size_append, but for gzip)."""
    packed = PACK[packing](kernel)
    return packed if packing == "gzip" else packed + len(kernel).to_bytes(4, "little")

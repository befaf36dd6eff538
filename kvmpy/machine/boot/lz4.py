"""LZ4 in its legacy frame, as kernels are packed with: a magic, then blocks of up to 8 MiB, each with its packed size.

A block is a row of sequences, and needs none of the blocks before it::

    token         high 4 bits: how many literals; low 4 bits: length of the match - 4; 15: bytes follow that add to it
    [255 ... n]   more literals
    literals      copied as they are
    offset        2 bytes, little-endian: how far back in the output the match begins
    [255 ... n]   more of the match

The last sequence ends after its literals. A match may reach into its own output: then it repeats. Slices do the
copying, so that the time goes with the number of sequences, not of bytes.

Source: lz4 doc/lz4_Block_format.md; doc/lz4_Frame_format.md, "Legacy frame".
"""

from collections.abc import Iterator

MAGIC = b"\x02\x21\x4c\x18"
BLOCK_SIZE = 8 << 20
"""Bytes that every block but the last unpacks to."""

_SIZE_BYTES = 4
_MORE = 15
"""A length in a token that goes on in the bytes behind it."""
_LEAST_MATCH = 4
_LONGEST_PACKED = BLOCK_SIZE + BLOCK_SIZE // 255 + 16
"""What does not shrink grows by so much at most."""


class Lz4Error(ValueError):
    """The data is damaged; ``offset`` says where, in bytes from its start."""

    def __init__(self, message: str, offset: int) -> None:
        super().__init__(message)
        self.offset = offset


def unpack_blocks(data: bytes) -> Iterator[bytearray]:
    """Yield the contents of each block of a legacy frame. Up to four bytes behind the last one are ignored.

    Raises:
        Lz4Error: the data is damaged.
    """
    at = len(MAGIC)
    while at + _SIZE_BYTES < len(data):
        size = int.from_bytes(data[at : at + _SIZE_BYTES], "little")
        start = at + _SIZE_BYTES
        at = start + size
        if not 0 < size <= _LONGEST_PACKED:
            raise Lz4Error(f"a block of {size} bytes: 1 to {_LONGEST_PACKED} are possible", start)
        if at > len(data):
            raise Lz4Error(f"truncated: a block of {size} bytes, and {len(data) - start} are left", start)
        try:
            yield unpack_block(data[start:at])
        except Lz4Error as error:
            raise Lz4Error(str(error), start + error.offset) from error


def unpack_block(block: bytes) -> bytearray:
    """Return what ``block`` unpacks to, up to BLOCK_SIZE bytes. Raises Lz4Error when it is damaged."""
    out = bytearray()
    at, end = 0, len(block)
    try:
        while True:
            token = block[at]
            at += 1
            length = token >> 4
            if length:
                if length == _MORE:
                    length, at = _longer(block, at, BLOCK_SIZE - len(out))
                out += block[at : at + length]
                at += length
                if at >= end:
                    break
            offset = block[at] | block[at + 1] << 8
            at += 2
            start = len(out) - offset
            if start < 0 or not offset:
                raise Lz4Error(f"a match {offset} bytes back, and {len(out)} are there", at - 2)
            length = token & 15
            if length == _MORE:
                length, at = _longer(block, at, BLOCK_SIZE - len(out))
            length += _LEAST_MATCH
            if length <= offset:
                out += out[start : start + length]
            else:
                out += (out[start:] * (length // offset + 1))[:length]
    except IndexError:
        raise Lz4Error("truncated: a sequence ends in the middle", end) from None
    if at > end:
        raise Lz4Error(f"truncated: literals end {at - end} bytes behind their block", end)
    if len(out) > BLOCK_SIZE:
        raise Lz4Error(f"a block unpacks to more than {BLOCK_SIZE} bytes", 0)
    return out


def _longer(block: bytes, at: int, room: int) -> tuple[int, int]:
    """Return the length that goes on at ``at``, and where its bytes end. Raises Lz4Error, IndexError."""
    length, byte = _MORE, 255
    while byte == 255:
        byte = block[at]
        at += 1
        length += byte
    if length > room:
        raise Lz4Error(f"{length} bytes at once, and {room} of a block's {BLOCK_SIZE} are left", at)
    return length, at

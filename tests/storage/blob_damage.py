"""What the tests of damaged page blobs share: how to change what is in ``meta`` so that its CRC does not tell."""

import json
import zlib
from struct import pack

from kvmpy.storage.blob_meta_file import HEADER


def journal_of(path):
    return next(entry for entry in path.iterdir() if entry.name.startswith("journal-"))


def text_size(meta: bytes) -> int:
    return int.from_bytes(meta[16:24], "little")


def fields_of(meta: bytes):
    """Return what the text of a ``meta`` says."""
    return json.loads(meta[HEADER.size : HEADER.size + text_size(meta)])


def sealed(body: bytes) -> bytes:
    """Return a ``meta`` of this text and maps with a sound CRC."""
    return b"KVMPYBLB" + pack("<II", 1, zlib.crc32(body)) + body


def with_text(meta: bytes, change) -> bytes:
    """Return ``meta`` with a changed text and a sound CRC."""
    size = text_size(meta)
    fields = fields_of(meta)
    text = change(fields)
    text = json.dumps(fields if text is None else text).encode() if not isinstance(text, bytes) else text
    maps = meta[HEADER.size + size :]
    return sealed(pack("<QQ", len(text), len(maps)) + text + maps)

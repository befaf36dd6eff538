"""Sizes in bytes: the binary units, and the parser of what people type for them.

Not here: anything that knows what a size is for. Free for every floor.
"""

import re

KiB = 1 << 10
MiB = 1 << 20
GiB = 1 << 30
TiB = 1 << 40

PAGE_SIZE = 4 * KiB

_SUFFIXES = {"": 1, "K": KiB, "M": MiB, "G": GiB, "T": TiB}
_SIZE = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Read a size such as ``512M``, ``3.5G``, ``1.75GB`` or ``4096`` and return bytes.

    K, M, G and T are binary units (1 K = 1024), with or without ``B`` or ``iB``; a bare number is bytes.

    Raises:
        ValueError: the text is no size, or is not a whole number of bytes.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a size (examples: 512M, 3.5G, 1.75GB)")
    number, suffix = match.groups()
    whole, _, fraction = number.partition(".")
    # Integers all the way: 0.1G must be refused, not rounded.
    scale: int = 10 ** len(fraction)
    size, rest = divmod(int((whole or "0") + fraction) * _SUFFIXES[suffix.upper()], scale)
    if rest:
        raise ValueError(f"{text!r} is not a whole number of bytes")
    return size


def format_size(size: int) -> str:
    """Return ``size`` bytes the way a person would type it: ``3.5 GiB``, ``64 MiB``, ``513 bytes``."""
    for unit, name in ((TiB, "TiB"), (GiB, "GiB"), (MiB, "MiB"), (KiB, "KiB")):
        if size >= unit:
            return f"{size / unit:.2f}".rstrip("0").rstrip(".") + f" {name}"
    return f"{size} bytes"

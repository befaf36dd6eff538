"""Who watches guest memory: full copies before and after, and what may differ between them.

Not here: what was given to the device, which is the bench's to say.
"""

import os
from collections.abc import Iterable

from kvmpy.conformance.ram import HOLED
from kvmpy.machine.memory import GuestMemory

Range = tuple[int, int]
"""gpa and bytes."""
RAM = sum(size for _, size in HOLED)
"""Bytes that are copied and compared; a region behind them must stay untouched."""


def copy_of(memory: GuestMemory) -> bytes:
    """Return guest memory as it is."""
    return b"".join(memory.view(gpa, size) for gpa, size in HOLED)


def first_change(before: bytes, after: bytes, allowed: Iterable[Range]) -> int | None:
    """Return the first gpa that differs and lies in none of the ``allowed`` ranges, or None."""
    if before == after:
        return None
    copies = bytearray(before), bytearray(after)
    for gpa, size in allowed:
        for copy in copies:
            _blank(copy, gpa, size)
    if copies[0] == copies[1]:
        return None
    return _gpa(next(at for at, (a, b) in enumerate(zip(*copies, strict=True)) if a != b))


def is_touched(memory: GuestMemory) -> bool:
    """Tell whether anybody ever used the memory behind what is copied."""
    try:
        return os.lseek(memory.fd, RAM, os.SEEK_DATA) >= RAM
    except OSError:  # ENXIO: there is nothing but a hole
        return False


def _blank(copy: bytearray, gpa: int, size: int) -> None:
    at = 0
    for start, length in HOLED:
        low, high = max(gpa, start), min(gpa + size, start + length)
        if low < high:
            copy[at + low - start : at + high - start] = bytes(high - low)
        at += length


def _gpa(at: int) -> int:
    for gpa, size in HOLED:
        if at < size:
            return gpa + at
        at -= size
    raise ValueError(f"offset 0x{at:x} is behind all of guest memory")

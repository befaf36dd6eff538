"""Random x86 code, for the tests of the decoder: every opcode of every map, with prefixes and operands by chance."""

import random
from collections.abc import Iterator

from kvmpy.machine.assist.opcodes import LEGACY_PREFIXES

LEGACY_MAPS = (b"", b"\x0f", b"\x0f\x38", b"\x0f\x3a")
MANDATORY = (b"", b"\x66", b"\xf2", b"\xf3")
OTHER_PREFIXES = b"\x67\x2e\x36\x3e\x26\x64\x65\xf0\x66"


def prefixes(rng: random.Random, bits: int) -> bytes:
    """Return up to two prefixes, segments and LOCK among them."""
    return bytes(rng.choices(OTHER_PREFIXES, k=rng.choice((0, 0, 0, 1, 2))))


def rex(rng: random.Random, bits: int) -> bytes:
    """Return a REX for 64-bit code, or nothing."""
    return bytes([rng.randrange(0x40, 0x50)]) if bits == 64 and rng.random() < 0.5 else b""


def vex(rng: random.Random, bits: int, map: int, pp: int) -> bytes:
    """Return a VEX prefix of two or three bytes; outside 64-bit code it begins as LES and LDS with mod 3 do."""
    last = rng.randrange(256) & ~3 | pp
    second = rng.randrange(256) if bits == 64 else rng.randrange(0xC0, 0x100)
    if map == 1 and rng.random() < 0.5:
        return bytes([0xC5, second & 0x80 | last & 0x7F if bits == 64 else 0xC0 | last & 0x3F])
    return bytes([0xC4, second & ~0x1F | map, last])


def is_prefix(opcode: int, bits: int) -> bool:
    """Tell whether it is no opcode: behind a REX, objdump takes it for the beginning of another instruction."""
    return opcode in LEGACY_PREFIXES or (bits == 64 and opcode & 0xF0 == 0x40)


def every_opcode(rng: random.Random, bits: int) -> Iterator[bytes]:
    """Yield 15 bytes for each opcode of each map with each mandatory prefix, random in all else."""
    for opcode in range(256):
        for map in LEGACY_MAPS:
            for mandatory in () if map == b"" and is_prefix(opcode, bits) else MANDATORY:
                before = prefixes(rng, bits) + mandatory + rex(rng, bits)
                yield (before + map + bytes([opcode]) + rng.randbytes(15))[:15]
        for number in (1, 2, 3):
            for pp in range(4):
                yield (vex(rng, bits, number, pp) + bytes([opcode]) + rng.randbytes(15))[:15]

"""Random encodings of the rows of a table, and random states for them to meet.

The encoder is the tests' own: it shares nothing with `decode` and `relocate`.
"""

import struct
from random import Random
from typing import NamedTuple

from native_state import CODE, COMPONENTS, MEMORY, MEMORY_SIZE, XSAVE_SIZE, State

from kvmpy.machine.assist.rows import Row, Table

RSP, RBP = 4, 5
STATUS_FLAGS = 0x8D5
_MAPS = (b"", b"\x0f", b"\x0f\x38", b"\x0f\x3a")
_PP = {0: 0, 0x66: 1, 0xF3: 2, 0xF2: 3}
_LONGEST_OPERAND = 112


class _Address(NamedTuple):
    """A memory operand: the fields of ModRM, SIB and REX, and the displacement."""

    mod: int
    rm: int
    sib: bytes = b""
    index_bit: int = 0
    displacement: bytes = b""
    rip_relative: bool = False


class Encoder:
    """Encodes instructions at random. ``rows`` are those of ``table``, each behind its key."""

    def __init__(self, random: Random, table: Table) -> None:
        self.random = random
        self.rows = [(*key, row) for key, rows in table.items() for row in rows]

    def encode(self, map: int, opcode: int, prefix: int, vex: bool, row: Row) -> State:
        """Return the state before one random form of ``row``; its memory operand lies in the memory."""
        random = self.random
        names = [operand[0] for operand in row.operands if operand]
        w = random.getrandbits(1) if row.w is None else row.w
        reg = random.randrange(16) if row.reg is None else row.reg | random.randrange(2) << 3
        registers = [self.number() for _ in range(16)]
        address = _Address(3, random.randrange(16), index_bit=random.getrandbits(1))
        if "M" in names or (row.memory and random.random() < 0.5):
            address = self._address(registers, aligned=row.memory in ("x", "a", "dq"))
        code = self._outer_prefixes(registers, address)
        rex = w << 3 | reg >> 3 << 2 | address.index_bit << 1 | address.rm >> 3
        if vex:
            long = row.feature == "-" or (row.feature_256 != "-" and random.random() < 0.5)
            vvvv = random.randrange(16) if set(names) & {"H", "B"} else 0
            code += self._vex(map, rex, vvvv, long, prefix)
        else:
            code += self._legacy(map, rex, prefix, row)
        code += bytes([opcode])
        if (map, opcode) != (1, 0x77):  # EMMS and VZEROUPPER have no ModRM
            code += bytes([address.mod << 6 | (reg & 7) << 3 | address.rm & 7]) + address.sib
            immediate = random.randbytes(_immediate_size(map, opcode))
            displacement = address.displacement
            if address.rip_relative:
                displacement = struct.pack("<i", self._target(True) - CODE - len(code) - 4 - len(immediate))
            code += displacement + immediate
        return State(code, tuple(registers), random.getrandbits(12) & STATUS_FLAGS, self.xsave(), self.memory())

    def number(self) -> int:
        """Return 64 bits: of any kind, or with all or none of them."""
        kind = self.random.randrange(8)
        return (0, (1 << 64) - 1, self.random.getrandbits(32))[kind] if kind < 3 else self.random.getrandbits(64)

    def _target(self, aligned: bool) -> int:
        """Return where the memory operand shall be: seldom not aligned, where it has to be."""
        if aligned and self.random.random() < 0.9:
            return MEMORY + 32 * self.random.randrange(4)
        return MEMORY + self.random.randrange(MEMORY_SIZE - _LONGEST_OPERAND)

    def _address(self, registers: list[int], *, aligned: bool) -> _Address:
        """Make some registers point at the memory."""
        random = self.random
        if random.random() < 0.1:
            return _Address(0, RBP, displacement=bytes(4), rip_relative=True)
        base, displacement = random.randrange(16), random.choice((0, random.randrange(-128, 128), 0x1234))
        mod = 0 if displacement == 0 and base & 7 != RBP else 1 if -128 <= displacement < 128 else 2
        target, sib, index = self._target(aligned), b"", 0
        if base & 7 == RSP or random.random() < 0.3:
            index = random.choice([register for register in range(16) if register not in (RSP, base)])
            scale = random.randrange(4)
            registers[index] = random.randrange(-4096, 4096) % (1 << 64)
            target -= registers[index] << scale
            sib = bytes([scale << 6 | (index & 7) << 3 | base & 7])
        registers[base] = (target - displacement) % (1 << 64)
        packed = struct.pack("<b", displacement) if mod == 1 else struct.pack("<i", displacement) if mod else b""
        return _Address(mod, base & 8 | RSP if sib else base, sib, index >> 3, packed)

    def _outer_prefixes(self, registers: list[int], address: _Address) -> bytes:
        """Return prefixes that may stand before any other: a segment without effect, and 67 with junk above it."""
        code = b"\x3e" if self.random.random() < 0.1 else b""
        if address.mod != 3 and not address.rip_relative and self.random.random() < 0.1:
            base = address.sib[0] & 7 | address.rm & 8 if address.sib else address.rm
            registers[base] ^= self.random.getrandbits(32) << 32
            code += b"\x67"
        return code

    def _legacy(self, map: int, rex: int, prefix: int, row: Row) -> bytes:
        random = self.random
        prefixes = [bytes([prefix])] if prefix else []
        if row.memory == "v" and prefix in (0xF2, 0xF3) and random.random() < 0.3:
            prefixes.append(b"\x66")
        random.shuffle(prefixes)
        return b"".join(prefixes) + (bytes([0x40 | rex]) if rex or random.random() < 0.1 else b"") + _MAPS[map]

    def _vex(self, map: int, rex: int, vvvv: int, long: bool, prefix: int) -> bytes:
        last = (vvvv ^ 15) << 3 | long << 2 | _PP[prefix]
        if map == 1 and not rex & 0xB and self.random.random() < 0.5:
            return bytes([0xC5, (rex >> 2 & 1 ^ 1) << 7 | last])
        return bytes([0xC4, (rex & 7 ^ 7) << 5 | map, rex >> 3 << 7 | last])

    # --- the state --------------------------------------------------------------------------------------------------

    def memory(self) -> bytes:
        """Return 256 bytes of all kinds."""
        return b"".join(self.vector() for _ in range(MEMORY_SIZE // 16))

    def vector(self) -> bytes:
        """Return 16 bytes: anything, or four or two numbers of the kinds that there are."""
        random = self.random
        kind = random.randrange(4)
        if kind == 0:
            return random.randbytes(16)
        if kind == 1:
            return random.choice((bytes(16), b"\xff" * 16, bytes(range(16))))
        name, count, kinds = ("f", 4, _SINGLES) if kind == 2 else ("d", 2, _DOUBLES)
        return b"".join(
            random.choice(kinds) if random.random() < 0.4 else struct.pack(name, random.uniform(-100, 100))
            for _ in range(count)
        )

    def xsave(self, *, fcw: int = 0x37F, masks: int = 0x3F) -> bytes:
        """Return random FPU state with ``masks`` of SIMD exceptions, and an x87 stack of random numbers."""
        random = self.random
        control = fcw | random.randrange(4) << 10
        status = random.randrange(8) << 11 | random.getrandbits(6)
        tags, pointers = random.getrandbits(8), [random.choice((0, random.getrandbits(n))) for n in (11, 47, 47)]
        mxcsr = masks << 7 | random.getrandbits(6) | random.getrandbits(3) << 13 | random.getrandbits(1) << 6
        area = struct.pack("<HHBxHQQII", control, status, tags, *pointers, mxcsr, 0)
        area += b"".join(self.extended() + bytes(6) for _ in range(8)) + b"".join(self.vector() for _ in range(16))
        area = area.ljust(512, b"\0") + COMPONENTS.to_bytes(8, "little")
        area = area.ljust(576, b"\0")
        if COMPONENTS & 4:
            area += b"".join(self.vector() for _ in range(16))
        if COMPONENTS & 0xE0:
            area = area.ljust(1088, b"\0") + random.randbytes(XSAVE_SIZE - 1088)
        return area.ljust(XSAVE_SIZE, b"\0")

    def extended(self) -> bytes:
        """Return 10 bytes, a number of the x87 FPU."""
        random = self.random
        if random.random() < 0.3:
            return random.choice(_EXTENDED)
        mantissa, exponent = random.getrandbits(63) | 1 << 63, 16383 + random.randrange(-70, 70)
        return struct.pack("<QH", mantissa, exponent | random.getrandbits(1) << 15)


def _immediate_size(map: int, opcode: int) -> int:
    return int(map == 3 or (map == 1 and opcode in (0x70, 0x71, 0x72, 0x73, 0xC2, 0xC4, 0xC5, 0xC6)))


# Zeros, denormals, infinities, NaNs of both kinds, the least and greatest normal numbers, too large for an integer.
_SINGLES = [struct.pack("<I", bits) for bits in (0, 0x80000000, 1, 0x807FFFFF, 0x7F800000, 0xFF800000, 0x7FC00000)]
_SINGLES += [struct.pack("<I", bits) for bits in (0x7FA00001, 0x00800000, 0x7F7FFFFF, 0x4F000000, 0x3F800000)]
_DOUBLES = [struct.pack("<Q", bits << 32) for bits in (0, 0x80000000, 1, 0x7FF00000, 0xFFF00000, 0x7FF80000)]
_DOUBLES += [struct.pack("<Q", bits << 32 | 1) for bits in (0x7FF40000, 0xFFFFF, 0x41E00000, 0x7FEFFFFF, 0x3FF00000)]
_EXTENDED = [
    struct.pack("<QH", mantissa, exponent)
    for mantissa, exponent in (
        *((0, 0), (0, 0x8000), (1, 0), (1 << 63, 0x7FFF), (3 << 62, 0xFFFF), (5 << 61, 0x7FFF), (1 << 62, 0x3FFF)),
        *((1 << 63, 0x3FFF), ((1 << 64) - 1, 0x7FFE), (1 << 63, 1), (1, 0x3FFF)),
    )
]

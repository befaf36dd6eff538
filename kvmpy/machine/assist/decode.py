"""The x86 instruction format: where an instruction ends, and what its operands are.

::

    66 67 F0 F2 F3 segment | REX | 0F, 0F 38, 0F 3A | opcode | ModRM | SIB | displacement | immediate
                             VEX (C5, C4): REX, 66/F2/F3 and the map in two or three bytes

What an instruction does is not known here. EVEX, XOP, 3DNow and instructions with an address for each element are
refused. The bytes come from a guest: any bytes give an `Instruction` or a `DecodeError`.

Floor: machine.

Source: Intel SDM vol. 2 §2.1 to §2.3 and appendix A.
"""

from typing import NamedTuple

from kvmpy.machine.assist import opcodes
from kvmpy.machine.assist.instruction import (
    RBP,
    RSP,
    DecodeError,
    Instruction,
    MemoryOperand,
    OpcodeMap,
    TooShort,
    effective_address,
)
from kvmpy.machine.assist.relocate import relocate, scratch_registers

__all__ = [
    "DecodeError",
    "Instruction",
    "MemoryOperand",
    "OpcodeMap",
    "TooShort",
    "decode",
    "effective_address",
    "relocate",
    "scratch_registers",
]

MAXIMUM_LENGTH = 15
"""Longer ones raise #GP (Intel SDM vol. 2 §2.3.11)."""

# Base and index of 16-bit addresses by ModRM.rm (Intel SDM vol. 2, table 2-1): bx+si bx+di bp+si bp+di si di bp bx.
_BASE_16 = (3, 3, 5, 5, 6, 7, 5, 3)
_INDEX_16 = (6, 7, 6, 7, None, None, None, None)


class _Cursor:
    """The bytes of one instruction, one field after the other."""

    def __init__(self, code: bytes) -> None:
        self._code, self.at = code, 0

    def take(self, size: int) -> bytes:
        end = self.at + size
        if end > MAXIMUM_LENGTH:
            raise DecodeError(f"longer than {MAXIMUM_LENGTH} bytes")
        if end > len(self._code):
            raise TooShort(f"ends within an instruction, after {len(self._code)} bytes")
        data, self.at = self._code[self.at : end], end
        return data

    def byte(self) -> int:
        return self.take(1)[0]

    def peek(self) -> int:
        """Return the next byte, and stay before it."""
        value = self.byte()
        self.at -= 1
        return value

    def signed(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little", signed=True)


class _Prefixes(NamedTuple):
    """The prefixes before the opcode. ``repeat`` is 0, 0xF2 or 0xF3; ``rex`` 0 where there is none."""

    operand: bool
    address: bool
    lock: bool
    repeat: int
    segment: str
    rex: int


class _Vex(NamedTuple):
    """A VEX prefix; ``rex`` has the bits of a REX."""

    map: int
    rex: int
    vvvv: int
    vector_length: int
    prefix: int


class _Operands(NamedTuple):
    """What ModRM says, or an opcode that has a register in it."""

    modrm: int | None = None
    reg: int = 0
    rm: int = 0
    memory: MemoryOperand | None = None
    modrm_at: int = 0


def decode(code: bytes, *, bits: int = 64) -> Instruction:
    """Return the instruction that ``code`` begins with, as ``bits``-bit code has it.

    Raises:
        DecodeError: there is none; TooShort when more bytes could make it one.
    """
    cursor = _Cursor(code)
    prefixes = _read_prefixes(cursor, bits)
    first = cursor.byte()
    vex = _read_vex(cursor, first, prefixes, bits)
    if vex:
        map, opcode, rex, prefix = OpcodeMap(vex.map), cursor.byte(), vex.rex, vex.prefix
    else:
        map, opcode = _read_opcode(cursor, first)
        rex, prefix = prefixes.rex, prefixes.repeat or (0x66 if prefixes.operand else 0)
    form = _form(map, opcode, prefix, bits, vex is not None)
    rex_w = bool(rex & 8)
    operand16 = prefixes.operand != (bits == 16) and not rex_w and not vex
    address_size = _address_size(bits, prefixes.address)
    operands = _read_operands(cursor, form, rex, bits, address_size)
    if map is OpcodeMap.ONE and opcode == 0x8F and operands.reg & 7:
        raise DecodeError("XOP")
    if vex and map is OpcodeMap.THREE_0F38 and opcode in opcodes.VECTOR_INDEX and operands.memory:
        raise DecodeError("an address for each element")
    if opcode in opcodes.OPCODE_REGISTER[map] and not vex:
        operands = operands._replace(rm=opcode & 7 | (rex & 1) << 3)
    if operands.memory and prefixes.segment:
        operands = operands._replace(memory=operands.memory._replace(segment=prefixes.segment))
    size = _immediate_size(form, operands.reg, operand16, rex_w, bits)
    immediate_at = cursor.at if size else 0
    immediate = cursor.take(size)
    return Instruction(
        raw=bytes(code[: cursor.at]),
        bits=bits,
        map=map,
        opcode=opcode,
        prefix=prefix,
        operand16=operand16,
        lock=prefixes.lock,
        rex_w=rex_w,
        address_size=address_size,
        vex=vex is not None,
        vvvv=vex.vvvv if vex else 0,
        vector_length=vex.vector_length if vex else 0,
        immediate=immediate,
        immediate_at=immediate_at,
        **operands._asdict(),
    )


def _read_prefixes(cursor: _Cursor, bits: int) -> _Prefixes:
    """Read up to the opcode. A REX that is not the last prefix is ignored (Intel SDM vol. 2 §2.2.1)."""
    operand = address = lock = False
    repeat, segment, rex = 0, "", 0
    while True:
        byte = cursor.peek()
        if bits == 64 and byte & 0xF0 == 0x40:
            rex = byte
        elif byte not in opcodes.LEGACY_PREFIXES:
            return _Prefixes(operand, address, lock, repeat, segment, rex)
        else:
            rex = 0
            operand, address, lock = operand or byte == 0x66, address or byte == 0x67, lock or byte == 0xF0
            if byte in (0xF2, 0xF3):
                repeat = byte
            elif byte in opcodes.SEGMENTS and (bits != 64 or byte >= 0x64):
                segment = opcodes.SEGMENTS[byte]
        cursor.at += 1


def _read_vex(cursor: _Cursor, first: int, prefixes: _Prefixes, bits: int) -> _Vex | None:
    """Read the rest of a VEX prefix, if ``first`` begins one: outside 64-bit code LDS and LES have mod 0 to 2."""
    if first not in (0xC4, 0xC5, 0x62) or (bits != 64 and cursor.peek() < 0xC0):
        return None
    if first == 0x62:
        raise DecodeError("EVEX")
    if prefixes.operand or prefixes.repeat or prefixes.lock or prefixes.rex:
        raise DecodeError("VEX after 66, F0, F2, F3 or REX")
    second = cursor.byte()
    if first == 0xC5:
        map, rex, last = 1, (second >> 7 ^ 1) << 2, second & 0x7F
    else:
        last = cursor.byte()
        map, rex = second & 0x1F, (second >> 5 ^ 7) | last >> 7 << 3
    if bits != 64:
        rex &= 8
    if map not in (1, 2, 3):
        raise DecodeError(f"VEX with map {map}")
    vvvv = (last >> 3 & 15 ^ 15) & (15 if bits == 64 else 7)
    return _Vex(map, rex, vvvv, 256 if last & 4 else 128, opcodes.VEX_PREFIXES[last & 3])


def _read_opcode(cursor: _Cursor, first: int) -> tuple[OpcodeMap, int]:
    if first != 0x0F:
        return OpcodeMap.ONE, first
    second = cursor.byte()
    if second == 0x38:
        return OpcodeMap.THREE_0F38, cursor.byte()
    if second == 0x3A:
        return OpcodeMap.THREE_0F3A, cursor.byte()
    return OpcodeMap.TWO_0F, second


def _form(map: OpcodeMap, opcode: int, prefix: int, bits: int, vex: bool) -> str:
    """Return what follows the opcode, in the letters of `opcodes`."""
    form = (opcodes.VEX_MAPS if vex else opcodes.MAPS)[map][opcode]
    if map is OpcodeMap.TWO_0F and not vex:
        if opcode == 0xB8 and prefix != 0xF3:
            form = "-"  # POPCNT is F3 0F B8
        if opcode == 0x78 and prefix in (0x66, 0xF2):
            form = "W"  # EXTRQ and INSERTQ of SSE4a (AMD APM vol. 4)
    if form == "-" or (map is OpcodeMap.ONE and bits == 64 and opcode in opcodes.NOT_IN_64):
        raise DecodeError(f"opcode {map.name} 0x{opcode:02x} is undefined" + (" with VEX" if vex else ""))
    return form


def _address_size(bits: int, prefix: bool) -> int:
    if not prefix:
        return bits
    return 16 if bits == 32 else 32


def _immediate_size(form: str, reg: int, operand16: bool, rex_w: bool, bits: int) -> int:
    by_operand = 2 if operand16 else 4
    match form:
        case "b" | "B":
            return 1
        case "z" | "Z":
            return by_operand
        case "j":
            return 4 if bits == 64 else by_operand
        case "v":
            return 8 if rex_w else by_operand
        case "w" | "W":
            return 2
        case "e":
            return 3
        case "p":
            return by_operand + 2
        case "g":
            return 1 if reg & 7 < 2 else 0
        case "G":
            return by_operand if reg & 7 < 2 else 0
    return 0


def _read_operands(cursor: _Cursor, form: str, rex: int, bits: int, address_size: int) -> _Operands:
    """Read ModRM, SIB and displacement, or the offset that an accumulator move has instead."""
    if form == "o":
        offset = int.from_bytes(cursor.take(address_size // 8), "little")
        return _Operands(memory=MemoryOperand(None, None, 1, offset, False, "ds"))
    if not form.isupper() and form != "g":
        return _Operands()
    modrm_at, modrm = cursor.at, cursor.byte()
    memory = None
    if modrm < 0xC0 and form != "C":
        memory = _read_memory_16(cursor, modrm) if address_size == 16 else _read_memory(cursor, modrm, rex, bits)
    return _Operands(modrm, modrm >> 3 & 7 | (rex & 4) << 1, modrm & 7 | (rex & 1) << 3, memory, modrm_at)


def _read_memory(cursor: _Cursor, modrm: int, rex: int, bits: int) -> MemoryOperand:
    """Read SIB and displacement of a 32- or 64-bit address (Intel SDM vol. 2, tables 2-2 and 2-3)."""
    mod, rm = modrm >> 6, modrm & 7
    base: int | None = rm | (rex & 1) << 3
    index, scale, rip_relative = None, 1, False
    if rm == 4:
        sib = cursor.byte()
        base, index, scale = sib & 7 | (rex & 1) << 3, sib >> 3 & 7 | (rex & 2) << 2, 1 << (sib >> 6)
        if index == RSP:
            index, scale = None, 1
        rm = sib & 7
    elif rm == 5 and mod == 0:
        rip_relative = bits == 64
    if rm == 5 and mod == 0:
        base, mod = None, 2
    displacement = cursor.signed((0, 1, 4)[mod])
    return MemoryOperand(base, index, scale, displacement, rip_relative, "ss" if base in (RSP, RBP) else "ds")


def _read_memory_16(cursor: _Cursor, modrm: int) -> MemoryOperand:
    """Read the displacement of a 16-bit address (Intel SDM vol. 2, table 2-1)."""
    mod, rm = modrm >> 6, modrm & 7
    if mod == 0 and rm == 6:
        return MemoryOperand(None, None, 1, cursor.signed(2), False, "ds")
    base = _BASE_16[rm]
    return MemoryOperand(base, _INDEX_16[rm], 1, cursor.signed(mod), False, "ss" if base == RBP else "ds")

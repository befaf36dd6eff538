"""What follows each x86 opcode, and which of its operands are general registers: the tables of `decode`.

A map is 16 rows of 16 opcodes, one character each::

    .  nothing follows               M  ModRM
    b  8-bit immediate or offset     B  ModRM, 8-bit immediate
    z  16 or 32 bits                 Z  ModRM, 16 or 32 bits
    j  near branch: as z, but 32 bits in 64-bit code (so Intel; with 66, AMD has 16)
    v  16, 32 or 64 bits             o  an offset of the address size (MOV of the accumulator)
    w  16 bits (W: and ModRM)        e  16 and 8 bits (ENTER)
    p  far pointer                   C  ModRM that always names registers (MOV of CRn and DRn)
    g  ModRM, and 8 bits with /0 and /1 (TEST)      G  the same with 16 or 32 bits
    -  undefined, a prefix, or an escape to another map

Opcodes of the groups are not told apart: what is undefined in a group still has a length.

Source: Intel SDM vol. 2, appendix A.2 and A.3 (opcode maps), A.4 (groups), §2.3 (VEX).
"""

SEGMENTS = {0x26: "es", 0x2E: "cs", 0x36: "ss", 0x3E: "ds", 0x64: "fs", 0x65: "gs"}
LEGACY_PREFIXES = frozenset((*SEGMENTS, 0x66, 0x67, 0xF0, 0xF2, 0xF3))
VEX_PREFIXES = (0, 0x66, 0xF3, 0xF2)
"""The mandatory prefix by VEX.pp (Intel SDM vol. 2, figure 2-9)."""

ONE_BYTE = """
    MMMMbz.. MMMMbz.- MMMMbz.. MMMMbz..
    MMMMbz-. MMMMbz-. MMMMbz-. MMMMbz-.
    ........ ........ ........ ........
    ..MM---- zZbB.... bbbbbbbb bbbbbbbb
    BZBBMMMM MMMMMMMM ........ ..p.....
    oooo.... bz...... bbbbbbbb vvvvvvvv
    BBw.MMBZ e.w..b.. MMMMbb-. MMMMMMMM
    bbbbbbbb jjpb.... -.--..gG ......MM
"""

TWO_BYTE_0F = """
    MMMM-... ..-.-M-- MMMMMMMM MMMMMMMM
    CCCC---- MMMMMMMM ......-. --------
    MMMMMMMM MMMMMMMM MMMMMMMM MMMMMMMM
    MMMMMMMM MMMMMMMM BBBBMMM. MM--MMMM
    jjjjjjjj jjjjjjjj MMMMMMMM MMMMMMMM
    ...MBM-- ...MBMMM MMMMMMMM MMBMMMMM
    MMBMBBBM ........ MMMMMMMM MMMMMMMM
    MMMMMMMM MMMMMMMM MMMMMMMM MMMMMMMM
"""

VEX_0F = """
    -------- -------- MMMMMMMM --------
    -------- MMMMMMMM -------- --------
    -MM-MMMM --MM---- MMMMMMMM MMMMMMMM
    MMMMMMMM MMMMMMMM BBBBMMM. ----MMMM
    -------- -------- MMMM---- MM------
    -------- ------M- -------- --------
    --B-BBB- -------- MMMMMMMM MMMMMMMM
    MMMMMMMM MMMMMMMM MMMMMMMM MMMMMMMM
"""

THREE_BYTE_0F38 = 256 * "M"
THREE_BYTE_0F3A = 256 * "B"

MAPS = tuple("".join(text.split()) for text in (ONE_BYTE, TWO_BYTE_0F, THREE_BYTE_0F38, THREE_BYTE_0F3A))
VEX_MAPS = (256 * "-", "".join(VEX_0F.split()), *MAPS[2:])
"""The maps by `OpcodeMap`, without and with VEX."""


def _set(text: str) -> frozenset[int]:
    """Return the opcodes that ``text`` names: ``"00-03 63"``."""
    found: set[int] = set()
    for part in text.split():
        first, _, last = part.partition("-")
        found.update(range(int(first, 16), int(last or first, 16) + 1))
    return frozenset(found)


NOT_IN_64 = _set("06 07 0e 16 17 1e 1f 27 2f 37 3f 60-62 82 9a c4 c5 ce d4 d5 d6 ea")
"""One-byte opcodes that 64-bit code does not have (Intel SDM vol. 2, appendix A.2, superscript i64)."""

VECTOR_INDEX = _set("4b 90-93")
"""VEX 0F38: an address for each element (VSIB gathers, §2.3.12) or each row (AMX tile loads)."""

# --- which operands are general registers, by map ------------------------------------------------------------------

_ALU = "00-03 08-0b 10-13 18-1b 20-23 28-2b 30-33 38-3b"

REG_GENERAL = (
    _set(f"{_ALU} 62 63 69 6b 84-8b 8d c4 c5"),
    _set("02 03 40-4f 50 a3-a5 ab-ad af b0-b9 bb-bf c0 c1 c3 c5 d7 ff"),
    _set("80-82 f0-f2 f5-fc"),
    _set(""),
)
"""ModRM.reg, without VEX."""

RM_GENERAL = (
    _set(f"{_ALU} 63 69 6b 80-8f c0 c1 c6 c7 d0-d3 f6 f7 fe ff"),
    _set("00 02 03 0d 18 19 1c-23 40-4f 6e 90-9f a3-a5 ab-ad af b0 b1 b3 b6-c1 c4 c7 ff"),
    _set("f0-f2 f5-fc"),
    _set("14-17 20 22"),
)
"""ModRM.rm with mod 3, without VEX. `general_operands` knows those that depend on more than the opcode."""

VEX_REG_GENERAL = (_set(""), _set("50 93 c5 d7"), _set("e0-ef f2 f5-f7"), _set("f0"))
VEX_RM_GENERAL = (_set(""), _set("6e 92 c4"), _set("f2 f3 f5-f7"), _set("14-17 20 22 f0"))
VEX_VVVV_GENERAL = (_set(""), _set(""), _set("e0-ef f2 f3 f5-f7"), _set(""))

OPCODE_REGISTER = (_set("40-5f 90-97 b0-bf"), _set("c8-cf"), _set(""), _set(""))
"""The register is in the low three bits of the opcode."""

_ALU_8 = "00 02 08 0a 10 12 18 1a 20 22 28 2a 30 32 38 3a"
REG_BYTE = (_set(f"{_ALU_8} 84 86 88 8a"), _set("b0 c0"), _set(""), _set(""))
RM_BYTE = (
    _set(f"{_ALU_8} 80 82 84 86 88 8a b0-b7 c0 c6 d0 d2 f6 fe"),
    _set("90-9f b0 b6 be c0"),
    _set("f0"),
    _set(""),
)
"""Registers of 8 bits: 4 to 7 are ah, ch, dh and bh, but with REX spl, bpl, sil and dil."""

USES_RSI_RDI = (_set("6c-6f a4-a7 aa-af"), _set("f7"), _set(""), _set(""))
"""String instructions, and the masked moves."""

USES_R11 = (_set(""), _set("05 07"), _set(""), _set(""))
"""SYSCALL and SYSRET."""

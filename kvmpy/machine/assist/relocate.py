"""The same instruction with other registers and its memory operand elsewhere: for executing it on the host.

Floor: machine.

Source: Intel SDM vol. 2 §2.1.5 (ModRM), §2.2.1 (REX), §2.3.5 (VEX).
"""

from kvmpy.machine.assist import opcodes
from kvmpy.machine.assist.instruction import R11, R12, R13, RBP, RDI, RSI, RSP, Instruction, OpcodeMap

_AH_TO_BH = range(4, 8)


def general_operands(instruction: Instruction) -> frozenset[str]:
    """Return which of ``reg``, ``rm`` and ``vvvv`` are general registers."""
    map, opcode, prefix = instruction.map, instruction.opcode, instruction.prefix
    if instruction.modrm is None:
        return frozenset({"rm"} if not instruction.vex and opcode in opcodes.OPCODE_REGISTER[map] else ())
    if instruction.vex:
        reg, rm = opcode in opcodes.VEX_REG_GENERAL[map], opcode in opcodes.VEX_RM_GENERAL[map]
    else:
        reg, rm = opcode in opcodes.REG_GENERAL[map], opcode in opcodes.RM_GENERAL[map]
    vvvv = instruction.vex and opcode in opcodes.VEX_VVVV_GENERAL[map]
    if map is OpcodeMap.TWO_0F:
        scalar = prefix in (0xF2, 0xF3)
        reg = reg or (opcode in (0x2C, 0x2D) and scalar)
        rm = rm or (opcode == 0x2A and scalar) or (opcode == 0x7E and not scalar)
    if map is OpcodeMap.TWO_0F and not instruction.vex:
        vmread_vmwrite = opcode in (0x78, 0x79) and not prefix
        reg = reg or vmread_vmwrite
        rm = rm or vmread_vmwrite or (opcode in (0x1A, 0x1B) and prefix != 0x66)
        group = instruction.reg & 7
        rm = rm or (opcode == 0x01 and group in (4, 6))  # SMSW, LMSW
        if opcode == 0xAE and prefix:  # RDFSBASE and others; UMWAIT, TPAUSE
            rm = group == 6 or (prefix == 0xF3 and group < 6)
    names = (("reg", reg), ("rm", rm and instruction.memory is None), ("vvvv", vvvv))
    return frozenset(name for name, is_general in names if is_general)


def scratch_registers(instruction: Instruction, count: int) -> tuple[int, ...]:
    """Return ``count`` registers that it neither names nor uses implicitly: rsi, rdi, or one of r8 to r15.

    Raises:
        ValueError: there are not so many.
    """
    map, opcode, memory = instruction.map, instruction.opcode, instruction.memory
    used: set[int | None] = {instruction.reg, instruction.rm, instruction.vvvv, R12, R13}
    if memory:
        used |= {memory.base, memory.index}
    if opcode in opcodes.USES_RSI_RDI[map]:
        used |= {RSI, RDI}
    if opcode in opcodes.USES_R11[map]:
        used.add(R11)
    free = tuple(register for register in range(RSI, 16) if register not in used)
    if len(free) < count:
        raise ValueError(f"{count} scratch registers: it leaves {len(free)}")
    return free[:count]


def relocate(instruction: Instruction, *, base: int, rsp: int | None = None) -> bytes:
    """Return the same instruction with its memory operand at (``base``), for 64-bit code without segment bases.

    Segment and 67 prefixes are dropped. With ``rsp`` that register stands in for the general register 4. Memory that
    an instruction reaches otherwise (strings, the stack, an address in a register as MOVDIR64B has) stays where it is;
    offsets of branches stay too.

    Raises:
        ValueError: it is not 64-bit code, ``base`` would need a SIB or a displacement, or it cannot be encoded: one
            of ah, ch, dh, bh beside a register that needs REX.
    """
    if instruction.bits != 64:
        raise ValueError("relocation of code that is not 64-bit")
    if not 0 <= base < 16 or base & 7 in (RSP, RBP):
        raise ValueError(f"base register {base}: rsp, rbp, r12 and r13 need a SIB or a displacement")
    prefixes = _prefixes(instruction)
    has_rex = bool(prefixes) and prefixes[-1] & 0xF0 == 0x40  # an empty one too makes spl of ah
    high = frozenset() if has_rex else _high_byte_operands(instruction)
    general = general_operands(instruction) - high

    def stand_in(name: str, register: int) -> int:
        return rsp if rsp is not None and register == RSP and name in general else register

    opcode, modrm = instruction.opcode, instruction.modrm
    reg, rm, vvvv = (stand_in(name, getattr(instruction, name)) for name in ("reg", "rm", "vvvv"))
    if instruction.memory:
        rm = base
        if modrm is None:  # MOV of the accumulator, which has another opcode with ModRM
            opcode, modrm = {0xA0: 0x8A, 0xA1: 0x8B, 0xA2: 0x88, 0xA3: 0x89}[opcode], 0
    elif modrm is None and opcode in opcodes.OPCODE_REGISTER[instruction.map]:
        opcode = opcode & 0xF8 | rm & 7
    bits = instruction.rex_w << 3 | reg >> 3 << 2 | rm >> 3
    if high and bits:
        raise ValueError("one of ah, ch, dh, bh beside a register that needs REX")
    if instruction.vex:
        out = _vex_prefix(instruction, bits, vvvv)
    else:
        out = _legacy_prefix(instruction, prefixes, 0x40 | bits if has_rex or bits else 0)
    out += bytes([opcode])
    if modrm is not None:
        out += bytes([(0 if instruction.memory else 0xC0) | (reg & 7) << 3 | rm & 7])
    return out + instruction.immediate


def _high_byte_operands(instruction: Instruction) -> frozenset[str]:
    """Return which of ``reg`` and ``rm`` are ah, ch, dh or bh, if the instruction has no REX."""
    map, opcode = instruction.map, instruction.opcode
    if instruction.vex:
        return frozenset()
    reg = instruction.modrm is not None and opcode in opcodes.REG_BYTE[map] and instruction.reg in _AH_TO_BH
    rm = instruction.memory is None and opcode in opcodes.RM_BYTE[map] and instruction.rm in _AH_TO_BH
    return frozenset(name for name, is_high in (("reg", reg), ("rm", rm)) if is_high)


def _prefixes(instruction: Instruction) -> bytes:
    """Return the bytes before the opcode (of a VEX instruction: before the VEX)."""
    raw, at = instruction.raw, 0
    while raw[at] in opcodes.LEGACY_PREFIXES or raw[at] & 0xF0 == 0x40:
        at += 1
    return raw[:at]


def _legacy_prefix(instruction: Instruction, prefixes: bytes, rex: int) -> bytes:
    """Return all up to the opcode, without the prefixes that change the address. ``rex`` is 0 where none is needed."""
    out = b"\xf0" if instruction.lock else b""
    if 0x66 in prefixes:
        out += b"\x66"
    if instruction.prefix in (0xF2, 0xF3):
        out += bytes([instruction.prefix])
    if rex:
        out += bytes([rex])
    return out + (b"", b"\x0f", b"\x0f\x38", b"\x0f\x3a")[instruction.map]


def _vex_prefix(instruction: Instruction, bits: int, vvvv: int) -> bytes:
    """Return the three-byte form, which can say all that the two-byte form says."""
    length, pp = instruction.vector_length == 256, opcodes.VEX_PREFIXES.index(instruction.prefix)
    second = (bits & 7 ^ 7) << 5 | instruction.map
    return bytes([0xC4, second, instruction.rex_w << 7 | (vvvv ^ 15) << 3 | length << 2 | pp])

"""What a decoded x86 instruction is: its operands, and where its fields are in its bytes.

Floor: machine.

Source: Intel SDM vol. 2 §2.1 to §2.3.
"""

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

# Numbers of general registers that encodings treat specially (Intel SDM vol. 2, table 2-2).
RSP, RBP, RSI, RDI, R11, R12, R13 = 4, 5, 6, 7, 11, 12, 13


class DecodeError(ValueError):
    """These bytes are no instruction, or none that is decoded here."""


class TooShort(DecodeError):
    """The bytes end within the instruction."""


class OpcodeMap(IntEnum):
    """The map of an opcode, with the numbers of VEX.mmmmm."""

    ONE = 0
    TWO_0F = 1
    THREE_0F38 = 2
    THREE_0F3A = 3


class MemoryOperand(NamedTuple):
    """``segment:[base + index * scale + displacement]``; registers by number, ``displacement`` with its sign.

    ``segment`` is the override, or the default: ss with rsp and rbp, else ds. 64-bit code ignores the overrides but
    fs and gs (Intel SDM vol. 1 §3.4.2.1).
    """

    base: int | None
    index: int | None  # type: ignore[assignment]  # hides tuple.index
    scale: int
    displacement: int
    rip_relative: bool
    segment: str


class Instruction(NamedTuple):
    """One instruction. ``raw`` is exactly its bytes.

    ``prefix`` is the mandatory prefix: 0, 0x66, 0xF2 or 0xF3. ``operand16``: the operand size is 16 bits.
    ``memory`` is None where ModRM names two registers. ``rm`` is also the register of an opcode that has it in its
    low three bits. Offsets (``modrm_at``, ``immediate_at``) are 0 where there is no such field.
    """

    raw: bytes
    bits: int
    map: OpcodeMap
    opcode: int
    prefix: int
    operand16: bool
    lock: bool
    rex_w: bool
    address_size: int
    vex: bool
    vvvv: int
    vector_length: int
    modrm: int | None
    reg: int
    rm: int
    memory: MemoryOperand | None
    immediate: bytes
    modrm_at: int
    immediate_at: int


def effective_address(instruction: Instruction, registers: Sequence[int], next_rip: int) -> int:
    """Return the offset of the memory operand, without the segment's base, cut to the address size.

    Raises:
        ValueError: there is no memory operand.
    """
    memory = instruction.memory
    if memory is None:
        raise ValueError("no memory operand")
    address = memory.displacement + (next_rip if memory.rip_relative else 0)
    if memory.base is not None:
        address += registers[memory.base]
    if memory.index is not None:
        address += registers[memory.index] * memory.scale
    return address & ((1 << instruction.address_size) - 1)

"""What the processor may be asked to execute for a guest: tables of instructions, and the row of a given one.

A table is text. A line has a shape and, behind the colon, the opcodes and names of the instructions of that shape::

    66 0F V,H,Wx sse2 avx avx2: 60 punpcklbw 61 punpcklwd
    |  |  |      |    |   |
    |  |  |      |    |   the host's feature for VEX with 256 bits; - there is none, = the length is ignored
    |  |  |      |    the same for VEX with 128 bits; - there is none
    |  |  |      the same without VEX; - there is none, * none is needed
    |  |  operands, the destination first: it alone is written
    |  map; an opcode of a group has /digit, ModRM.reg
    mandatory prefix: NP 66 F2 F3; NP+66: 66 is the operand size

and behind the features: W0 or W1 where REX.W or VEX.W must be so, LOCK where that prefix may be. Operands are letters
of Intel SDM vol. 2, appendix A.2.1: V H W U are vector registers (ModRM.reg, VEX.vvvv, ModRM.rm or memory, ModRM.rm),
P Q N the same of MMX, G B E R general registers, M is memory alone, L a register in the immediate, - none of these;
F is what the x87 FPU has. Behind W Q E M is the size in memory: a key of the dictionaries below. H, B and L are there
with VEX only.

What is in no table is not executed. What a table has and these rules forbid raises #UD, as the processor would.

Source: Intel SDM vol. 2, the instructions' pages and §2.3 (VEX).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from kvmpy.machine.assist.decode import Instruction, OpcodeMap

FIXED = {"b": 1, "w": 2, "d": 4, "q": 8, "t": 10, "dq": 16, "udq": 16}
BY_LENGTH = {"x": 16, "u": 16, "a": 16, "h": 8, "f": 4, "e": 2}
BY_OPERAND_SIZE = {"v": (4, 2, 8), "y": (4, 4, 8), "env": (28, 14, 28), "save": (108, 94, 108)}
"""Bytes of a memory operand.

dq is 16 bytes, aligned unless there is VEX; udq need not be aligned. x is the whole vector, aligned unless there is
VEX; u is never aligned, a always; h, f and e are half, a quarter and an eighth of the vector. The last three numbers
are for an operand size of 32, 16 and 64 bits.
"""

_MEMORY, _VECTOR, _MMX = "WQEM", "VHWUL", "PQN"
_PREFIXES = {"NP": (0,), "66": (0x66,), "F2": (0xF2,), "F3": (0xF3,), "NP+66": (0, 0x66)}
_MAPS = {"0F": OpcodeMap.TWO_0F, "0F38": OpcodeMap.THREE_0F38, "0F3A": OpcodeMap.THREE_0F3A}


@dataclass(frozen=True)
class Row:
    """One instruction in one encoding: without VEX, or with VEX of any length."""

    name: str
    operands: tuple[str, ...]
    feature: str
    feature_256: str = "-"
    vex: bool = False
    w: int | None = None
    reg: int | None = None
    lockable: bool = False

    @cached_property
    def memory(self) -> str:
        """The size of the memory operand, as the table has it; nothing where there can be none."""
        return next((operand[1:] for operand in self.operands if operand[0] in _MEMORY), "")

    @cached_property
    def writes_memory(self) -> bool:
        """The memory operand, if there is one, is the destination."""
        return self.operands[0][0] in _MEMORY

    @cached_property
    def vector(self) -> bool:
        """It uses vector registers."""
        return any(operand[0] in _VECTOR for operand in self.operands)

    @cached_property
    def mmx(self) -> bool:
        """It uses MMX registers, which are those of the x87 FPU."""
        return any(operand[0] in _MMX for operand in self.operands)

    @cached_property
    def x87(self) -> bool:
        """It is one of the x87 FPU."""
        return any(operand[0] == "F" for operand in self.operands)

    def size(self, instruction: Instruction) -> int:
        """Return the bytes of the memory operand of ``instruction``."""
        if self.memory in BY_LENGTH:
            return BY_LENGTH[self.memory] * (2 if instruction.vector_length == 256 else 1)
        if self.memory in BY_OPERAND_SIZE:
            return BY_OPERAND_SIZE[self.memory][2 if instruction.rex_w else int(instruction.operand16)]
        return FIXED[self.memory]

    def alignment(self, instruction: Instruction) -> int:
        """Return what the address of the memory operand must be a multiple of, or it is #GP(0)."""
        aligned = self.memory == "a" or (self.memory in ("x", "dq") and not self.vex)
        return self.size(instruction) if aligned else 1

    def allows(self, instruction: Instruction) -> bool:
        """Tell whether the processor has this form of it: else it raises #UD."""
        if instruction.memory is None:
            form = not any(operand[0] == "M" for operand in self.operands)
        else:
            form = bool(self.memory)
        if instruction.vex:
            form = form and (instruction.vvvv == 0 or any(operand[0] in "HB" for operand in self.operands))
            form = form and self.feature_of(instruction) != "-"
        return form and self.w in (None, int(instruction.rex_w)) and (self.lockable or not instruction.lock)

    def feature_of(self, instruction: Instruction) -> str:
        """Return the feature that the host's processor must have."""
        return self.feature_256 if instruction.vector_length == 256 and self.feature_256 != "=" else self.feature


Table = dict[tuple[int, int, int, bool], list[Row]]
"""Rows by map, opcode, mandatory prefix and whether there is VEX."""


def parse(text: str) -> Table:
    """Return the table that ``text`` is."""
    table: Table = {}
    for line in text.splitlines():
        shape, _, instructions = line.partition(":")
        if shape and not shape.startswith("#"):
            for key, row in _rows(shape.split(), instructions.split()):
                table.setdefault(key, []).append(row)
    return table


def _rows(shape: list[str], instructions: list[str]) -> Iterator[tuple[tuple[int, int, int, bool], Row]]:
    prefixes, map, operands, legacy, short, long, *rest = shape
    w = 0 if "W0" in rest else 1 if "W1" in rest else None
    letters = tuple(operands.split(","))
    plain = tuple(operand for operand in letters if operand[0] not in "HBL")
    for opcode, name in zip(instructions[::2], instructions[1::2], strict=True):
        number, _, reg = opcode.partition("/")
        group = int(reg) if reg else None
        for prefix in _PREFIXES[prefixes]:
            key = _MAPS[map], int(number, 16), prefix
            if legacy != "-":
                yield (*key, False), Row(name, plain, legacy, w=w, reg=group, lockable="LOCK" in rest)
            if short != "-" or long != "-":
                vex_name = name if legacy == "-" else "v" + name
                yield (*key, True), Row(vex_name, letters, short, long, True, w, group)


def find_row(table: Table, instruction: Instruction) -> Row | None:
    """Return the row of ``instruction``; one that does not allow it where the processor raises #UD; else None."""
    rows = table.get((instruction.map, instruction.opcode, instruction.prefix, instruction.vex), [])
    of_group = [row for row in rows if row.reg in (None, instruction.reg & 7)]
    return next((row for row in of_group if row.allows(instruction)), of_group[0] if of_group else None)

"""ENTER, with nested levels: a stack frame that can reach those of the procedures around it.

What it pushes, from RSP down; ``level`` words of it are there from level 1 on::

    RSP - 1 word    RBP
        - 2 words   [RBP - 1 word]       the frame pointers of the outer levels,
        ...                              level - 1 of them
        - level     [RBP - (level - 1) words]
        - level - 1 words more           RSP - 1 word: this frame's own, and the new RBP
    then RSP goes down by the room for variables

The words below RBP may be ones just pushed: they are read one after the other.

Floor: machine.

Source: Intel SDM vol. 2, ENTER. That 16-bit operands leave the upper 48 bits of RBP alone: found on processors.
"""

from kvmpy.machine.assist.context import SS, Completion, Context, Fault, Refused
from kvmpy.machine.assist.instruction import RBP, RSP, Instruction, OpcodeMap

OPCODE = 0xC8
ALL_64 = (1 << 64) - 1


def find(instruction: Instruction) -> Completion | None:
    """Return what completes ``instruction``, or None: it is not ENTER."""
    if instruction.map is OpcodeMap.ONE and instruction.opcode == OPCODE:
        return ENTER
    return None


def _enter(context: Context) -> None:
    if context.bits != 64:
        raise Refused("ENTER outside 64-bit code")
    instruction, registers = context.instruction, context.registers
    room, level = int.from_bytes(instruction.immediate[:2], "little"), instruction.immediate[2] % 32
    size = 2 if instruction.operand16 else 8
    rsp, rbp = registers[RSP], registers[RBP]
    frame = (rsp - size) & ALL_64

    pushed = _frame_words(context, frame, level, size)
    new_rsp = (rsp - len(pushed) - room) & ALL_64
    # The processor tries to write where RSP will point.
    _check(context, new_rsp, size)
    context.translate(new_rsp, size, write=True)
    at = (rsp - len(pushed)) & ALL_64
    _check(context, at, len(pushed))
    context.write(at, pushed)
    registers[RBP] = rbp & ~0xFFFF | frame & 0xFFFF if instruction.operand16 else frame
    registers[RSP] = new_rsp


def _frame_words(context: Context, frame: int, level: int, size: int) -> bytes:
    """Return what is pushed, from the lowest address up."""
    rsp, rbp = context.registers[RSP], context.registers[RBP]
    outer = max(level - 1, 0)
    stack: dict[int, int] = {}
    if outer:
        start = (rbp - size * outer) & ALL_64
        _check(context, start, size * outer)
        _put(stack, start, context.read(start, size * outer))
    _put(stack, rsp - size, rbp.to_bytes(8, "little")[:size])
    for i in range(1, outer + 1):
        _put(stack, rsp - size * (i + 1), _get(stack, rbp - size * i, size))
    if level:
        _put(stack, rsp - size * (level + 1), frame.to_bytes(8, "little")[:size])
    return _get(stack, rsp - size * (level + 1), size * (level + 1))


def _put(stack: dict[int, int], linear: int, data: bytes) -> None:
    stack.update(((linear + i) & ALL_64, byte) for i, byte in enumerate(data))


def _get(stack: dict[int, int], linear: int, size: int) -> bytes:
    return bytes(stack[(linear + i) & ALL_64] for i in range(size))


def _check(context: Context, linear: int, size: int) -> None:
    if not context.is_canonical(linear) or not context.is_canonical((linear + size - 1) & ALL_64):
        raise Fault(SS, 0)


ENTER = Completion("enter", _enter)

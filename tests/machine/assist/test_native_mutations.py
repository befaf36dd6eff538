"""Damaged instructions: what is executed natively is what the processor has, and all else is a fault or not ours.

A thousand times the encodings that the tables have, with some bits changed. ``KVMPY_CAMPAIGN=1`` runs all of them,
otherwise a fiftieth runs; ``KVMPY_SEED`` repeats a run. An instruction that should not have been executed ends this
process.
"""

from dataclasses import replace
from random import Random

import pytest
from native_state import CAMPAIGN, CODE, MEMORY, MEMORY_SIZE, SIGTRAP, Guest, Oracle, State, seeded
from random_instructions import Encoder

from kvmpy.machine.assist import integer, vector, x87
from kvmpy.machine.assist.context import Completion, Refused
from kvmpy.machine.assist.decode import DecodeError, Instruction, decode, effective_address

pytestmark = pytest.mark.kvm

ROUNDS = 600 * CAMPAIGN
LARGEST_OPERAND = 108
OTHER_EACH_TIME = ("rdrand", "rdseed")


def find(instruction: Instruction) -> Completion | None:
    return integer.find(instruction) or vector.find(instruction) or x87.find(instruction)


def damage(random: Random, code: bytes) -> bytes:
    """Change the first bytes: prefixes, opcode, ModRM; or put a prefix before all of it."""
    changed = bytearray(code)
    for _ in range(random.randint(1, 2)):
        kind = random.random()
        if kind < 0.2:
            changed.insert(0, random.choice((0x66, 0xF2, 0xF3, 0xF0, 0x67, 0x2E, 0x40, 0x48, 0x4F, 0xC5)))
        elif kind < 0.3 and len(changed) > 1:
            del changed[0]
        else:
            changed[random.randrange(min(len(changed), 6))] ^= 1 << random.randrange(8)
    return bytes(changed[:15])


def is_ours(state: State) -> bool:
    """Tell whether a completion would run it, and its operand lies where the oracle has memory too."""
    try:
        instruction = decode(state.code)
        completion = find(instruction)
    except DecodeError:
        return False
    if completion is None or completion.name in OTHER_EACH_TIME:
        return False
    operand = instruction.memory
    if operand is None:
        return True
    address = effective_address(instruction, state.registers, CODE + len(instruction.raw))
    return operand.segment in ("ds", "ss") and MEMORY <= address <= MEMORY + MEMORY_SIZE - LARGEST_OPERAND


def test_damaged_instructions_do_what_the_processor_does(guest: Guest, oracle: Oracle) -> None:
    guest.find = find
    random = seeded()
    encoder = Encoder(random, {})
    for table in (integer.TABLE, vector.TABLE):
        encoder.rows += Encoder(random, table).rows
    encoder.rows += [(0, opcode, 0, False, row) for (opcode, _), row in x87.OF_MEMORY.items()]
    states: list[State] = []
    while len(states) < ROUNDS:
        for row in encoder.rows:
            state = encoder.encode(*row)
            state = replace(state, code=damage(random, state.code))
            if is_ours(state):
                states.append(state)
    found = oracle.compare(guest, states)
    executed = sum(state.signal == SIGTRAP for state in found)
    assert 0 < executed < len(states)


def test_random_bytes_never_end_the_process(guest: Guest) -> None:
    """Any bytes: not ours, a fault, refused, or executed."""
    guest.find = find
    random = seeded()
    for _ in range(20 * ROUNDS):
        start = random.choice((b"", b"\x0f", b"\x66\x0f", b"\xf3\x0f", b"\xc5", b"\xc4", b"\xd9", b"\x0f\x38"))
        code = (start + random.randbytes(15))[:15]
        try:
            if find(decode(code)):
                guest.run(State(code, tuple(random.getrandbits(21) for _ in range(16))))
        except (DecodeError, Refused):
            continue

"""A hundred thousand byte strings through the decoder: an instruction or a `DecodeError`, nothing else.

``KVMPY_CAMPAIGN=1`` runs all of them, otherwise a fiftieth runs; ``KVMPY_SEED`` repeats a run.
"""

import os
import random

import pytest
from random_code import every_opcode

from kvmpy.machine.assist.decode import (
    DecodeError,
    Instruction,
    TooShort,
    decode,
    effective_address,
    relocate,
    scratch_registers,
)

CAMPAIGN = 100_000
ROUNDS = CAMPAIGN if os.environ.get("KVMPY_CAMPAIGN") == "1" else CAMPAIGN // 50

PREFIXES = bytes.fromhex("26 2e 36 3e 64 65 66 67 f0 f2 f3 40 48 4f c4 c5 62 8f d5 0f")
REGISTERS = [2**64 - 1 - number for number in range(16)]


class Watched(bytes):
    """Bytes that nobody may read beyond: every index and slice lies within them."""

    def __getitem__(self, where):
        last = where.stop if isinstance(where, slice) else where + 1
        assert 0 <= last <= len(self), f"read up to {last} of {len(self)} bytes"
        return super().__getitem__(where)


def mutate(rng: random.Random, originals: list[bytes]) -> bytes:
    """Return an instruction damaged in some way, or noise, of 0 to 20 bytes."""
    code = bytearray(rng.choice(originals) if rng.random() < 0.8 else rng.randbytes(20))
    for _ in range(rng.randrange(4)):
        at = rng.randrange(len(code))
        match rng.randrange(4):
            case 0:
                code[at] ^= 1 << rng.randrange(8)
            case 1:
                code[at] = rng.choice(PREFIXES)
            case 2:
                code[at:at] = bytes(rng.choices(PREFIXES, k=rng.randint(1, 14)))
            case 3:
                code[at:] = rng.choice(originals)[rng.randrange(15) :] or b"\x00"
    return bytes(code[: rng.choice((len(code), 20, 15, rng.randrange(16)))])


def check(code: bytes, bits: int) -> Instruction | None:
    """Decode and use what came out; return None where it is refused."""
    try:
        instruction = decode(Watched(code), bits=bits)
    except DecodeError:
        return None
    size = len(instruction.raw)
    assert 1 <= size <= 15
    assert code[:size] == instruction.raw
    assert decode(instruction.raw, bits=bits) == instruction
    assert {instruction.reg, instruction.rm, instruction.vvvv} <= set(range(16))
    if instruction.modrm is not None:
        assert instruction.raw[instruction.modrm_at] == instruction.modrm
    assert instruction.raw.endswith(instruction.immediate)
    if instruction.memory:
        address = effective_address(instruction, REGISTERS, 2**64 - 1)
        assert 0 <= address < 2**instruction.address_size
    if bits == 64:
        check_relocation(instruction)
    return instruction


def check_relocation(instruction: Instruction) -> None:
    base, stand_in = scratch_registers(instruction, 2)
    try:
        moved = relocate(instruction, base=base, rsp=stand_in)
    except ValueError as error:
        if "ah, ch, dh, bh" in str(error):
            return
        raise
    again = decode(moved)
    assert again.raw == moved
    kept = ("map", "prefix", "lock", "rex_w", "vex", "vector_length", "immediate")
    if instruction.modrm is not None:  # else it may be a move of the accumulator
        assert (again.opcode, again.modrm_at > 0) == (instruction.opcode, True)
    assert [getattr(again, name) for name in kept] == [getattr(instruction, name) for name in kept]
    assert (again.memory is None) == (instruction.memory is None)
    if again.memory:
        assert again.memory == (base, None, 1, 0, False, "ds")


@pytest.mark.timeout(1800)
def test_any_bytes_are_an_instruction_or_refused(capsys):
    """Nothing but DecodeError comes out of decode, whatever goes in; and what comes out of it can be used."""
    seed = int(os.environ.get("KVMPY_SEED") or random.SystemRandom().randrange(2**32))
    rng = random.Random(seed)
    originals = {bits: list(every_opcode(rng, bits)) for bits in (64, 32, 16)}
    decoded = 0
    for round_ in range(ROUNDS):
        bits = rng.choice((64, 64, 32, 16))
        code = mutate(rng, originals[bits])
        try:
            decoded += check(code, bits) is not None
        except Exception as error:
            raise AssertionError(f"seed {seed}, round {round_}: {bits}-bit code {code.hex()}") from error
    with capsys.disabled():
        print(f"\n{ROUNDS} byte strings, seed {seed}: {decoded} instructions, {ROUNDS - decoded} refused")
    assert 0 < decoded < ROUNDS


def test_more_bytes_help_where_it_is_too_short_and_nowhere_else():
    """TooShort is never said of fifteen bytes, and what is refused for another reason stays refused."""
    rng = random.Random(5)
    for code in every_opcode(rng, 64):
        for length in range(16):
            try:
                decode(code[:length])
            except TooShort:
                assert length < 15
            except DecodeError:
                with pytest.raises(DecodeError):
                    decode(code)

"""Relocation: the same instruction, as objdump has it, with its memory operand at a register.

``KVMPY_CAMPAIGN=1`` goes fifty times through all opcodes, otherwise once; ``KVMPY_SEED`` repeats a run.
"""

import os
import random
import re

import pytest
from objdump_oracle import NAMES, disassemble
from random_code import every_opcode

from kvmpy.machine.assist.decode import DecodeError, Instruction, decode, relocate, scratch_registers
from kvmpy.machine.assist.instruction import OpcodeMap

ROUNDS = 50 if os.environ.get("KVMPY_CAMPAIGN") == "1" else 1

RSP = 4
BASES = (0, 1, 2, 3, 6, 7, 8, 9, 10, 11, 14, 15)
STAND_INS = BASES[1:]  # XCHG rax with rax would be NOP
FWAIT = 0x9B
PREFETCH = 0x18  # PREFETCHIT is a NOP unless its address is RIP-relative
DROPPED = re.compile(r"repn?z|rep|bnd|notrack|xacquire|xrelease|data16|rex(\.[WRXB]+)?|addr32|[cdefgs]s")


def has_its_own_addresses(instruction: Instruction) -> bool:
    """Tell whether objdump prints addresses that are no operand: branches, strings, moves of the accumulator.

    Nor is an address in a register one: 67 makes it narrower (MOVDIR64B and ENQCMD, UMONITOR).
    """
    opcode = instruction.opcode
    match instruction.map:
        case OpcodeMap.ONE:
            return opcode in (*range(0x6C, 0x80), *range(0xA0, 0xB0), 0xC7, 0xD7, *range(0xE0, 0xEC), FWAIT)
        case OpcodeMap.TWO_0F:
            return opcode in (PREFETCH, *range(0x80, 0x90), 0xF7) or (opcode == 0xAE and instruction.memory is None)
    return opcode == 0xF8 and instruction.map is OpcodeMap.THREE_0F38


def with_stand_in(text: str, register: int) -> str:
    """Return ``text`` with another register in the place of rsp, esp, sp and spl."""
    for names in NAMES.values():
        text = re.sub(rf"\b{names[RSP]}\b", names[register], text)
    return text


def mnemonic(text: str) -> str:
    """Return ``text`` without the prefixes that relocation may drop, and those that mean nothing here."""
    return " ".join(word for word in text.split() if not DROPPED.fullmatch(word)).replace("lock lock", "lock")


def relocations(rng: random.Random) -> list[tuple[bytes, Instruction, int, int, bytes]]:
    """Return what relocates of every opcode: original bytes, the instruction, base, stand-in and the result."""
    found = []
    for code in every_opcode(rng, 64):
        try:
            instruction = decode(code)
            base, stand_in = rng.choice(BASES), rng.choice(STAND_INS)
            found.append((instruction.raw, instruction, base, stand_in, relocate(instruction, base=base, rsp=stand_in)))
        except ValueError:
            continue
    return found


@pytest.mark.timeout(1800)
def test_objdump_says_it_is_the_same_instruction(capsys):
    """Mnemonic and operands are those of the original, but for the address and the register in the place of rsp."""
    seed = int(os.environ.get("KVMPY_SEED") or random.SystemRandom().randrange(2**32))
    rng = random.Random(seed)
    compared = 0
    for _ in range(ROUNDS):
        found = relocations(rng)
        before, after = disassemble([case[0] for case in found]), disassemble([case[4] for case in found])
        for (code, instruction, base, stand_in, result), old, new in zip(found, before, after, strict=True):
            if old.is_bad or has_its_own_addresses(instruction) or new.text.endswith("pause"):
                continue  # a PAUSE with REX.B that is XCHG
            where = f"seed {seed}: {code.hex()} {old.text!r} -> {result.hex()} {new.text!r}"
            assert new.length == len(result), where
            assert mnemonic(new.skeleton) == mnemonic(with_stand_in(old.skeleton, stand_in)), where
            if instruction.memory:
                assert new.memory() == (base, None, 1, 0, False, ""), where
            compared += 1
    with capsys.disabled():
        print(f"\n{compared} relocated instructions, seed {seed}: the same to objdump")
    assert compared > 1000 * ROUNDS


def moved(code: str, **registers: int) -> str:
    return relocate(decode(bytes.fromhex(code)), **{"base": 6, **registers}).hex()


def test_the_operand_moves_to_the_base():
    """Whatever the address was: base, SIB, displacement, RIP-relative, segment and address size are gone."""
    for code in ("480fc70f", "480fc74c9d10", "480fc70d11223344", "65480fc70c2528000000", "67490fc78812345678"):
        assert moved(code) == "480fc70e"
    assert moved("480fc70f", base=15) == "490fc70f"
    assert moved("660f3880442410") == "660f388006"


def test_lock_and_mandatory_prefixes_stay():
    """LOCK, 66, and the F2 or F3 that counts; REX directly before the opcode."""
    assert moved("f0480fc70f") == "f0480fc70e"
    assert moved("67f266480f38f100") == "66f2480f38f106"
    assert moved("66f20f38f100") == "66f20f38f106"
    assert moved("f3662e0fb84510") == "66f30fb806"


def test_vex_keeps_all_but_the_operand():
    """W, L, vvvv, pp and the map; the two-byte form becomes the three-byte one."""
    assert moved("c4e2f0f20410") == "c4e2f0f206"
    assert moved("c57d6f4510", base=10) == "c4417d6f02"
    assert moved("c5f877") == "c4e17877"


def test_another_register_stands_in_for_rsp():
    """Wherever rsp is a general register operand: ModRM.reg, ModRM.rm, VEX.vvvv, the opcode."""
    assert moved("f3480fb8e4", rsp=7) == "f3480fb8ff"
    assert moved("f3480fb8e4", rsp=8) == "f34d0fb8c0"
    assert moved("c4e2d8f2e4", rsp=9) == "c442b0f2c9"
    assert moved("480fcc", rsp=8) == "490fc8"
    assert moved("f3480fb8e4") == "f3480fb8e4"


def test_a_four_that_is_not_rsp_stays():
    """xmm4, mm4, st(4), /4 of a group, and ah."""
    for code in ("0f28e4", "0f6fe4", "d8c4", "660f6ee0", "c5d858e4"):
        assert with_short_vex(moved(code, rsp=7)) == code
    assert moved("0fae26", rsp=7) == "0fae26"  # xsave is 0F AE /4
    assert moved("f20f38f0c4", rsp=7) == "f20f38f0c4"  # crc32 eax, ah
    assert moved("40f20f38f0c4", rsp=7) == "f20f38f0c4"  # the REX is not the last prefix: ah
    assert moved("f2400f38f0c4", rsp=7) == "f2400f38f0c7"  # crc32 eax, spl


def with_short_vex(code: str) -> str:
    """Return the two-byte form of what has one, in the cases above."""
    return "c5d8" + code[6:] if code.startswith("c4e158") else code


def test_ah_has_no_place_beside_rex():
    """crc32 esp, ah: with r8 in the place of rsp it would need REX, which makes spl of ah."""
    with pytest.raises(ValueError, match="ah, ch, dh, bh"):
        moved("f20f38f0e4", rsp=8)
    with pytest.raises(ValueError, match="ah, ch, dh, bh"):
        moved("0fc026", base=8)  # xadd [rsi], ah
    assert moved("0fc023") == "0fc026"


@pytest.mark.parametrize("base", [4, 5, 12, 13, -1, 16])
def test_bases_that_need_more_than_modrm_are_refused(base):
    """Intel SDM vol. 2, table 2-5: with rsp and r12 there is a SIB, with rbp and r13 a displacement."""
    with pytest.raises(ValueError, match="base register"):
        moved("8b00", base=base)


def test_only_64_bit_code_is_relocated():
    with pytest.raises(ValueError, match="64-bit"):
        relocate(decode(b"\x40", bits=32), base=6)


def test_moves_of_the_accumulator_get_a_modrm():
    """A0 to A3 have no operand that could be moved; 8A, 8B, 88 and 89 do the same."""
    assert [moved(f"{code}{'11' * 8}") for code in ("a0", "48a1", "a2", "66a3")] == ["8a06", "488b06", "8806", "668906"]


def test_scratch_registers_are_not_those_of_the_instruction():
    """Neither named nor implicit, never rax to rbp, r12 or r13."""
    assert scratch_registers(decode(bytes.fromhex("f3480fb8c7")), 2) == (6, 8)  # popcnt rax, rdi
    assert scratch_registers(decode(bytes.fromhex("4a8b3436")), 2) == (7, 8)  # mov rsi, [rsi+r14]
    assert scratch_registers(decode(bytes.fromhex("4a8b3c36")), 5) == (8, 9, 10, 11, 15)  # mov rdi, [rsi+r14]
    assert scratch_registers(decode(bytes.fromhex("c4c2c8f2f8")), 2) == (9, 10)  # andn rdi, rsi, r8
    assert scratch_registers(decode(b"\xa4"), 2) == (8, 9)  # movsb
    assert scratch_registers(decode(b"\x0f\xf7\xc1"), 1) == (8,)  # maskmovq
    assert 11 not in scratch_registers(decode(b"\x0f\x05"), 6)  # syscall


def test_scratch_registers_run_out():
    """Eight are ever free."""
    assert len(scratch_registers(decode(b"\x90"), 8)) == 8
    with pytest.raises(ValueError, match="scratch registers"):
        scratch_registers(decode(bytes.fromhex("8b36")), 8)


def test_every_decodable_instruction_leaves_two_scratch_registers():
    """A base and a stand-in for rsp, whatever the guest's instruction is; they differ, and relocate takes them."""
    rng = random.Random(3)
    for code in every_opcode(rng, 64):
        try:
            instruction = decode(code)
        except DecodeError:
            continue
        base, stand_in = scratch_registers(instruction, 2)
        assert base != stand_in
        assert {base, stand_in} <= {6, 7, 8, 9, 10, 11, 14, 15}

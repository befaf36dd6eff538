"""The instruction decoder against objdump, over every opcode, and against what the manual says of single cases.

``KVMPY_CAMPAIGN=1`` goes fifty times through all opcodes, otherwise once; ``KVMPY_SEED`` repeats a run.
"""

import os
import random

import pytest
from objdump_oracle import HIGH_NAMES, Listing, disassemble
from random_code import every_opcode

from kvmpy.machine.assist import opcodes
from kvmpy.machine.assist.decode import DecodeError, Instruction, OpcodeMap, TooShort, decode
from kvmpy.machine.assist.relocate import general_operands

ROUNDS = 50 if os.environ.get("KVMPY_CAMPAIGN") == "1" else 1

FWAIT = 0x9B  # objdump joins it to the x87 instruction that follows
LEA = 0x8D  # objdump tells no segment: it uses none
STRINGS = frozenset((*range(0x6C, 0x70), *range(0xA4, 0xA8), *range(0xAA, 0xB0), 0xD7))
"""One-byte opcodes whose implicit memory objdump prints."""

# The accumulator, CL and DX are printed where they are part of the opcode.
IMPLICIT = {0, 1, 2}

REFUSED = (
    *("EVEX", "XOP", "an address for each element", "VEX after", "VEX with map"),
    *("TWO_0F 0x0e ", "TWO_0F 0x0f "),  # 3DNow
    *("TWO_0F 0xa6 ", "TWO_0F 0xa7 "),  # of one vendor that neither manual knows
    *("TWO_0F 0x24 ", "TWO_0F 0x26 "),  # the test registers of the 80486
    "0xd6 ",  # SALC, in no manual
)
"""Why decode may refuse what objdump knows."""


def the_seed() -> int:
    return int(os.environ.get("KVMPY_SEED") or random.SystemRandom().randrange(2**32))


def compare(code: bytes, listing: Listing, bits: int) -> bool:
    """Compare what both say of ``code``, and tell whether there was something to compare."""
    refusal = ""
    try:
        instruction = decode(code, bits=bits)
    except DecodeError as error:
        refusal = str(error)
    if refusal:
        assert listing.is_bad or any(reason in refusal for reason in REFUSED), (code.hex(), refusal, listing)
        return False
    if listing.is_bad or (instruction.map, instruction.opcode) == (OpcodeMap.ONE, FWAIT):
        return False
    where = f"{code.hex()}: {listing}, {instruction}"
    assert len(instruction.raw) == listing.length, where
    assert code.startswith(instruction.raw), where
    if instruction.map is not OpcodeMap.ONE or instruction.opcode not in STRINGS:
        compare_memory(instruction, listing, where)
        if bits == 64:
            compare_registers(instruction, listing, where)
    return True


def compare_memory(instruction: Instruction, listing: Listing, where: str) -> None:
    memory, theirs = instruction.memory, listing.memory()
    assert (memory is None) == (theirs is None), where
    if memory is None or theirs is None:
        return
    base, index, scale, displacement, rip_relative, segment = theirs
    default = "ss" if base in (4, 5) else "ds"
    if instruction.bits == 64 and segment not in ("fs", "gs"):
        segment = default
    assert memory[:2] == (base, index), where
    assert memory.scale == scale, where
    assert (memory.displacement - displacement) % (1 << instruction.address_size) == 0, where
    assert memory.rip_relative is rip_relative, where
    # objdump tells NOTRACK (which 3E is with an indirect branch) instead of the segment.
    if (instruction.map, instruction.opcode) != (OpcodeMap.ONE, LEA) and "notrack" not in listing.text:
        assert memory.segment == (segment or default), where


def compare_registers(instruction: Instruction, listing: Listing, where: str) -> None:
    """Compare the general registers; others have only a number, which is printed with their kind's letters."""
    if any(name in listing.text for name in ("nop", "pause", "endbr", "xabort", "xbegin")):
        return  # encoded as instructions with registers: XCHG, MOV, or a NOP with an operand
    ours: set[int | str] = {getattr(instruction, name) for name in general_operands(instruction)}
    high = {4 + HIGH_NAMES.index(name) for name in listing.registers if isinstance(name, str)}
    theirs = {register for register in listing.registers if isinstance(register, int)} | high
    assert ours <= theirs, where
    assert theirs - ours <= IMPLICIT, where


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("bits", [64, 32, 16])
def test_objdump_says_the_same_of_every_opcode(bits, capsys):
    """Length, memory operand and general registers, for each opcode of each map and each mandatory prefix."""
    seed = the_seed()
    rng = random.Random(seed)
    compared = total = 0
    for _ in range(ROUNDS):
        codes = list(every_opcode(rng, bits))
        for code, listing in zip(codes, disassemble(codes, bits=bits), strict=True):
            compared += compare(code, listing, bits)
        total += len(codes)
    with capsys.disabled():
        print(f"\n{bits}-bit code, seed {seed}: {compared} of {total} instructions as objdump has them")
    assert compared > total // 5


# --- single cases -------------------------------------------------------------------------------------------------


def of(text: str, bits: int = 64) -> Instruction:
    return decode(bytes.fromhex(text), bits=bits)


def test_what_is_behind_the_instruction_is_not_part_of_it():
    """``raw`` is exactly the bytes of one instruction."""
    assert of("0f01d0 0f01d0").raw == bytes.fromhex("0f01d0")


def test_every_instruction_cut_short_is_too_short():
    """Any true beginning of an instruction could become one: TooShort, which is a DecodeError."""
    rng = random.Random(1)
    for code in every_opcode(rng, 64):
        try:
            whole = decode(code).raw
        except DecodeError:
            continue
        for length in range(len(whole)):
            with pytest.raises(TooShort):
                decode(whole[:length])


def test_fifteen_bytes_are_an_instruction_and_sixteen_are_none():
    """Intel SDM vol. 2 §2.3.11: an instruction longer than 15 bytes raises #GP."""
    assert len(of(14 * "2e" + "90" + "90").raw) == 15
    for code in (15 * "2e" + "90", 15 * "2e", 12 * "2e" + "48b8" + 8 * "00", 11 * "2e" + "81042512345678aabbccdd"):
        with pytest.raises(DecodeError, match="longer than 15 bytes") as caught:
            of(code)
        assert caught.type is DecodeError


@pytest.mark.parametrize(
    "code",
    [
        "62f17c48 58c0",  # EVEX: vaddps zmm
        "8fe97080 c0",  # XOP
        "8fc8",  # pop with /1
        "0f0fc0 9e",  # 3DNow: pfadd
        "0f0e",  # femms
        "c4e26990 0c00",  # vpgatherdd with SIB, an address for each element
        "c4e27b4b 0c00",  # tileloadd
        "66c5f877",  # VEX after 66
        "48c5f877",  # VEX after REX
        "f0c5f877",  # VEX after LOCK
        "f3c5f877",  # VEX after F3
        "c4e078 77",  # VEX with map 0
        "c4e578 77",  # VEX with map 5
        "c5f8 05",  # no SYSCALL with VEX
        "0fb8c0",  # POPCNT without F3
        "0f04",
        "06",  # push es, gone from 64-bit code
        "d500",  # REX2
    ],
)
def test_what_is_not_decoded_is_refused(code):
    """EVEX, XOP, 3DNow and what no manual defines: DecodeError, and not for want of bytes."""
    with pytest.raises(DecodeError) as caught:
        decode(bytes.fromhex(code) + bytes(15))
    assert caught.type is DecodeError


def test_32_bit_code_has_what_64_bit_code_has_not():
    """LES, LDS and BOUND where mod is not 3, else VEX and EVEX; 40 to 4F are INC and DEC."""
    assert (of("c408", 32).opcode, of("c508", 32).opcode, of("6208", 32).opcode) == (0xC4, 0xC5, 0x62)
    assert of("c5f877", 32).vex
    with pytest.raises(DecodeError, match="EVEX"):
        of("62f17c4858c0", 32)
    assert of("4890", 32).raw == b"\x48"
    assert of("06", 32).opcode == 0x06
    assert len(of("9a112233445566", 32).raw) == 7
    assert len(of("9a1122334455", 16).raw) == 5


def test_vex_registers_of_32_bit_code_are_the_eight():
    """Intel SDM vol. 2 §2.3.5.5 and §2.3.5.6: VEX.B and the highest bit of vvvv are ignored outside 64-bit mode."""
    instruction = of("c4c13058c1", 32)  # B and vvvv[3] say 8 and more
    assert (instruction.reg, instruction.vvvv, instruction.rm) == (0, 1, 1)
    assert (of("c4c13058c1").vvvv, of("c4c13058c1").rm) == (9, 9)


def test_vex_fields():
    """vaddpd ymm15, ymm9, ymmword [r8]: R and B as REX has them, vvvv upright, L and pp."""
    instruction = of("c4413558 38")
    assert (instruction.vex, instruction.map, instruction.opcode) == (True, OpcodeMap.TWO_0F, 0x58)
    assert (instruction.reg, instruction.vvvv, instruction.rm) == (15, 9, 8)
    assert (instruction.vector_length, instruction.prefix, instruction.rex_w) == (256, 0x66, False)
    assert instruction.memory is not None
    assert instruction.memory.base == 8
    assert of("c4e2f0f2c0").rex_w
    assert (of("c5f877").vector_length, of("90").vector_length) == (128, 0)
    assert [of(f"c5{0xF8 | pp:02x}10c0").prefix for pp in range(4)] == [0, 0x66, 0xF3, 0xF2]


@pytest.mark.parametrize(
    ("code", "prefix"),
    [
        *(("0f10c0", 0), ("660f10c0", 0x66), ("f20f10c0", 0xF2), ("f30f10c0", 0xF3)),
        *(("66f20f10c0", 0xF2), ("f2660f10c0", 0xF2), ("f2f30f10c0", 0xF3), ("f3f2660f10c0", 0xF2)),
    ],
)
def test_of_two_repeat_prefixes_the_last_one_counts(code, prefix):
    """F2 and F3 go before 66, whatever their order; of the two the last wins."""
    assert of(code).prefix == prefix


def test_rex_counts_only_as_the_last_prefix():
    """Intel SDM vol. 2 §2.2.1: else it is ignored."""
    assert of("488b00").rex_w
    assert of("49418b00").memory == of("418b00").memory
    assert not of("48668b00").rex_w
    assert of("48668b00").operand16
    assert not of("48408b00").rex_w
    assert len(of("4866b81122").raw) == 5


def test_operand_size():
    """66 says 16 bits in 32- and 64-bit code, 32 bits in 16-bit code; REX.W wins over it."""
    sizes = {(64, "b8"): 4, (64, "66b8"): 2, (64, "6648b8"): 8, (64, "48b8"): 8, (32, "b8"): 4, (32, "66b8"): 2}
    for (bits, code), size in {**sizes, (16, "b8"): 2, (16, "66b8"): 4}.items():
        instruction = decode(bytes.fromhex(code) + bytes(8), bits=bits)
        assert len(instruction.immediate) == size
        assert instruction.operand16 is (size == 2)


def test_vex_has_no_operand_size():
    """Its pp is no 66, not in 16-bit code either."""
    assert not of("c5f877", 16).operand16
    assert of("90", 16).operand16


def test_sse4a_has_two_immediates():
    """EXTRQ and INSERTQ (AMD APM vol. 4); without their prefixes it is VMREAD."""
    assert (of("660f78c0aabb").immediate, of("f20f78c1aabb").immediate) == (b"\xaa\xbb", b"\xaa\xbb")
    assert of("0f78c0aabb").immediate == b""


def test_near_branches_of_64_bit_code_ignore_66():
    """Intel SDM vol. 2, appendix A.2.5, superscript f64."""
    for code in ("e8", "e9", "0f84"):
        assert len(decode(bytes.fromhex("66" + code) + bytes(4)).immediate) == 4
        assert len(decode(bytes.fromhex("66" + code) + bytes(4), bits=32).immediate) == 2


def test_64_bit_code_ignores_all_segment_prefixes_but_fs_and_gs():
    """Intel SDM vol. 1 §3.4.2.1. The default of rsp and rbp is ss, of r12 and r13 it is ds."""

    def segment(code: str, bits: int = 64) -> str:
        memory = of(code, bits).memory
        assert memory is not None
        return memory.segment

    assert [segment(code) for code in ("8b00", "648b00", "658b00", "64658b00")] == ["ds", "fs", "gs", "gs"]
    assert [segment(code) for code in ("2e8b00", "3e8b4500", "263e648b00", "642e8b00")] == ["ds", "ss", "fs", "fs"]
    assert [segment(code) for code in ("8b4500", "8b0424", "418b4500", "418b0424")] == ["ss", "ss", "ds", "ds"]
    assert [segment(code, 32) for code in ("2e8b00", "368b00", "3e8b4500", "268b00")] == ["cs", "ss", "ds", "es"]
    assert [segment(code, 16) for code in ("8b02", "8b4600", "8b07", "8b061122")] == ["ss", "ss", "ds", "ds"]


def test_moves_of_the_accumulator_have_an_offset_as_wide_as_an_address():
    """A0 to A3: no ModRM, the offset is 64 bits in 64-bit code, 32 with 67."""
    wide, narrow = of("64a1f8ffffffffffffff"), of("67a1f8ffffff")
    assert wide.memory == (None, None, 1, 2**64 - 8, False, "fs")
    assert narrow.memory == (None, None, 1, 2**32 - 8, False, "ds")
    assert (wide.modrm, wide.immediate, len(narrow.raw)) == (None, b"", 6)


def test_moves_of_control_registers_name_registers_whatever_mod_is():
    """Intel SDM vol. 2, MOV CRn: the mod field is ignored; there is no displacement."""
    for code in ("0f2244", "0f2284", "0f22c4"):
        instruction = decode(bytes.fromhex(code) + bytes(8))
        assert (len(instruction.raw), instruction.memory, instruction.reg, instruction.rm) == (3, None, 0, 4)


def test_where_the_fields_are():
    """``modrm_at`` and ``immediate_at`` are offsets into ``raw``; 0 where there is none."""
    instruction = of("66 2e 48 0f c5 c1 05".replace(" ", ""))
    assert instruction.raw[instruction.modrm_at] == instruction.modrm == 0xC1
    assert instruction.raw[instruction.immediate_at :] == instruction.immediate == b"\x05"
    assert (of("90").modrm, of("90").modrm_at, of("90").immediate_at) == (None, 0, 0)


def test_lock_is_recorded_not_judged():
    """Whether LOCK is allowed is not the decoder's business."""
    assert of("f0480fc70e").lock
    assert of("f090").lock
    assert not of("90").lock


def test_the_register_in_an_opcode_is_rm():
    """BSWAP r12 and PUSH r9 name their register in the opcode."""
    assert (of("490fcc").rm, of("4151").rm, of("58").rm) == (12, 9, 0)


@pytest.mark.parametrize(
    ("code", "names"),
    [
        *(("89c8", "reg rm"), ("8908", "reg"), ("8cc8", "rm"), ("0f20c0", "rm"), ("490fc8", "rm"), ("d9c0", "")),
        *(
            ("660f6ec0", "rm"),
            ("660f7ec0", "rm"),
            ("f30f7ec0", ""),
            ("f30f2cc0", "reg"),
            ("0f2cc0", ""),
            ("f20f2ac0", "rm"),
        ),
        *(
            ("0f78c0", "reg rm"),
            ("660f79c0", ""),
            ("660f1ac1", ""),
            ("f30f1ac1", "rm"),
            ("f30faec0", "rm"),
            ("0faee8", ""),
        ),
        *(("0f01e0", "rm"), ("0f01f8", ""), ("f30faef0", "rm"), ("c4e278f2c1", "reg rm vvvv"), ("c5f858c0", "")),
        *(
            ("c4e278f3c8", "rm vvvv"),
            ("c4e37bf0c001", "reg rm"),
            ("c5fb93c0", "reg"),
            ("660fc5c001", "reg"),
            ("c5f877", ""),
        ),
    ],
)
def test_which_operands_are_general_registers(code, names):
    """Those that rsp can be, and so has to be replaced in."""
    assert general_operands(of(code)) == set(names.split())


def test_the_tables_are_complete():
    """Each map has 256 opcodes, in letters that are defined."""
    for map in (*opcodes.MAPS, *opcodes.VEX_MAPS):
        assert len(map) == 256
        assert set(map) <= set(".MbBzZjvowepCgG-")

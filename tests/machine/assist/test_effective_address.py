"""Effective addresses: against LEA on this processor, and against the formulas of the manual."""

import os
import random
import struct
import subprocess

import pytest

from kvmpy.machine.assist.decode import Instruction, decode, effective_address

ROUNDS = 20_000 if os.environ.get("KVMPY_CAMPAIGN") == "1" else 400

# Every register is loaded, RSP too: there are no calls and no signals. The output has also where each LEA ends.
PROGRAM = """
    .macro load
        .irp name rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15
            movq registers_\\name(%rip), %\\name
        .endr
    .endm
    .text
    .globl _start
_start:
{cases}
    movl $1, %edi
    leaq output(%rip), %rsi
    movl $(output_end - output), %edx
1:  movl $1, %eax
    syscall
    testq %rax, %rax
    jle 2f
    addq %rax, %rsi
    subq %rax, %rdx
    jnz 1b
2:  xorl %edi, %edi
    movl $60, %eax
    syscall
    .data
{registers}
output:
{output}
output_end:
"""
CASE = """
    load
    .byte {bytes}
end_{index}:
    movq %{name}, output + {at}(%rip)"""

NAMES = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{number}" for number in range(8, 16)))


def run_natively(codes: list[Instruction], registers: list[int], folder: str) -> list[tuple[int, int]]:
    """Return (RIP behind it, what it left in its register) for each LEA in ``codes``."""
    cases = "".join(
        CASE.format(bytes=", ".join(map(str, lea.raw)), index=index, name=NAMES[lea.reg], at=16 * index + 8)
        for index, lea in enumerate(codes)
    )
    source = PROGRAM.format(
        cases=cases,
        registers="".join(f"registers_{n}: .quad {value:#x}\n" for n, value in zip(NAMES, registers, strict=True)),
        output="".join(f".quad end_{index}, 0\n" for index in range(len(codes))),
    )
    program = os.path.join(folder, "lea")
    command = ["gcc", "-x", "assembler", "-nostdlib", "-static", "-no-pie", "-o", program, "-"]
    subprocess.run(command, input=source, text=True, check=True)
    output = subprocess.run([program], capture_output=True, check=True).stdout
    return [(end, value) for end, value in struct.iter_unpack("<QQ", output)]


def random_lea(rng: random.Random) -> Instruction:
    """Return LEA r64 of a random address: any base, index, scale and displacement, 64 or 32 bits."""
    before = rng.choice((b"", b"", b"\x67", b"\x64", b"\x67\x65")) + bytes([0x48 | rng.randrange(8)])
    return decode(before + b"\x8d" + bytes([rng.randrange(0xC0)]) + rng.randbytes(6))


@pytest.mark.timeout(600)
def test_lea_on_this_processor_gives_the_same(tmp_path, capsys):
    """Whatever LEA leaves in its register is the effective address: it adds no segment base."""
    seed = int(os.environ.get("KVMPY_SEED") or random.SystemRandom().randrange(2**32))
    rng = random.Random(seed)
    registers = [rng.getrandbits(64) for _ in NAMES]
    codes = [random_lea(rng) for _ in range(ROUNDS)]
    for lea, (end, value) in zip(codes, run_natively(codes, registers, str(tmp_path)), strict=True):
        assert effective_address(lea, registers, end) == value, f"seed {seed}: {lea}"
    with capsys.disabled():
        print(f"\n{ROUNDS} addresses, seed {seed}: as LEA has them")


BX, BP, SI, DI = 0x1234, 0xF000, 0x0FFF, 0x8765


@pytest.mark.parametrize(
    ("rm", "expected"),
    list(enumerate((BX + SI, BX + DI, BP + SI, BP + DI, SI, DI, BP, BX))),
)
def test_16_bit_addresses_are_those_of_table_2_1(rm, expected):
    """Intel SDM vol. 2, table 2-1; the sum wraps at 64 KiB, and the upper halves of the registers do not count."""
    registers = [0xDEAD_0000] * 16
    for number, value in ((3, BX), (5, BP), (6, SI), (7, DI)):
        registers[number] |= value
    for mod, displacement, bytes_ in ((1, -3, b"\xfd"), (2, 0x7FFE, b"\xfe\x7f")):
        instruction = decode(bytes([0x8B, mod << 6 | rm]) + bytes_, bits=16)
        assert instruction.address_size == 16
        assert effective_address(instruction, registers, 0) == (expected + displacement) % 2**16
    if rm != 6:
        assert effective_address(decode(bytes([0x8B, rm]), bits=16), registers, 0) == expected % 2**16


def test_a_16_bit_displacement_alone_is_an_address():
    """mod 0 with rm 6 is no BP."""
    assert effective_address(decode(b"\x8b\x06\xfe\xff", bits=16), [1] * 16, 0) == 0xFFFE


def test_the_address_size_prefix_swaps_16_and_32_bits():
    """67 in 32-bit code is a 16-bit address, in 16-bit code a 32-bit one."""
    registers = [0x1_0000 + number for number in range(16)]
    assert effective_address(decode(b"\x67\x8b\x04", bits=32), registers, 0) == 6
    assert effective_address(decode(b"\x67\x8b\x06", bits=16), registers, 0) == 0x1_0006


def test_32_bit_code_has_no_rip_relative_addresses():
    """The same ModRM is an absolute displacement there."""
    code = bytes.fromhex("8b05f0ffffff")
    assert effective_address(decode(code), [0] * 16, 0x1000) == 0xFF0
    assert effective_address(decode(code, bits=32), [0] * 16, 0x1000) == 0xFFFF_FFF0
    assert effective_address(decode(b"\x67" + code), [0] * 16, 2**32 + 0x1000) == 0xFF0


def test_no_memory_operand_is_the_callers_mistake():
    with pytest.raises(ValueError, match="no memory operand"):
        effective_address(decode(b"\x8b\xc0"), [0] * 16, 0)

"""MMX, SSE, AVX: what our completions make of a state, the processor makes.

``KVMPY_CAMPAIGN=1`` tries fifty times as many states; ``KVMPY_SEED`` repeats a run.
"""

from dataclasses import replace

import pytest
from native_state import CAMPAIGN, INITIAL, MEMORY, SIGFPE, SIGILL, SIGSEGV, SIGTRAP, Guest, Oracle, State, seeded
from random_instructions import Encoder

from kvmpy.machine.assist import vector
from kvmpy.machine.assist.decode import OpcodeMap, decode
from kvmpy.machine.assist.native import host_features, mxcsr_mask
from kvmpy.machine.assist.rows import Row, parse

pytestmark = pytest.mark.kvm

ROUNDS = 4 * CAMPAIGN
LDMXCSR, STMXCSR = bytes.fromhex("0fae16"), bytes.fromhex("0fae1e")  # of (%rsi)
MXCSR = slice(24, 28)
OVERFLOW_UNDERFLOW = 0x18


@pytest.fixture
def guest(guest: Guest) -> Guest:
    guest.find = vector.find
    return guest


def test_every_row_does_what_the_processor_does(guest: Guest, oracle: Oracle) -> None:
    """And where the host's processor lacks it, it is undefined."""
    encoder = Encoder(seeded(), vector.TABLE)
    rows = [row for row in encoder.rows for _ in range(ROUNDS)]
    states = [encoder.encode(*row) for row in rows]
    for row, after in zip(rows, oracle.compare(guest, states), strict=True):
        feature = row[-1].feature_of(decode(after.code))
        assert (after.signal == SIGILL) == (feature not in host_features()), row


@pytest.mark.parametrize("masks", [0x3F, 0x3F - OVERFLOW_UNDERFLOW, 0x00, 0x1F, 0x38, 0x27, 0x2F, 0x37])
def test_unmasked_exceptions_are_raised(guest: Guest, oracle: Oracle, masks: int) -> None:
    """Intel SDM vol. 1 §11.5: #XM, and the destination as it was; or the masked result and the flags.

    Of an unmasked overflow or underflow the flags beside it may be those of the masked one, and of a dot product, which
    is several operations, those of what comes behind the one that raised: these are not compared.
    """
    encoder = Encoder(seeded(), parse(vector.FLOATS))
    rows = [row for row in encoder.rows for _ in range(CAMPAIGN)]
    before = [replace(encoder.encode(*row), xsave=encoder.xsave(masks=masks)) for row in rows]
    expected = oracle.run(before)
    raised = 0
    for state, after in zip(before, expected, strict=True):
        ours = guest.run(state)
        if after.signal == SIGFPE:
            raised += 1
            if masks & OVERFLOW_UNDERFLOW != OVERFLOW_UNDERFLOW or _is_dot_product(state.code):
                ours, after = (replace(one, xsave=_without_flags(one.xsave)) for one in (ours, after))
        assert ours.differences(after) == [], state.code.hex()
    assert (raised > 0) == (masks != 0x3F)


@pytest.mark.parametrize("mxcsr", [0x1780, 0x9780, 0x1F80, 0x9F80])
@pytest.mark.parametrize("factor", [0x3F000000, 0x3F800000])
def test_an_exact_tiny_result_underflows_where_that_is_unmasked(
    guest: Guest, oracle: Oracle, mxcsr: int, factor: int
) -> None:
    """The least normal number times a half, and one; with and without flush-to-zero."""
    xmm0, memory = (number.to_bytes(4, "little").ljust(16, b"\0") for number in (0x00800000, factor))
    xsave = INITIAL[:24] + mxcsr.to_bytes(4, "little") + INITIAL[28:160] + xmm0 + INITIAL[176:]
    state = State(bytes.fromhex("f30f5906"), (MEMORY,) * 16, xsave=xsave, memory=memory.ljust(256, b"\0"))  # mulss
    (after,) = oracle.compare(guest, [state])
    assert after.signal == (SIGFPE if factor != 0x3F800000 and mxcsr & 0x800 == 0 else SIGTRAP)


def _is_dot_product(code: bytes) -> bool:
    """DPPS, DPPD."""
    instruction = decode(code)
    return instruction.map is OpcodeMap.THREE_0F3A and instruction.opcode in (0x40, 0x41)


def _without_flags(xsave: bytes) -> bytes:
    return xsave[:24] + bytes([xsave[24] & 0xC0]) + xsave[25:]


@pytest.mark.parametrize("bit", range(32))
def test_ldmxcsr_takes_the_bits_that_there_are(guest: Guest, oracle: Oracle, bit: int) -> None:
    memory = (0x1F80 ^ 1 << bit).to_bytes(4, "little").ljust(256, b"\0")
    (after,) = oracle.compare(guest, [State(LDMXCSR, (MEMORY,) * 16, memory=memory)])
    assert after.signal == (SIGTRAP if mxcsr_mask() >> bit & 1 else SIGSEGV)


def test_stmxcsr_tells_the_guests_own(guest: Guest, oracle: Oracle) -> None:
    """Also with exceptions unmasked, which the host never has."""
    random = seeded()
    for vex in (b"", b"\xc5\xf8"):
        code = vex + STMXCSR[1:] if vex else STMXCSR
        xsave = Encoder(random, {}).xsave(masks=random.getrandbits(6))
        (after,) = oracle.compare(guest, [State(code, (MEMORY,) * 16, xsave=xsave)])
        assert after.memory[:4] == xsave[MXCSR]


def test_scalar_rows_read_no_more_than_they_need(guest: Guest) -> None:
    """The last bytes of RAM are an operand of 4 bytes, and none of 8."""
    top = guest.memory.size
    movss, movsd = (bytes.fromhex(code) for code in ("f30f1006", "f20f1006"))
    assert guest.run(State(movss, (top - 4,) * 16)).signal == SIGTRAP
    with pytest.raises(Exception, match="not RAM"):
        guest.run(State(movsd, (top - 4,) * 16))


def test_a_row_says_what_it_touches() -> None:
    table = parse("66 0F V,H,Wx sse2 avx avx2: FE paddd\nNP 0F Mq,P sse - -: E7 movntq")
    legacy, vex = table[1, 0xFE, 0x66, False][0], table[1, 0xFE, 0x66, True][0]
    assert legacy == Row("paddd", ("V", "Wx"), "sse2")
    assert vex == Row("vpaddd", ("V", "H", "Wx"), "avx", "avx2", vex=True)
    assert (legacy.vector, legacy.mmx, legacy.writes_memory) == (True, False, False)
    movntq = table[1, 0xE7, 0, False][0]
    assert (movntq.vector, movntq.mmx, movntq.writes_memory) == (False, True, True)

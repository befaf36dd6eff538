"""x87: what our completions make of a state, the processor makes; pointers and pending exceptions included.

``KVMPY_CAMPAIGN=1`` tries fifty times as many states; ``KVMPY_SEED`` repeats a run.
"""

from collections.abc import Iterator
from dataclasses import replace
from random import Random

import pytest
from native_state import CAMPAIGN, SIGFPE, SIGTRAP, Guest, Oracle, State, seeded
from random_instructions import Encoder

from kvmpy.machine.assist import x87
from kvmpy.machine.assist.context import Refused
from kvmpy.machine.assist.decode import decode
from kvmpy.machine.assist.fpu import NOT_WAITING

pytestmark = pytest.mark.kvm

ROUNDS = 4 * CAMPAIGN
EXCEPTIONS = 0x3F
ERROR_SUMMARY = 0x8080  # FSW.ES and FSW.B


@pytest.fixture
def guest(guest: Guest) -> Guest:
    guest.find = x87.find
    return guest


def states(random: Random) -> Iterator[State]:
    """Yield a random state before each instruction."""
    encoder = Encoder(random, {})
    for (opcode, _), row in x87.OF_MEMORY.items():
        yield encoder.encode(0, opcode, random.choice((0, 0, 0x66)), False, row)
    for (opcode, modrm), row in x87.OF_REGISTERS.items():
        yield replace(encoder.encode(0, opcode, 0, False, row), code=bytes([opcode, modrm]))
    yield replace(encoder.encode(0, 0x9B, 0, False, x87.FWAIT), code=b"\x9b")


def unmask(state: State, random: Random, *, pending: bool) -> State:
    """Return ``state`` with some exceptions unmasked, of which one is pending or none."""
    status, masks = int.from_bytes(state.xsave[2:4], "little"), random.getrandbits(6) & ~1
    if pending:
        status |= 1 | ERROR_SUMMARY
    else:
        status &= masks | ~EXCEPTIONS
    control = (0x340 | masks).to_bytes(2, "little")
    return replace(state, xsave=control + status.to_bytes(2, "little") + state.xsave[4:])


def test_every_instruction_does_what_the_processor_does(guest: Guest, oracle: Oracle) -> None:
    random = seeded()
    after = oracle.compare(guest, [state for _ in range(ROUNDS) for state in states(random)])
    assert {state.signal for state in after} == {SIGTRAP}


def test_unmasked_exceptions_are_kept_for_the_next_instruction(guest: Guest, oracle: Oracle) -> None:
    """Intel SDM vol. 1 §8.6: the instruction that finds one ends without #MF; a store then has stored nothing."""
    random = seeded()
    before = [unmask(state, random, pending=False) for _ in range(ROUNDS) for state in states(random)]
    after = oracle.compare(guest, before)
    assert {state.signal for state in after} == {SIGTRAP}
    assert any(state.xsave[2] & 0x80 for state in after)


def test_a_pending_exception_is_raised_by_what_waits(guest: Guest, oracle: Oracle) -> None:
    random = seeded()
    before = [unmask(state, random, pending=True) for state in states(random)]
    for state, after in zip(before, oracle.compare(guest, before), strict=True):
        completion = x87.find(decode(state.code))
        assert completion is not None
        assert after.signal == (SIGTRAP if completion.name in NOT_WAITING else SIGFPE)


def test_a_pending_exception_of_an_old_kind_is_refused(guest: Guest) -> None:
    """CR0.NE clear asks for an external interrupt (Intel SDM vol. 1 §8.7.2)."""
    encoder = Encoder(seeded(), {})
    state = unmask(State(b"\xd9\xe8", xsave=encoder.xsave()), encoder.random, pending=True)
    context = guest.context(state)
    context.sregs.cr0 &= ~(1 << 5)
    completion = x87.find(context.instruction)
    assert completion is not None
    with pytest.raises(Refused, match=r"CR0\.NE"):
        completion.run(context)


@pytest.mark.parametrize(
    "code", ["d9d1", "d9d8", "d9e2", "dbe0", "dbe4", "dcd0", "ddc8", "ded0", "dfc0", "f2d8c1", "90"]
)
def test_what_the_manual_has_not_is_not_executed(code: str) -> None:
    assert x87.find(decode(bytes.fromhex(code))) is None

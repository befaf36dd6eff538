"""Bit counts, BMI, CRC32, MOVBE, CMPXCHG16B, CLAC, STAC: what our completions make of a state, the processor makes.

``KVMPY_CAMPAIGN=1`` tries fifty times as many states; ``KVMPY_SEED`` repeats a run.
"""

import threading
from collections.abc import Callable

import pytest
from native_state import CAMPAIGN, MEMORY, Guest, Oracle, State, seeded
from random_instructions import STATUS_FLAGS, Encoder

from kvmpy.machine.assist import integer
from kvmpy.machine.assist.context import UD, Completion, Fault
from kvmpy.machine.assist.decode import decode
from kvmpy.machine.assist.native import executor

pytestmark = pytest.mark.kvm

ROUNDS = 20 * CAMPAIGN
OTHER_EACH_TIME = ("rdrand", "rdseed")
RAX, RCX, RDX, RBX, RSI = 0, 1, 2, 3, 6
LOCK_CMPXCHG16B = bytes.fromhex("f0480fc70e")  # lock cmpxchg16b (%rsi)
CARRY, ZERO, AC = 1 << 0, 1 << 6, 1 << 18


@pytest.fixture
def guest(guest: Guest) -> Guest:
    guest.find = integer.find
    return guest


def test_every_row_does_what_the_processor_does(guest: Guest, oracle: Oracle) -> None:
    encoder = Encoder(seeded(), integer.TABLE)
    rows = [row for row in encoder.rows if row[-1].name not in OTHER_EACH_TIME]
    oracle.compare(guest, [encoder.encode(*row) for _ in range(ROUNDS) for row in rows])


def test_cmpxchg16b_exchanges_where_it_compares_equal(guest: Guest, oracle: Oracle) -> None:
    encoder, random = Encoder(seeded(), integer.TABLE), seeded()
    states = []
    for _ in range(40):
        registers, at = [random.getrandbits(64) for _ in range(16)], 16 * random.randrange(15)
        registers[RSI], memory = MEMORY + at, bytearray(encoder.memory())
        if random.random() < 0.7:
            memory[at : at + 16] = _word(registers[RAX]) + _word(registers[RDX])
        code = LOCK_CMPXCHG16B[random.randrange(2) :]
        states.append(State(code, tuple(registers), random.getrandbits(12) & STATUS_FLAGS, memory=bytes(memory)))
    after = oracle.compare(guest, states)
    assert {state.rflags & ZERO for state in after} == {0, ZERO}


def test_locked_cmpxchg16b_is_one_access(guest: Guest) -> None:
    """Another thread counts in the same 16 bytes, on the host: no count is lost, no half of one is seen."""
    count, region = 500 * CAMPAIGN, guest.memory.regions[0]

    def on_host(registers: list[int]) -> bool:
        registers[RSI] = region.hva + MEMORY - region.gpa
        return bool(executor().execute(LOCK_CMPXCHG16B, registers, 0) & ZERO)

    def by_completion(registers: list[int]) -> bool:
        registers[RSI] = MEMORY
        context.registers[:] = registers
        completion.run(context)
        return bool(context.rflags & ZERO)

    def count_up(exchange: Callable[[list[int]], bool]) -> None:
        for _ in range(count):
            done = False
            while not done:
                low, high = (int.from_bytes(guest.memory.read(MEMORY + at, 8), "little") for at in (0, 8))
                registers = [0] * 16
                registers[RAX], registers[RDX], registers[RBX], registers[RCX] = low, high, low + 1, high + 1
                done = exchange(registers)

    context = guest.context(State(LOCK_CMPXCHG16B))
    completion = _found(LOCK_CMPXCHG16B)
    other = threading.Thread(target=count_up, args=(on_host,))
    other.start()
    count_up(by_completion)
    other.join()
    assert guest.memory.read(MEMORY, 16) == _word(2 * count) * 2


@pytest.mark.parametrize("name", OTHER_EACH_TIME)
@pytest.mark.parametrize("prefix", ["", "66", "48"])
def test_random_numbers_differ_and_are_as_wide_as_the_operand(guest: Guest, name: str, prefix: str) -> None:
    code = bytes.fromhex(prefix + "0fc7" + {"rdrand": "f3", "rdseed": "fb"}[name])  # of %ebx
    values = set()
    for _ in range(20):
        after = guest.run(State(code, registers=((1 << 64) - 1,) * 16, rflags=0))
        if after.rflags & CARRY:
            values.add(after.registers[RBX])
    assert len(values) > 10
    kept = {"": 0, "66": (1 << 48) - 1, "48": 0}[prefix]
    assert all(value >> 16 == kept if prefix == "66" else value < 1 << 64 for value in values)
    assert any(value >> 32 for value in values) == (prefix != "")


@pytest.mark.parametrize(("code", "on"), [("0f01cb", True), ("0f01ca", False)])
def test_stac_and_clac_change_ac_alone(guest: Guest, code: str, on: bool) -> None:
    for flags in (0, AC, AC | STATUS_FLAGS):
        context = guest.context(State(bytes.fromhex(code), rflags=flags))
        before = context.rflags
        _found(context.instruction.raw).run(context)
        assert context.rflags == (before | AC if on else before & ~AC)


@pytest.mark.parametrize(
    ("code", "cpl"), [("f00f01cb", 0), ("f30f01cb", 0), ("f20f01ca", 0), ("660f01ca", 0), ("0f01cb", 3), ("0f01ca", 3)]
)
def test_stac_and_clac_take_no_prefix_and_are_of_ring_0(guest: Guest, code: str, cpl: int) -> None:
    context = guest.context(State(bytes.fromhex(code)))
    context.sregs.ss.dpl = cpl
    with pytest.raises(Fault) as raised:
        _found(context.instruction.raw).run(context)
    assert raised.value.vector == UD


@pytest.mark.parametrize("code", ["0fc70e", "f00fc70e", "660faef0", "0fc730", "f30fc7f8"])
def test_opcodes_of_others_are_left_to_them(code: str) -> None:
    """CMPXCHG8B; TPAUSE beside CLWB; VMPTRLD and RDPID beside RDRAND and RDSEED."""
    assert integer.find(decode(bytes.fromhex(code))) is None


def test_clwb_changes_nothing(guest: Guest, oracle: Oracle) -> None:
    oracle.compare(guest, [State(bytes.fromhex("660fae36"), (MEMORY,) * 16, 0x8D5, memory=bytes(range(256)))])


def _found(code: bytes) -> Completion:
    completion = integer.find(decode(code))
    assert completion is not None
    return completion


def _word(value: int) -> bytes:
    return value.to_bytes(8, "little")

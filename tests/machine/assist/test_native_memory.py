"""The memory operand of what is executed natively: rights, pages, alignment, segments; and nothing else is touched.

Source: Intel SDM vol. 3 §4.6 and §4.7 (rights and error codes), §6.15 (#AC); vol. 1 §3.3.7.1 (canonical addresses).
"""

from dataclasses import replace

import pytest
from native_faults import fault, of, run, vector
from native_state import MEMORY, Guest, State

from kvmpy.machine.assist.context import AC, GP, PF, SS, Context, Refused
from kvmpy.machine.probe import tables
from kvmpy.units import PAGE_SIZE, MiB

pytestmark = pytest.mark.kvm

RAX, RSP, RSI = 0, 4, 6
CR0_AM, EFLAGS_AC = 1 << 18, 1 << 18

PAGE_TABLE, PAGES = 0x18_0000, 32 * MiB
"""Where a page table is put, and what it maps."""
PRESENT, WRITABLE, USER, ACCESSED, DIRTY = 1 << 0, 1 << 1, 1 << 2, 1 << 5, 1 << 6
RIGHTS = {
    "absent": 0,
    "read-only": PRESENT | USER,
    "writable": PRESENT | WRITABLE | USER,
    "supervisor": PRESENT | WRITABLE,
}

LOAD, STORE = "0f1006", "0f1106"  # movups (%rsi), %xmm0 and back
FILD, FNSAVE = "df2e", "dd36"
MOVBE_STORE, CMPXCHG16B, POPCNT = "0f38f106", "f0480fc70e", "f3480fb806"


@pytest.fixture
def guest(guest: Guest) -> Guest:
    """Two pages of two gpa, the first at `PAGES`; `set_pages` gives them rights."""
    memory = guest.memory
    memory.write(tables.PAGES_64 + 0x2000 + PAGES // (2 * MiB) * 8, _entry(PAGE_TABLE, RIGHTS["writable"]))
    memory.write(0x13_0000, bytes(2 * PAGE_SIZE))
    set_pages(guest, "writable", "writable")
    return guest


def set_pages(guest: Guest, first: str, second: str) -> None:
    """Map the page behind the other's first: what crosses them is in two places."""
    guest.memory.write(PAGE_TABLE, _entry(0x13_1000, RIGHTS[first]) + _entry(0x13_0000, RIGHTS[second]))


def _entry(gpa: int, rights: int) -> bytes:
    return (gpa | rights).to_bytes(8, "little")


def at(code: str, linear: int) -> State:
    return State(bytes.fromhex(code), (linear,) * 16)


def user(context: Context) -> None:
    context.sregs.ss.dpl = 3


# Code, the rights of two pages, where the operand is, and the fault: CR2 relative to the first page, error code.
PAGE_FAULTS = [
    (LOAD, "absent", "absent", 0, (0, 0)),
    (LOAD, "writable", "absent", 4088, (4096, 0)),
    (LOAD, "absent", "writable", 4088, (4088, 0)),
    (LOAD, "read-only", "read-only", 4088, None),
    (STORE, "absent", "writable", 0, (0, 2)),
    (STORE, "read-only", "writable", 4088, (4088, 3)),
    (STORE, "writable", "read-only", 4088, (4096, 3)),
    (STORE, "writable", "absent", 4095, (4096, 2)),
    (STORE, "writable", "writable", 4088, None),
    (FILD, "writable", "absent", 4089, (4096, 0)),
    (FILD, "writable", "absent", 4088, None),
    (FNSAVE, "writable", "absent", 4096 - 107, (4096, 2)),
    (FNSAVE, "writable", "absent", 4096 - 108, None),
    (MOVBE_STORE, "writable", "read-only", 4093, (4096, 3)),
    (CMPXCHG16B, "read-only", "writable", 0, (0, 3)),
    (POPCNT, "read-only", "absent", 4096 - 8, None),
]


@pytest.mark.parametrize(("code", "first", "second", "offset", "expected"), PAGE_FAULTS)
@pytest.mark.parametrize("cpl", [0, 3])
def test_the_page_tables_say_what_may_be_accessed(
    guest: Guest, code: str, first: str, second: str, offset: int, expected: tuple[int, int] | None, cpl: int
) -> None:
    set_pages(guest, first, second)
    guest.memory.write(0x13_0000, bytes(range(256)) * 32)
    raised = fault(guest, at(code, PAGES + offset), user if cpl else lambda context: None)
    if expected is None:
        assert raised is None
        return
    assert raised is not None
    address, error_code = expected
    assert (raised.vector, raised.address, raised.error_code) == (PF, PAGES + address, error_code | (4 if cpl else 0))
    assert guest.memory.read(0x13_0000, 2 * PAGE_SIZE) == bytes(range(256)) * 32


@pytest.mark.parametrize("code", [LOAD, STORE, CMPXCHG16B])
def test_user_code_does_not_reach_the_kernels_pages(guest: Guest, code: str) -> None:
    set_pages(guest, "supervisor", "writable")
    raised = fault(guest, at(code, PAGES), user)
    assert raised is not None
    assert (raised.vector, raised.error_code) == (PF, 5 if code == LOAD else 7)
    assert fault(guest, at(code, PAGES)) is None


@pytest.mark.parametrize(("code", "dirty"), [(LOAD, 0), (STORE, DIRTY), (CMPXCHG16B, DIRTY), ("660fae36", 0)])
def test_pages_are_marked_as_used(guest: Guest, code: str, dirty: int) -> None:
    """Also by a compare-and-exchange that compares unequal."""
    guest.memory.write(0x13_1000, b"\x01" * 16)
    run(guest, at(code, PAGES))
    entry = int.from_bytes(guest.memory.read(PAGE_TABLE, 8), "little")
    assert entry & (ACCESSED | DIRTY) == ACCESSED | dirty


def test_an_operand_across_pages_is_in_two_places(guest: Guest) -> None:
    guest.memory.write(0x13_1000 + 4088, b"first---")
    guest.memory.write(0x13_0000, b"-second-")
    run(guest, at("0f1006", PAGES + 4088))
    xsave = guest.xsave()
    assert xsave[160:176] == b"first----second-"
    run(guest, replace(at("0f1106", PAGES + 4084), xsave=xsave))
    assert guest.memory.read(0x13_1000 + 4084, 12) == b"first----sec"
    assert guest.memory.read(0x13_0000, 8) == b"ond-ond-"


@pytest.mark.parametrize(
    ("code", "offset", "expected"),
    [
        ("0f2806", 8, GP),  # movaps
        ("0f5806", 4, GP),  # addps
        ("0f5806", 16, None),
        ("0f1006", 1, None),  # movups
        ("f30f5806", 3, None),  # addss
        ("660f3a600601", 1, None),  # pcmpestrm
        ("c5f85806", 4, None),  # vaddps
        ("c5f82806", 8, GP),  # vmovaps
        ("c5fc2806", 16, GP),  # vmovaps of 256 bits
        ("c5fc2806", 32, None),
        ("0f2b06", 8, GP),  # movntps
        ("660f3a0f0603", 8, GP),  # palignr
        ("0f38cb06", 8, GP),  # sha256rnds2
        ("480fc70e", 8, GP),  # cmpxchg16b
        ("0f6f06", 1, None),  # movq of MMX
        ("dd36", 1, None),  # fnsave
    ],
)
def test_alignment_is_as_each_instruction_demands(guest: Guest, code: str, offset: int, expected: int | None) -> None:
    raised = fault(guest, at(code, MEMORY + offset))
    assert (raised.vector if raised else None) == expected
    assert raised is None or raised.error_code == 0


def test_alignment_is_looked_at_before_the_page(guest: Guest) -> None:
    set_pages(guest, "absent", "absent")
    assert vector(guest, at("0f2806", PAGES + 8)) == GP


@pytest.mark.parametrize(("cpl", "cr0", "flags", "expected"), [(3, 1, 1, AC), (0, 1, 1, None), (3, 0, 1, None)])
def test_alignment_check_is_for_user_code_that_asks(
    guest: Guest, cpl: int, cr0: int, flags: int, expected: int | None
) -> None:
    def change(context: Context) -> None:
        context.sregs.ss.dpl, context.rflags = cpl, context.rflags | flags * EFLAGS_AC
        context.sregs.cr0 |= cr0 * CR0_AM

    assert vector(guest, at("f3480fb806", MEMORY + 4), change) == expected
    assert vector(guest, at("f3480fb806", MEMORY + 8), change) is None


@pytest.mark.parametrize(("code", "expected"), [("0f1006", GP), ("0f1003", GP), ("0f104500", SS), ("0f100424", SS)])
@pytest.mark.parametrize("linear", [1 << 47, (1 << 47) - 8, 0xFFFF7FFFFFFFFFFF, 1 << 63])
def test_addresses_are_canonical(guest: Guest, code: str, linear: int, expected: int) -> None:
    """The last byte too. Through rsp and rbp the stack segment is meant."""
    raised = fault(guest, at(code, linear))
    assert raised is not None
    assert (raised.vector, raised.error_code) == (expected, 0)


def test_fs_and_gs_have_bases(guest: Guest) -> None:
    def change(context: Context) -> None:
        context.sregs.fs.base, context.sregs.gs.base, context.sregs.ds.base = 0x100, 0x200, 0x300

    for prefix, base in (("64", 0x100), ("65", 0x200), ("3e", 0), ("", 0)):
        memory = bytes([1, 3, 7, 15]).ljust(256, b"\0")
        state = State(bytes.fromhex(prefix + "f30fb806"), (MEMORY - base,) * 16, memory=memory)  # popcnt (%rsi), %eax
        assert run(guest, state, change).registers[RAX] == 1 + 2 + 3 + 4


def test_a_device_is_no_operand(guest: Guest) -> None:
    """Above RAM: refused, not read as something."""
    with pytest.raises(Refused, match="not RAM"):
        run(guest, at(LOAD, 4 * MiB))


def test_rsp_is_an_operand_as_any_other(guest: Guest) -> None:
    registers = tuple(0x1111 * number for number in range(16))
    state = State(bytes.fromhex("f3480fb8e4"), registers)  # popcnt %rsp, %rsp
    assert run(guest, state).registers == [*registers[:RSP], (0x4444).bit_count(), *registers[RSP + 1 :]]
    assert run(guest, of("0f1006")).registers == [MEMORY] * 16

"""The page walker against tables made by hand: every right, every reserved bit, every level."""

import random
from collections.abc import Iterator
from itertools import product

import pytest
from page_tables import AC, FIRST_TABLE, LMA, NXE, PAE, PAGE, PG, PS, PSE, RW, SMAP, SMEP, US, WP, XD, A, D, P, Tables

from kvmpy import GiB, GuestMemory, MiB
from kvmpy.errors import GuestMemoryError
from kvmpy.machine.paging import PageFault, PageUnsupported, Paging, translate, walk

HIGH = 0xFFFF_8123_4567_8ABC
LOW = 0x0000_7EDC_BA98_7654
MODES = ("32-bit", "PAE", "4-level", "5-level")
LINEAR = {"32-bit": 0xC163_5567, "PAE": 0xC123_4567, "4-level": HIGH, "5-level": 0xFF12_3456_789A_BCDE}


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory(2 * MiB) as memory:
        yield memory


def fault(memory: GuestMemory, paging: Paging, linear: int, **access: bool) -> int | None:
    """Return the error code of the access, or None where it is allowed."""
    try:
        translate(memory, paging, linear, **access)
    except PageFault as error:
        return error.error_code if error.address == linear else -1
    return None


# --- where an address leads to ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("address", [0, 0xFFF, 0x1000, LOW, HIGH, 2**64 - 1, 1 << 47, 1 << 46])
def test_every_level_takes_its_bits_of_the_address(memory, mode, address):
    """Intel SDM vol. 3, figures 4-2, 4-5, 4-8 and 4-11."""
    if mode in ("32-bit", "PAE"):
        address &= 2**32 - 1
    elif mode == "4-level" and address == 1 << 47:
        address = 2**64 - 2**47
    tables = Tables(memory, mode, address).write()
    assert translate(memory, tables.paging(), address) == PAGE | address & 0xFFF


@pytest.mark.parametrize(
    ("mode", "leaf", "page", "size"),
    [
        ("32-bit", 2, 0x40_0000, 4 * MiB),
        ("PAE", 2, 0x20_0000, 2 * MiB),
        ("4-level", 2, 0x20_0000, 2 * MiB),
        ("4-level", 3, 0x4000_0000, GiB),
        ("5-level", 2, 0xF_FFFF_FFE0_0000, 2 * MiB),
        ("5-level", 3, 0xF_FFFF_C000_0000, GiB),
    ],
)
def test_large_pages(memory, mode, leaf, page, size):
    """PS ends the walk: the offset is what is left of the address. The page need not be RAM."""
    tables = Tables(memory, mode, LINEAR[mode], page=page, leaf=leaf).write()
    assert translate(memory, tables.paging(), LINEAR[mode]) == page + LINEAR[mode] % size
    assert walk(memory, tables.paging(), LINEAR[mode])[-1].level == leaf
    pat = page | (1 << 12)
    tables = Tables(memory, mode, LINEAR[mode], page=pat, leaf=leaf).write()
    assert translate(memory, tables.paging(), LINEAR[mode]) == page + LINEAR[mode] % size


def test_pages_of_4_mib_can_lie_above_4_gib(memory):
    """PSE-36: bits 20..13 of the entry are bits 39..32 of the address (Intel SDM vol. 3, table 4-4)."""
    tables = Tables(memory, "32-bit", LINEAR["32-bit"], page=0x8040_0000 | 0xA5 << 13, leaf=2).write()
    assert translate(memory, tables.paging(), LINEAR["32-bit"]) == 0xA5_8040_0000 + LINEAR["32-bit"] % (4 * MiB)


def test_without_pse_the_bit_says_nothing(memory):
    """CR4.PSE = 0: a PD entry is a page table, whatever its bit 7."""
    tables = Tables(memory, "32-bit", LINEAR["32-bit"], bits={2: P | RW | US | PS}).write()
    paging = tables.paging()
    assert translate(memory, paging._replace(cr4=0), LINEAR["32-bit"]) == PAGE | 0x567


def test_without_paging_the_address_is_physical(memory):
    """CR0.PG = 0: 32 bits of address, no tables."""
    assert translate(memory, Paging(1, FIRST_TABLE, 0, 0, 2), 0x1_2345_6789, write=True) == 0x2345_6789
    assert walk(memory, Paging(1, FIRST_TABLE, 0, 0, 2), 0x1234) == ()


def test_pae_tables_begin_at_a_multiple_of_32(memory):
    """CR3 bits 31..5 (Intel SDM vol. 3, table 4-7); in the other modes bits 11..0 are flags or a PCID."""
    tables = Tables(memory, "PAE", 0x4000_0000).write()
    entry = tables.entry(3)
    tables.set(3, 0)
    memory.write(FIRST_TABLE + 0x30E0 + 8, entry.to_bytes(8, "little"))
    assert translate(memory, tables.paging()._replace(cr3=FIRST_TABLE + 0x30E0 + 0x1F), 0x4000_0000) == PAGE
    long = Tables(memory, "4-level", HIGH).write().paging()
    assert translate(memory, long._replace(cr3=long.cr3 | 0xFFF), HIGH) == PAGE | HIGH & 0xFFF


@pytest.mark.parametrize("mode", ["4-level", "5-level"])
def test_addresses_that_are_not_canonical_have_no_translation(memory, mode):
    """They raise #GP or #SS before paging (Intel SDM vol. 1 §3.3.7.1): not this module's fault to raise."""
    bits = 47 if mode == "4-level" else 56
    paging = Tables(memory, mode, 0).write().paging()
    for address in (1 << bits, 2**64 - (1 << bits) - 1, 1 << 63):
        with pytest.raises(PageUnsupported, match="not canonical"):
            translate(memory, paging, address)
        assert walk(memory, paging, address) == ()


# --- rights -------------------------------------------------------------------------------------------------------


def allowed(*, user: bool, write: bool, fetch: bool, us: bool, rw: bool, xd: bool, on: dict[str, bool]) -> bool:
    """What Intel SDM vol. 3 §4.6.1 says, bullet by bullet, for a page whose rights are ``us``, ``rw`` and ``xd``."""
    if not user:
        if fetch:
            if not us:
                return not (on["nxe"] and xd)
            return not on["smep"] and not (on["nxe"] and xd)
        if not us:
            return rw or not write or not on["wp"]
        if on["smap"] and not on["ac"]:
            return False
        return rw or not write or not on["wp"]
    if not us:
        return False
    if fetch:
        return not (on["nxe"] and xd)
    return rw or not write


@pytest.mark.parametrize(
    ("mode", "weak"), [(m, level) for m, n in zip(MODES, (2, 2, 4, 5), strict=True) for level in range(1, n + 1)]
)
def test_every_right_at_every_level(memory, mode, weak):
    """One entry of the path has the rights, the others have all: for each access, register bit and right."""
    linear = LINEAR[mode]
    has_xd = mode != "32-bit"
    for us, rw, xd, wp, nxe, smep, smap, ac in product((False, True), repeat=8):
        if xd and not (has_xd and nxe):
            continue
        bits = P | RW * rw | US * us | XD * xd
        tables = Tables(memory, mode, linear, bits={weak: bits}).write()
        paging = tables.paging(cr0=WP * wp, cr4=SMEP * smep | SMAP * smap, efer=NXE * nxe, rflags=2 | AC * ac)
        on = {"wp": wp, "nxe": nxe and has_xd, "smep": smep, "smap": smap, "ac": ac}
        for user, (write, fetch) in product((False, True), ((False, False), (True, False), (False, True))):
            expected = None
            if not allowed(user=user, write=write, fetch=fetch, us=us, rw=rw, xd=xd, on=on):
                expected = 1 | write << 1 | user << 2 | (fetch and (smep or on["nxe"])) << 4
            where = (us, rw, xd, on, user, write, fetch)
            assert fault(memory, paging, linear, user=user, write=write, fetch=fetch) == expected, where


@pytest.mark.parametrize("mode", MODES)
def test_the_four_pdpt_entries_of_pae_have_no_rights(memory, mode):
    """Intel SDM vol. 3 §4.4.1: their bits 1 and 2 are reserved; in all other modes every level counts."""
    tables = Tables(memory, mode, LINEAR[mode]).write()
    assert fault(memory, tables.paging(), LINEAR[mode], write=True, user=True) is None
    tables.bits = {tables.levels: P}
    tables.write()
    assert fault(memory, tables.paging(), LINEAR[mode], write=True, user=True) == (None if mode == "PAE" else 7)


@pytest.mark.parametrize("mode", MODES)
def test_what_is_not_present_has_error_code_bit_0_clear(memory, mode):
    """Intel SDM vol. 3 §4.7: P = 0 at any level; W/R, U/S and I/D as the access was. Other bits do not matter."""
    tables = Tables(memory, mode, LINEAR[mode])
    for level in range(tables.levels, 0, -1):
        tables.write().set(level, (2 ** (8 * tables.entry_size) - 1) & ~P)
        for user, write in product((False, True), repeat=2):
            assert fault(memory, tables.paging(), LINEAR[mode], user=user, write=write) == write << 1 | user << 2
        told = 0x10 if mode != "32-bit" else 0
        assert fault(memory, tables.paging(), LINEAR[mode], fetch=True) == told
        assert fault(memory, tables.paging(efer=0), LINEAR[mode], fetch=True) == 0
        assert fault(memory, tables.paging(efer=0, cr4=SMEP), LINEAR[mode], fetch=True) == 0x10


# --- reserved bits ------------------------------------------------------------------------------------------------

M = 46
ABOVE = set(range(M, 52))
RESERVED = {
    # (mode, leaf): by level, the bits that raise a fault when they are set (Intel SDM vol. 3, tables 4-4 to 4-20)
    ("4-level", 1): {4: ABOVE | {7}, 3: ABOVE, 2: ABOVE, 1: ABOVE},
    ("4-level", 2): {4: ABOVE | {7}, 3: ABOVE, 2: ABOVE | set(range(13, 21))},
    ("4-level", 3): {4: ABOVE | {7}, 3: ABOVE | set(range(13, 30))},
    ("5-level", 1): {5: ABOVE | {7}, 4: ABOVE | {7}, 3: ABOVE, 2: ABOVE, 1: ABOVE},
    ("PAE", 1): {3: set(range(M, 64)) | {1, 2, 5, 6, 7, 8}, 2: set(range(M, 63)), 1: set(range(M, 63))},
    ("PAE", 2): {3: set(range(M, 64)) | {1, 2, 5, 6, 7, 8}, 2: set(range(M, 63)) | set(range(13, 21))},
    ("32-bit", 1): {2: set(), 1: set()},
    ("32-bit", 2): {2: {21}},
}
# Flags that change where the walk goes: P everywhere, PS where it is defined.
DEFINED = {0: set(), 7: {("PAE", 2), ("4-level", 2), ("4-level", 3), ("5-level", 2), ("5-level", 3), ("32-bit", 2)}}


@pytest.mark.parametrize(("mode", "leaf"), RESERVED)
@pytest.mark.parametrize("nxe", [NXE, 0])
def test_exactly_the_reserved_bits_are_refused(memory, mode, leaf, nxe):
    """Error code: RSVD and P (Intel SDM vol. 3 §4.7). XD is reserved while EFER.NXE is 0."""
    linear = LINEAR[mode]
    tables = Tables(memory, mode, linear, page=0, leaf=leaf)
    paging = tables.paging(efer=nxe, width=M)
    for level, reserved in RESERVED[mode, leaf].items():
        if mode != "32-bit" and not nxe:
            reserved = reserved | {63}
        for bit in range(8 * tables.entry_size):
            address = 12 <= bit < (32 if mode == "32-bit" else M) and bit not in reserved
            if bit == 0 or address or (bit == 7 and (mode, level) in DEFINED[7]):
                continue
            entry = tables.write().entry(level)
            tables.set(level, entry | 1 << bit)
            got = fault(memory, paging, linear, user=True)
            assert got == (0b1101 if bit in reserved else None), (level, bit)


@pytest.mark.parametrize("width", [32, 36, 39, 40, 52])
def test_pages_of_4_mib_reach_as_far_as_the_processor(memory, width):
    """Bits 21 to M - 19 of the entry are reserved, M at most 40 (Intel SDM vol. 3, table 4-4)."""
    linear, m = LINEAR["32-bit"], min(width, 40)
    for bit in range(13, 22):
        tables = Tables(memory, "32-bit", linear, page=1 << bit, leaf=2).write()
        expected = 0b1001 if bit >= m - 19 else None
        assert fault(memory, tables.paging(width=width), linear) == expected, bit


def test_reserved_bits_come_before_rights(memory):
    """RSVD is set although the access would not be allowed either; a lower level is not looked at."""
    tables = Tables(memory, "4-level", HIGH, bits={3: P | 1 << 51, 1: 0}).write()
    assert fault(memory, tables.paging(width=46), HIGH, user=True, write=True) == 0b1111


def test_the_highest_address_of_the_processor_is_no_reserved_bit(memory):
    """MAXPHYADDR 52: no bit is left over."""
    tables = Tables(memory, "4-level", HIGH, page=0xF_FFFF_FFFF_F000).write()
    assert translate(memory, tables.paging(width=52), HIGH) == 0xF_FFFF_FFFF_FABC
    assert fault(memory, tables.paging(width=51), HIGH) == 0b1001


# --- accessed and dirty -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "leaf"), [(mode, leaf) for mode in MODES for leaf in (1, 2)])
@pytest.mark.parametrize("write", [False, True])
def test_accessed_and_dirty_are_set_and_nothing_else(memory, mode, leaf, write):
    """A in every entry of the path, D in the last where it is written to (Intel SDM vol. 3 §4.8)."""
    tables = Tables(memory, mode, LINEAR[mode], page=0, leaf=leaf).write()
    before = memory.read(0, 2 * MiB)
    expected = {level: entry | A for level, entry in tables.entries().items()}
    expected[leaf] |= D * write
    if mode == "PAE":
        expected[3] &= ~A
    translate(memory, tables.paging(), LINEAR[mode], write=write)
    assert tables.entries() == expected
    for level, entry in expected.items():
        tables.set(level, entry & ~(A | D))
    assert memory.read(0, 2 * MiB) == before


def test_the_last_entry_of_ram_is_marked(memory):
    """Four bytes before the end: the atomic word is the eight that hold the entry."""
    at = 2 * MiB - 4
    memory.write(at, (P | PS).to_bytes(4, "little"))
    assert translate(memory, Paging(PG | 1, 2 * MiB - 0x1000, PSE, 0, 2), 0xFFFF_FFFF) == 0x3F_FFFF
    assert memory.read(at - 4, 8) == bytes(4) + (P | PS | A).to_bytes(4, "little")


def test_a_refused_access_marks_nothing(memory):
    """Not even the tables on the way."""
    tables = Tables(memory, "4-level", HIGH, bits={1: P | RW}).write()
    before = tables.entries()
    assert fault(memory, tables.paging(), HIGH, user=True) == 5
    assert tables.entries() == before


def test_walk_marks_nothing_and_tells_every_entry(memory):
    """Level, where the entry is, and what it says: also the one that is not present."""
    tables = Tables(memory, "4-level", HIGH, bits={1: 0}).write()
    before = tables.entries()
    steps = walk(memory, tables.paging(), HIGH)
    assert [(step.level, step.gpa) for step in steps] == [(level, tables.entry_gpa(level)) for level in (4, 3, 2, 1)]
    assert {step.level: step.entry for step in steps} == tables.entries() == before


# --- hostile tables -----------------------------------------------------------------------------------------------


def test_a_table_that_points_at_itself_ends(memory):
    """Every level is the same entry; it is a page in the end, and the page is the table."""
    paging = Paging(PG | 1, FIRST_TABLE, PAE, LMA | NXE, 2)
    entry = FIRST_TABLE | P | RW | US
    memory.write(FIRST_TABLE, entry.to_bytes(8, "little"))
    assert translate(memory, paging, 0x123, write=True) == FIRST_TABLE | 0x123
    assert memory.read(FIRST_TABLE, 8) == (entry | A | D).to_bytes(8, "little")


@pytest.mark.parametrize("mode", MODES)
def test_tables_outside_ram_are_told_from_page_faults(memory, mode):
    """A processor would read whatever is there: GuestMemoryError. `walk` shows the entries up to it."""
    tables = Tables(memory, mode, LINEAR[mode])
    for level in range(tables.levels, 1, -1):
        for gpa in (2 * MiB, 0xFFFF_F000, *((1 << 46, 0xF_FFFF_FFFF_F000) if mode != "32-bit" else ())):
            entry = tables.write().entry(level)
            tables.set(level, gpa | entry & 0xFFF)
            with pytest.raises(GuestMemoryError):
                translate(memory, tables.paging(), LINEAR[mode])
            assert [step.level for step in walk(memory, tables.paging(), LINEAR[mode])][-1] == level
            assert not any(entry & A for entry in tables.entries().values())


def test_cr3_outside_ram(memory):
    """The first table too."""
    for cr3 in (2 * MiB, (1 << 52) - 4096, 2**64 - 1):
        paging = Paging(PG | 1, cr3, PAE, LMA, 2)
        with pytest.raises(GuestMemoryError):
            translate(memory, paging, 0)
        assert walk(memory, paging, 0) == ()


class Changing(GuestMemory):
    """Memory in which another vCPU changes the entry at ``gpa`` right after it was read, ``times`` times."""

    gpa, times, values = 0, 0, (0, 0)

    def read(self, gpa: int, size: int) -> bytes:
        data = super().read(gpa, size)
        if gpa == self.gpa and self.times:
            self.times -= 1
            super().write(gpa, self.values[self.times % 2].to_bytes(size, "little"))
        return data


def test_an_entry_that_changes_during_the_walk_is_walked_again():
    """What counts is the entry that is there when A and D are set."""
    with Changing(2 * MiB) as memory:
        tables = Tables(memory, "4-level", HIGH).write()
        now = PAGE | 0x1000 | P | RW | US
        memory.values, memory.gpa, memory.times = (now, 0), tables.entry_gpa(1), 1
        assert translate(memory, tables.paging(), HIGH, write=True) == PAGE | 0x1ABC
        assert tables.entry(1) == now | A | D


def test_an_entry_that_never_stops_changing_ends_the_walk():
    with Changing(2 * MiB) as memory:
        tables = Tables(memory, "4-level", HIGH).write()
        memory.values = (PAGE | 0x1000 | P, PAGE | P)
        memory.gpa, memory.times = tables.entry_gpa(1), 2**62 + 1
        with pytest.raises(PageUnsupported, match="change during the walk"):
            translate(memory, tables.paging(), HIGH)


def test_random_tables_give_an_address_or_one_of_two_errors(memory):
    """Noise for tables, registers by chance: nothing else comes out, and only A and D change."""
    rng = random.Random(7)
    seen = set()
    for _ in range(600):
        for _ in range(40):
            entry = rng.getrandbits(64) & rng.choice((0x1F_FFFF, 0xFFF, -1)) | rng.choice((P, P | US | RW))
            memory.write(rng.randrange(0, 0x4000, 8), entry.to_bytes(8, "little"))
        mode = rng.choice(MODES)
        paging = Tables(memory, mode, 0).paging(
            cr0=WP * rng.randrange(2),
            cr4=rng.choice((0, SMEP, SMAP)),
            efer=NXE * rng.randrange(2),
            width=rng.randint(32, 52),
        )
        paging = paging._replace(cr3=rng.randrange(0, 0x4000, 0x20))
        linear = rng.getrandbits(rng.choice((5, 12, 21, 47))) & rng.choice((-1, 2**14 - 1))
        before = memory.read(0, 2 * MiB)
        access = {name: rng.random() < 0.5 for name in ("write", "fetch", "user")}
        try:
            gpa = translate(memory, paging, linear, **access)
            assert 0 <= gpa < 1 << 52
            seen.add("address")
        except (PageFault, GuestMemoryError) as error:
            seen.add(type(error).__name__)
            assert memory.read(0, 2 * MiB) == before
        walk(memory, paging, linear)
        assert len(memory.read(0, 2 * MiB)) == len(before)
    assert seen == {"address", "PageFault", "GuestMemoryError"}

"""The MP tables, read back as a kernel reads them: search, check sums, walk the entries."""

import struct
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmpy.machine import layout, mptable
from kvmpy.machine.memory import GuestMemory
from kvmpy.units import MiB

ENTRY_SIZES = {0: 20, 1: 8, 2: 8, 3: 8, 4: 8}
COUNTS = st.integers(1, 1024) | st.sampled_from([1, 2, 253, 254, 255, 256])


def entries(table: bytes) -> Iterator[bytes]:
    at = 44
    for _ in range(struct.unpack_from("<H", table, 34)[0]):
        size = ENTRY_SIZES[table[at]]
        yield table[at : at + size]
        at += size
    assert at == len(table)


def of_type(table: bytes, entry_type: int) -> list[bytes]:
    return [entry for entry in entries(table) if entry[0] == entry_type]


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory(2 * MiB) as memory:
        yield memory


def test_search_of_the_last_kib_of_base_memory_finds_the_table(memory: GuestMemory) -> None:
    """MP 1.4 §4.1: the pointer is on a 16-byte boundary within the first KiB of the EBDA, all bytes sum to zero."""
    mptable.write(memory, 2)
    found = [gpa for gpa in range(0x9FC00, 0xA0000, 16) if memory.read(gpa, 4) == b"_MP_"]
    assert found == [layout.EBDA]
    pointer = memory.read(layout.EBDA, 16)
    address, paragraphs, revision = struct.unpack_from("<IBB", pointer, 4)
    assert sum(pointer) & 0xFF == 0
    assert (paragraphs, revision) == (1, 4)
    assert memory.read(address, 4) == b"PCMP"


def test_feature_bytes_say_table_present_and_virtual_wire(memory: GuestMemory) -> None:
    """MP 1.4 §4.1: feature byte 1 of zero, a configuration table is present; IMCRP clear, virtual wire mode."""
    mptable.write(memory, 1)
    assert memory.read(layout.EBDA + 11, 5) == bytes(5)


@settings(deadline=None, max_examples=60)
@given(COUNTS)
def test_length_count_and_checksum_are_right(cores: int) -> None:
    """MP 1.4 §4.2: base table length, entry count, and a checksum that makes all bytes sum to zero."""
    table = mptable.build(cores)
    length, revision = struct.unpack_from("<HB", table, 4)
    assert length == len(table) <= layout.MP_TABLE_SIZE
    assert revision == 4
    assert sum(table) & 0xFF == 0
    assert struct.unpack_from("<I", table, 36) == (layout.LOCAL_APIC,)
    types = [entry[0] for entry in entries(table)]
    assert types == sorted(types)


@settings(deadline=None, max_examples=60)
@given(COUNTS)
def test_each_apic_has_an_id_of_its_own(cores: int) -> None:
    """MP 1.4 §3.6.6: local and I/O APIC ids are unique; 0xff is the broadcast."""
    table = mptable.build(cores)
    ids = [entry[1] for entry in of_type(table, 0)]
    assert ids == list(range(min(cores, 254)))
    (ioapic,) = of_type(table, 2)
    assert ioapic[1] not in ids
    assert ioapic[1] < 0xFF


@settings(deadline=None, max_examples=60)
@given(COUNTS)
def test_one_processor_boots_and_all_are_enabled(cores: int) -> None:
    """MP 1.4 §4.3.1: EN set when usable, BP set for the bootstrap processor alone."""
    processors = of_type(mptable.build(cores), 0)
    assert [entry[3] for entry in processors] == [3] + [1] * (len(processors) - 1)
    assert {entry[2] for entry in processors} == {0x14}


def test_ioapic_is_where_the_map_draws_it() -> None:
    """MP 1.4 §4.3.3: id, version, EN, and the base address."""
    (ioapic,) = of_type(mptable.build(3), 2)
    assert struct.unpack("<BBBBI", ioapic) == (2, 3, 0x11, 1, layout.IOAPIC)


def test_irqs_go_to_their_pins_and_the_pit_to_pin_2() -> None:
    """MP 1.4 §4.3.4: each entry names bus, bus IRQ, I/O APIC and pin. All 24 pins but those two have their own IRQ."""
    table = mptable.build(2)
    wires = {}
    for entry in of_type(table, 3):
        interrupt_type, flags, bus, irq, ioapic, pin = struct.unpack("<xBHBBBB", entry)
        assert (interrupt_type, flags, bus, ioapic) == (0, 0, 0, 2)
        wires[irq] = pin
    assert wires == {irq: irq for irq in range(24) if irq != 2} | {0: 2}
    assert len(set(wires.values())) == len(wires) == len(of_type(table, 3))
    assert [entry[2:] for entry in of_type(table, 1)] == [b"ISA   "]


def test_lint0_is_extint_and_lint1_is_nmi() -> None:
    """MP 1.4 §4.3.5: ExtINT (3) to LINT0 of the processor that boots, NMI (1) to LINT1 of all (0xff)."""
    local = [struct.unpack("<xBHBBBB", entry) for entry in of_type(mptable.build(2), 4)]
    assert local == [(3, 0, 0, 0, 0, 0), (1, 0, 0, 0, 0xFF, 1)]


def test_nothing_is_written_but_the_tables_and_the_words_that_lead_to_them(memory: GuestMemory) -> None:
    """MP 1.4 §4: a search starts from 0x40e (the EBDA's segment) and 0x413 (KiB of base memory)."""
    mptable.write(memory, 1024)
    table = mptable.build(1024)
    rest = bytearray(memory.read(0, 2 * MiB))
    assert rest[0x40E:0x410] == (0x9FC0).to_bytes(2, "little")
    assert rest[0x413:0x415] == (639).to_bytes(2, "little")
    rest[0x40E:0x410] = rest[0x413:0x415] = bytes(2)
    rest[layout.EBDA : layout.EBDA + 16] = bytes(16)
    rest[layout.MP_TABLE : layout.MP_TABLE + len(table)] = bytes(len(table))
    assert not any(rest)


def test_no_cores_is_refused(memory: GuestMemory) -> None:
    """A machine has a processor; a refusal writes nothing."""
    with pytest.raises(ValueError, match="0 cores"):
        mptable.write(memory, 0)
    assert memory.read(layout.EBDA, 16) == bytes(16)

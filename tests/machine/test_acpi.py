"""The ACPI tables, read back as a kernel reads them: from the RSDP, by pointers and lengths; and the DSDT's AML."""

import struct
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmpy._shim import lib
from kvmpy.machine import acpi, aml, layout
from kvmpy.machine.memory import GuestMemory
from kvmpy.units import MiB

COUNTS = st.integers(1, 1024) | st.sampled_from([1, 2, 254, 255, 256, 257])


class Tables:
    """What a kernel finds: each table's bytes by signature, and where each lies."""

    def __init__(self, cores: int) -> None:
        self.bytes = acpi.build(cores)
        self.at: dict[str, int] = {}
        rsdt, self.rsdp_length, xsdt = struct.unpack_from("<IIQ", self.bytes, 16)
        self.lists = {
            "RSDT": [gpa for (gpa,) in struct.iter_unpack("<I", self.table(rsdt)[36:])],
            "XSDT": [gpa for (gpa,) in struct.iter_unpack("<Q", self.table(xsdt)[36:])],
        }
        for gpa in self.lists["XSDT"]:
            self.table(gpa)
        self.fadt = self.named("FACP")
        self.table(self.word("<I", 36))
        self.table(self.word("<Q", 140))

    def table(self, gpa: int) -> bytes:
        offset = gpa - layout.ACPI_TABLES
        signature, length = struct.unpack_from("<4sI", self.bytes, offset)
        self.at[signature.decode()] = gpa
        assert 0 < length <= len(self.bytes) - offset
        return self.bytes[offset : offset + length]

    def named(self, signature: str) -> bytes:
        return self.table(self.at[signature])

    def word(self, form: str, offset: int) -> int:
        (value,) = struct.unpack_from(form, self.fadt, offset)
        return int(value)

    def madt(self) -> Iterator[tuple[int, bytes]]:
        table, at = self.named("APIC"), 44
        while at < len(table):
            yield table[at], table[at : at + table[at + 1]]
            at += table[at + 1]
        assert at == len(table)


def test_search_of_the_bios_area_finds_the_rsdp() -> None:
    """ACPI 6.5 §5.2.5.1: on a 16-byte boundary from 0xe0000 to 0xfffff; the RSDP's own 20 bytes sum to zero."""
    with GuestMemory(1 * MiB) as memory:
        acpi.write(memory, 2)
        found = [gpa for gpa in range(0xE0000, 0x100000, 16) if memory.read(gpa, 8) == b"RSD PTR "]
        assert found == [layout.ACPI_TABLES]
        assert sum(memory.read(found[0], 20)) & 0xFF == 0
        assert memory.read(found[0], len(acpi.build(2))) == acpi.build(2)
        assert not any(memory.read(0, layout.ACPI_TABLES))


@settings(deadline=None, max_examples=60)
@given(COUNTS)
def test_every_table_sums_to_zero_and_lies_apart(cores: int) -> None:
    """ACPI 6.5 §5.2.5.3, §5.2.6: checksums over the length given; the FACS (§5.2.10) has none but is 64-aligned."""
    tables = Tables(cores)
    assert tables.rsdp_length == 36
    assert sum(tables.bytes[:36]) & 0xFF == 0
    assert (tables.bytes[15], tables.bytes[33:36]) == (2, bytes(3))
    assert set(tables.at) == {"RSDT", "XSDT", "FACP", "APIC", "DSDT", "FACS"}
    assert tables.at["FACS"] % 64 == 0
    end = layout.ACPI_TABLES + 36
    for gpa, signature in sorted((gpa, signature) for signature, gpa in tables.at.items()):
        assert gpa >= end
        assert gpa % 16 == 0
        end = gpa + len(tables.named(signature))
        assert signature == "FACS" or sum(tables.named(signature)) & 0xFF == 0
    assert end <= layout.ACPI_TABLES + layout.ACPI_TABLES_SIZE


def test_tables_are_reserved_in_the_memory_map() -> None:
    """ACPI 6.5 §15: what OSPM may not use as RAM is reported as such."""
    end = layout.ACPI_TABLES + layout.ACPI_TABLES_SIZE
    assert any(
        gpa <= layout.ACPI_TABLES and end <= gpa + size and kind == layout.RESERVED
        for gpa, size, kind in layout.memory_map(64 * MiB)
    )


def test_rsdt_and_xsdt_list_the_same_tables() -> None:
    """ACPI 6.5 §5.2.7, §5.2.8: a kernel of ACPI 1.0 reads the RSDT, all others the XSDT."""
    tables = Tables(1)
    assert tables.lists["RSDT"] == tables.lists["XSDT"] == [tables.at["FACP"], tables.at["APIC"]]


def test_fadt_names_the_ports_of_the_abi() -> None:
    """ACPI 6.5 §5.2.9, table 5.9: the 32-bit and the extended fields agree; revision 6 has 276 bytes."""
    tables = Tables(1)
    assert (len(tables.fadt), tables.fadt[8]) == (276, 6)
    assert tables.word("<H", 46) == lib.KVMPY_IRQ_ACPI
    assert tables.word("<I", 56) == tables.word("<Q", 152) == lib.KVMPY_PORT_ACPI_EVENT
    assert tables.word("<I", 64) == tables.word("<Q", 176) == lib.KVMPY_PORT_ACPI_CONTROL
    assert tables.fadt[148:152] == bytes([1, 32, 0, 2])
    assert tables.fadt[172:176] == bytes([1, 16, 0, 2])
    assert tables.fadt[88:94] == bytes([4, 2, 0, 0, 0, 0])
    assert tables.word("<I", 40) == tables.word("<Q", 140) == tables.at["DSDT"]


def test_fadt_resets_by_cf9_and_is_not_hardware_reduced() -> None:
    """ACPI 6.5 §4.8.3.6: RESET_REG is of 8 bits, RESET_REG_SUP (bit 10) set; HW_REDUCED_ACPI is bit 20."""
    tables = Tables(1)
    assert struct.unpack_from("<BBBBQB", tables.fadt, 116) == (1, 8, 0, 1, 0xCF9, 6)
    flags = tables.word("<I", 112)
    assert flags >> 10 & 1 == 1
    assert flags >> 20 & 1 == 0
    assert flags & 1 << 8 == 0
    assert tables.word("<H", 109) & 2 == 2


def test_fadt_says_where_buttons_alarm_and_century_are() -> None:
    """ACPI 6.5 table 5.10: PWR_BUTTON (4), SLP_BUTTON (5), FIX_RTC (6) set: not in the PM1 registers; RTC_S4 (7) clear.

    ACPI 6.5 table 5.9: no day and no month of an alarm; the century is in CMOS register 0x32. IAPC_BOOT_ARCH bit 5,
    no CMOS RTC, is clear.
    """
    tables = Tables(1)
    assert tables.word("<I", 112) >> 4 & 0xF == 0b0111
    assert tables.fadt[106:109] == bytes([0, 0, 0x32])
    assert tables.word("<H", 109) & 1 << 5 == 0


def test_fadt_has_no_smi_command_and_no_pm_timer() -> None:
    """ACPI 6.5 table 5.9: SMI_CMD of zero, always in ACPI mode; PM_TMR_LEN of zero with PM_TMR_BLK of zero."""
    tables = Tables(1)
    assert tables.fadt[48:56] == bytes(8)
    assert tables.word("<I", 76) == tables.fadt[91] == tables.word("<Q", 212) == 0


@settings(deadline=None, max_examples=60)
@given(COUNTS)
def test_madt_lists_every_core_once(cores: int) -> None:
    """ACPI 6.5 §5.2.12.2, §5.2.12.12: APIC ids below 255 as local APIC, others as x2APIC; the first boots."""
    local, x2apic = [], []
    for kind, entry in Tables(cores).madt():
        if kind == 0:
            uid, apic_id, flags = struct.unpack("<2xBBI", entry)
            assert (uid, flags) == (apic_id, 1)
            local.append(apic_id)
        elif kind == 9:
            apic_id, flags, uid = struct.unpack("<4xIII", entry)
            assert (uid, flags) == (apic_id, 1)
            x2apic.append(apic_id)
    assert local == list(range(min(cores, 255)))
    assert x2apic == list(range(255, cores))


def test_madt_wires_the_pit_to_gsi_2_and_the_sci_as_level() -> None:
    """ACPI 6.5 §5.2.12.5: overrides of ISA IRQ 0 (as the bus) and 9 (level, active high: 0xd)."""
    entries = [(kind, entry) for kind, entry in Tables(2).madt() if kind in (1, 2)]
    (_, ioapic), *overrides = entries
    assert struct.unpack("<2xBxII", ioapic) == (2, layout.IOAPIC, 0)
    assert [struct.unpack("<2xBBIH", entry) for _, entry in overrides] == [(0, 0, 2, 0), (0, 9, 9, 0xD)]


@pytest.mark.parametrize(("cores", "kinds"), [(1, {4}), (255, {4}), (256, {4, 10})])
def test_madt_wires_lint1_of_all_to_nmi(cores: int, kinds: set[int]) -> None:
    """ACPI 6.5 §5.2.12.7, §5.2.12.13: UID 0xff means all processors, 0xffffffff all with an x2APIC entry."""
    nmis = {kind: entry for kind, entry in Tables(cores).madt() if kind in (4, 10)}
    assert set(nmis) == kinds
    assert struct.unpack("<2xBHB", nmis[4]) == (0xFF, 0, 1)
    if 10 in kinds:
        assert struct.unpack("<2xHIB3x", nmis[10]) == (0, 0xFFFF_FFFF, 1)


@pytest.mark.parametrize("cores", [0, -1, 1 << 16])
def test_cores_beyond_the_room_are_refused(cores: int) -> None:
    """The tables never leave their range of the address map, and a refusal writes nothing."""
    with GuestMemory(1 * MiB) as memory:
        with pytest.raises(ValueError, match="cores"):
            acpi.write(memory, cores)
        assert not any(memory.read(0, 1 * MiB))


# --- AML ----------------------------------------------------------------------------------------------------------


def decode_length(data: bytes) -> tuple[int, int]:
    """Return the number that a PkgLength holds, and how many bytes it has, as ACPI 6.5 §20.2.4 says it."""
    more = data[0] >> 6
    if more == 0:
        return data[0] & 0x3F, 1
    assert data[0] & 0x30 == 0
    return data[0] & 0xF | int.from_bytes(data[1 : 1 + more], "little") << 4, 1 + more


def decode_terms(code: bytes) -> dict[str, object]:
    """Return the namespace that ``code`` makes: the few opcodes that the DSDT has."""
    terms: dict[str, object] = {}
    while code:
        if code[:1] == b"\x08":
            path, code = decode_name(code[1:])
            terms[path], code = decode_value(code)
            continue
        if code[:1] == b"\x14":
            length, width = decode_length(code[1:])
            path, body = decode_name(code[1 + width : 1 + length])
            terms[path] = Method(body[0], decode_statements(body[1:]))
            code = code[1 + length :]
            continue
        opcode = 2 if code[:2] == b"\x5b\x82" else 1
        assert opcode == 2 or code[:1] == b"\x10"
        length, width = decode_length(code[opcode:])
        path, inner = decode_name(code[opcode + width : opcode + length])
        terms[path] = decode_terms(inner)
        code = code[opcode + length :]
    return terms


class Method(NamedTuple):
    """Flags: bits 2 to 0 the number of arguments, bit 3 serialized (ACPI 6.5 §20.2.5.2)."""

    flags: int
    statements: list[tuple[object, ...]]


def decode_statements(code: bytes) -> list[tuple[object, ...]]:
    """Return what a method does: it only notifies (§20.2.5.3)."""
    statements: list[tuple[object, ...]] = []
    while code:
        assert code[0] == 0x86
        path, code = decode_name(code[1:])
        value, code = decode_value(code)
        statements.append(("Notify", path, value))
    return statements


def decode_name(code: bytes) -> tuple[str, bytes]:
    root = 1 if code[:1] == b"\\" else 0
    return code[: root + 4].decode(), code[root + 4 :]


def decode_value(code: bytes) -> tuple[object, bytes]:
    opcode, rest = code[0], code[1:]
    if opcode in (0, 1):
        return opcode, rest
    if opcode == 0x0D:
        text, _, after = rest.partition(b"\0")
        return text.decode("ascii"), after
    if opcode in (0x0A, 0x0B, 0x0C, 0x0E):
        size = {0x0A: 1, 0x0B: 2, 0x0C: 4, 0x0E: 8}[opcode]
        return int.from_bytes(rest[:size], "little"), rest[size:]
    length, width = decode_length(rest)
    inner, after = rest[width:length], rest[length:]
    if opcode == 0x11:
        announced, data = decode_value(inner)
        assert announced == len(data)
        return data, after
    assert opcode == 0x12
    count, inner = inner[0], inner[1:]
    elements = []
    for _ in range(count):
        element, inner = decode_value(inner)
        elements.append(element)
    assert not inner
    return elements, after


def test_dsdt_holds_soft_off_com1_the_rtc_and_a_power_button() -> None:
    """ACPI 6.5 §7.4.2 (_Sx), §6.1.5 (_HID), §6.2.2 (_CRS): and nothing else."""
    dsdt = Tables(1).named("DSDT")
    assert dsdt[8] == 2
    namespace = decode_terms(dsdt[36:])
    com1 = bytes.fromhex("47 01 f803 f803 01 08  22 1000  79 00")
    rtc = bytes.fromhex("47 01 7000 7000 01 02  22 0001  79 00")
    devices = {
        "COM1": {"_HID": 0x0105_D041, "_UID": 1, "_CRS": com1},
        "RTC_": {"_HID": 0x000B_D041, "_UID": 1, "_CRS": rtc},
        "PWRB": {"_HID": 0x0C0C_D041},
        "GED_": GED,
    }
    assert namespace == {"\\_SB_": devices, "\\_S5_": [lib.KVMPY_ACPI_S5, 0, 0, 0]}


GED = {
    "_HID": "ACPI0013",
    "_CRS": b"\x89\x06\x00\x03\x01" + struct.pack("<I", lib.KVMPY_STOP_GSI) + b"\x79\x00",
    "_EVT": Method(1, [("Notify", "PWRB", 0x80)]),
}
"""ACPI 6.5 §5.6.9: an interrupt (a consumer's, edge, high, exclusive), whose number _EVT gets as its argument."""


def test_power_button_has_a_pin_of_its_own() -> None:
    """An edge cannot be shared: not with a virtio device, not with a chip of the board."""
    taken = {0, 1, 2, lib.KVMPY_IRQ_SERIAL, layout.RTC_IRQ, lib.KVMPY_IRQ_ACPI, 13, *layout.VIRTIO_GSIS}
    assert lib.KVMPY_STOP_GSI not in taken


@pytest.mark.parametrize("count", [1, 8, 16])
def test_dsdt_announces_virtio_devices_when_asked(count: int) -> None:
    """ACPI 6.5 §6.4.3.4: 32-bit fixed memory, writable. §6.4.3.6: a consumer's interrupt, edge, high, exclusive."""
    windows = layout.virtio_windows(count)
    devices = list(decode_terms(acpi.dsdt(windows)[36:])["\\_SB_"].items())
    assert [name for name, _ in devices[:4]] == ["COM1", "RTC_", "PWRB", "GED_"]
    del devices[:4]
    for i, ((_, device), window) in enumerate(zip(devices, windows, strict=True)):
        registers = b"\x86\x09\x00\x01" + struct.pack("<II", window.gpa, 0x1000)
        interrupt = b"\x89\x06\x00\x03\x01" + struct.pack("<I", window.gsi)
        resources = registers + interrupt + b"\x79\x00"
        assert device == {"_HID": "LNRO0005", "_UID": i, "_CCA": 1, "_CRS": resources}
    assert len({name for name, _ in devices}) == count


def test_tables_have_room_for_every_virtio_device_beside_every_core() -> None:
    most = acpi.build(1024, layout.virtio_windows(16))
    assert acpi.dsdt(layout.virtio_windows(16)) in most
    assert len(most) <= layout.ACPI_TABLES_SIZE


BOUNDARIES = [0, 62, 63, 0xFFD, 0xFFE, 0xFFFFC, 0xFFFFD, (1 << 28) - 5]


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(BOUNDARIES) | st.integers(0, (1 << 28) - 5))
def test_package_length_counts_itself_in_the_fewest_bytes(size: int) -> None:
    """ACPI 6.5 §20.2.4: up to 63 in one byte, 2**12 - 1 in two, 2**20 - 1 in three, 2**28 - 1 in four."""
    encoded = aml.package_length(size)
    assert decode_length(encoded) == (size + len(encoded), len(encoded))
    limits = (63, (1 << 12) - 1, (1 << 20) - 1, (1 << 28) - 1)
    assert len(encoded) == next(n for n, limit in enumerate(limits, 1) if size + n <= limit)


@pytest.mark.parametrize("size", [-1, (1 << 28) - 4])
def test_package_beyond_28_bits_is_refused(size: int) -> None:
    """ACPI 6.5 §20.2.4: four bytes hold 28 bits, and the four count themselves."""
    with pytest.raises(ValueError, match="AML package"):
        aml.package_length(size)


@settings(deadline=None, max_examples=100)
@given(st.integers(0, (1 << 64) - 1) | st.sampled_from([0, 1, 2, 255, 256, 0xFFFF, 0x1_0000, 0xFFFF_FFFF, 1 << 32]))
def test_integer_comes_back(value: int) -> None:
    """ACPI 6.5 §20.2.3: ZeroOp, OneOp, or a prefix and 1, 2, 4 or 8 bytes."""
    assert decode_value(aml.integer(value)) == (value, b"")


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 7), st.lists(st.integers(0, 255), max_size=40))
def test_method_comes_back(arguments: int, values: list[int]) -> None:
    """ACPI 6.5 §20.2.5.2, §20.2.5.3: the length counts name, flags and statements."""
    code = aml.method("_EVT", arguments, *(aml.notify("\\PWRB", value) for value in values))
    namespace = decode_terms(code + aml.name("LAST", aml.integer(1)))
    assert namespace == {"_EVT": Method(arguments, [("Notify", "\\PWRB", value) for value in values]), "LAST": 1}


@settings(deadline=None, max_examples=50)
@given(st.lists(st.binary(max_size=5000), max_size=4))
def test_nested_terms_of_any_length_come_back(buffers: list[bytes]) -> None:
    """ACPI 6.5 §20.2.5: each package ends where its length says."""
    devices = [aml.device(f"D{i}", aml.name("BUF", aml.buffer(data))) for i, data in enumerate(buffers)]
    code = aml.scope("\\_SB", *devices) + aml.name("LAST", aml.package(*map(aml.buffer, buffers)))
    inside = {f"D{i}__": {"BUF_": data} for i, data in enumerate(buffers)}
    assert decode_terms(code) == {"\\_SB_": inside, "LAST": buffers}


@pytest.mark.parametrize("path", ["", "\\", "COM12", "com1", "1COM", "C-M1", "_SB.COM1", "\u00c4"])
def test_what_is_no_name_is_refused(path: str) -> None:
    """ACPI 6.5 §20.2.2: a lead of A-Z or _, then A-Z, 0-9 or _, four at most."""
    with pytest.raises(ValueError, match="not an AML name"):
        aml.name_string(path)

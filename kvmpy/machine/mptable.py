"""The MP tables: how a kernel without ACPI finds the cores and the wires of interrupts.

::

    EBDA       floating pointer "_MP_" (16 bytes) ---+
    MP_TABLE   configuration table "PCMP"  <---------+
                 processors, 20 bytes each     APIC id = vcpu_id, number 0 boots
                 bus 0                         ISA
                 I/O APIC                      24 pins, of which ISA uses 16
                 interrupt sources             IRQ i -> pin i; IRQ 0 (the PIT) -> pin 2; IRQ 2 is the PIC's cascade
                 local interrupts              LINT0 ExtINT (the PIC), LINT1 NMI

An APIC id has 8 bits here, and the I/O APIC takes one of them: of a machine with more than 254 vCPUs the table lists
the first 254, and the MADT (`kvmpy.machine.acpi`) lists all.

Source: Intel MultiProcessor Specification 1.4, §4. Floor: machine.
"""

import struct
from collections.abc import Iterator

from kvmpy.machine import layout
from kvmpy.machine.memory import GuestMemory
from kvmpy.units import KiB

SPEC_REVISION = 4
LOCAL_APIC_VERSION = 0x14
IOAPIC_VERSION = 0x11
MAX_PROCESSORS = 254
"""Processors that the table can list: APIC ids 0 to 253. The I/O APIC takes 254, and 255 is the broadcast."""

# Entry types (MP 1.4 §4.3, table 4-3)
PROCESSOR, BUS, IOAPIC, INTERRUPT_SOURCE, LOCAL_INTERRUPT = range(5)
# Flags of a processor (table 4-4)
ENABLED, BOOTSTRAP = 1, 2
# Interrupt types (table 4-10)
INT, NMI, SMI, EXTINT = range(4)

ISA_BUS = 0
IRQS = 24
"""Listed as sources of the ISA bus, one for each pin of the I/O APIC. ISA has 16; the others are virtio devices, which
are wired like it, and a kernel without ACPI learns of their pins from here alone."""
PIT_PIN = 2
"""The I/O APIC pin of ISA IRQ 0, as on every PC; the board routes GSI 0 there."""
CASCADE_IRQ = 2
ALL_LOCAL_APICS = 0xFF
AS_THE_BUS = 0
"""Polarity and trigger mode of a source: the bus says. ISA is active high, edge triggered."""

FAMILY_6 = 0x600
FPU_AND_APIC = 1 << 0 | 1 << 9
"""CPUID leaf 1 EDX, as far as the table is the place to say it: readers have CPUID."""

HEADER = struct.Struct("<4sHBB8s12sIHHIHBB")


def write(memory: GuestMemory, cores: int) -> None:
    """Put the tables of a machine with ``cores`` vCPUs into ``memory``.

    Raises:
        ValueError: ``cores`` is less than 1.
    """
    table = build(cores)
    memory.write(layout.EBDA, floating_pointer())
    memory.write(layout.MP_TABLE, table)
    # Kernels that search as the specification says start from these two words of the BIOS data area (MP 1.4 §4).
    memory.write(layout.BDA_EBDA_SEGMENT, (layout.EBDA >> 4).to_bytes(2, "little"))
    memory.write(layout.BDA_BASE_MEMORY, (layout.EBDA // KiB).to_bytes(2, "little"))


def floating_pointer() -> bytes:
    """Return the 16 bytes that a kernel searches for. Source: MP 1.4 §4.1.

    The last five are the feature bytes: a table is present, and the board starts in virtual wire mode (no IMCR).
    """
    pointer = struct.pack("<4sIBBB5x", b"_MP_", layout.MP_TABLE, 1, SPEC_REVISION, 0)
    return with_checksum(pointer, at=10)


def build(cores: int) -> bytes:
    """Return the configuration table of a machine with ``cores`` vCPUs: at most 254 are listed.

    Raises:
        ValueError: ``cores`` is less than 1.
    """
    if cores < 1:
        raise ValueError(f"{cores} cores: allowed is 1 and more")
    entries = list(_entries(cores))
    length = HEADER.size + sum(map(len, entries))
    header = HEADER.pack(
        *(b"PCMP", length, SPEC_REVISION, 0, b"KVMPY   ", b"PC          "),
        *(0, 0, len(entries), layout.LOCAL_APIC),  # no OEM table
        *(0, 0, 0),  # no extended table
    )
    return with_checksum(header + b"".join(entries), at=7)


def _entries(cores: int) -> Iterator[bytes]:
    """Yield the entries in the order that §4.2 wants: by type, ascending."""
    for apic_id in range(min(cores, MAX_PROCESSORS)):
        flags = ENABLED | (BOOTSTRAP if apic_id == 0 else 0)
        yield struct.pack("<BBBBII8x", PROCESSOR, apic_id, LOCAL_APIC_VERSION, flags, FAMILY_6, FPU_AND_APIC)
    yield struct.pack("<BB6s", BUS, ISA_BUS, b"ISA   ")
    yield struct.pack("<BBBBI", IOAPIC, ioapic_id(cores), IOAPIC_VERSION, ENABLED, layout.IOAPIC)
    for irq in range(IRQS):
        if irq != CASCADE_IRQ:
            yield _interrupt(INTERRUPT_SOURCE, INT, irq, ioapic_id(cores), PIT_PIN if irq == 0 else irq)
    yield _interrupt(LOCAL_INTERRUPT, EXTINT, 0, 0, 0)
    yield _interrupt(LOCAL_INTERRUPT, NMI, 0, ALL_LOCAL_APICS, 1)


def _interrupt(entry: int, interrupt: int, irq: int, apic_id: int, pin: int) -> bytes:
    """Return a wire from ``irq`` to ``pin`` of an I/O APIC or a local APIC. Source: MP 1.4 §4.3.4, §4.3.5."""
    return struct.pack("<BBHBBBB", entry, interrupt, AS_THE_BUS, ISA_BUS, irq, apic_id, pin)


def ioapic_id(cores: int) -> int:
    """Return the I/O APIC's id: the first after the listed processors, in the id space that §3.6.6 makes common."""
    return min(cores, MAX_PROCESSORS)


def with_checksum(table: bytes, *, at: int) -> bytes:
    """Return ``table`` with the byte at offset ``at`` chosen so that all bytes sum to 0 modulo 256."""
    rest = table[:at] + b"\0" + table[at + 1 :]
    return rest[:at] + bytes([-sum(rest) & 0xFF]) + rest[at + 1 :]

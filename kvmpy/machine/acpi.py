r"""Minimal ACPI: what a kernel needs to find the cores, the interrupts, the serial port, and how to power off.

::

    RSDP -+-> RSDT -+-> FADT -+-> FACS
          +-> XSDT -+         +-> DSDT    \_S5, \_SB.COM1, RTC, PWRB, GED, and VI00 ... where virtio is told here
                    +-> MADT

All lie from layout.ACPI_TABLES, the RSDP first, where both a scan of 0xe0000-0xfffff and a boot protocol's pointer
find it. There is no SMM, no PM timer and no general-purpose event. The power button is a device of the DSDT; the host
presses it by the GSI with which it also asks guests that have no ACPI to stop:

    KVMPY_STOP_GSI, an edge --> GED: _EVT --> Notify (PWRB, 0x80) --> the kernel's driver of the button --> user space

Source: ACPI 6.5 §5.2. Floor: machine.
"""

import struct
from collections.abc import Iterator, Sequence

from kvmpy._shim import lib
from kvmpy.machine import aml, layout
from kvmpy.machine.layout import VirtioWindow
from kvmpy.machine.memory import GuestMemory
from kvmpy.machine.mptable import PIT_PIN, ioapic_id, with_checksum

RSDP_SIZE = 36
HEADER = struct.Struct("<4sIBB6s8sI4sI")
HEADER_CHECKSUM = 9

# Generic address structure (§5.2.3.2): address space, access sizes
SYSTEM_IO = 1
BYTE_ACCESS, WORD_ACCESS = 1, 2
NO_REGISTER = bytes(12)

# FADT, IAPC_BOOT_ARCH (§5.2.9.3). Of the keyboard controller there is the reset line.
LEGACY_DEVICES, KEYBOARD_CONTROLLER, VGA_NOT_PRESENT = 1 << 0, 1 << 1, 1 << 2
# FADT, flags (§5.2.9, table 5.10). The buttons and the RTC alarm: set says that the PM1 registers do not have it. The
# power button is then a device of the DSDT.
WBINVD, PROC_C1, NO_POWER_BUTTON, NO_SLEEP_BUTTON, NO_RTC_ALARM = 1 << 0, 1 << 2, 1 << 4, 1 << 5, 1 << 6
RESET_REG_SUP = 1 << 10
RESET_VALUE = 6
"""Written to port 0xcf9: reset the processors (bit 2), and all else with them (bit 1)."""
NO_C2_LATENCY, NO_C3_LATENCY = 101, 1001
"""Microseconds; more than 100 and 1000 say that there is no C2 and no C3."""

# MADT entry types (§5.2.12, table 5.21)
LOCAL_APIC, IOAPIC, SOURCE_OVERRIDE, LOCAL_APIC_NMI, LOCAL_X2APIC, LOCAL_X2APIC_NMI = 0, 1, 2, 4, 9, 10
ENABLED = 1
PCAT_COMPAT = 1
FIRST_X2APIC_ID = 255
"""APIC ids below have a local APIC entry, this and all above an x2APIC one (§5.2.12.12)."""
AS_THE_BUS = 0
LEVEL_ACTIVE_HIGH = 3 << 2 | 1
ALL_PROCESSORS, ALL_X2APIC_PROCESSORS = 0xFF, 0xFFFF_FFFF
NMI_LINT = 1

BUTTON_PRESSED = 0x80
"""The notification of a power button while the machine is on (ACPI 6.5 §5.6.6)."""


def write(memory: GuestMemory, cores: int, virtio: Sequence[VirtioWindow] = ()) -> None:
    """Put the tables of a machine with ``cores`` vCPUs into ``memory``; the RSDP is at layout.ACPI_TABLES.

    ``virtio``: the virtio-mmio devices that the DSDT shall announce.

    Raises:
        ValueError: ``cores`` is less than 1, or more than the tables' room holds.
    """
    memory.write(layout.ACPI_TABLES, build(cores, virtio))


def build(cores: int, virtio: Sequence[VirtioWindow] = ()) -> bytes:
    """Return all tables as they lie from layout.ACPI_TABLES.

    Raises:
        ValueError: ``cores`` is less than 1, or more than the tables' room holds.
    """
    if cores < 1:
        raise ValueError(f"{cores} cores: allowed is 1 and more")
    tables = bytearray(RSDP_SIZE)
    facs_gpa = _place(tables, facs(), alignment=64)
    dsdt_gpa = _place(tables, dsdt(virtio))
    listed = [_place(tables, fadt(facs_gpa, dsdt_gpa)), _place(tables, madt(cores))]
    rsdt = _place(tables, system_table(b"RSDT", 1, struct.pack(f"<{len(listed)}I", *listed)))
    xsdt = _place(tables, system_table(b"XSDT", 1, struct.pack(f"<{len(listed)}Q", *listed)))
    tables[:RSDP_SIZE] = rsdp(rsdt, xsdt)
    if len(tables) > layout.ACPI_TABLES_SIZE:
        raise ValueError(f"{cores} cores: ACPI tables of {len(tables)} bytes, allowed is {layout.ACPI_TABLES_SIZE}")
    return bytes(tables)


def _place(tables: bytearray, table: bytes, *, alignment: int = 16) -> int:
    """Append ``table`` and return its gpa."""
    tables += bytes(-len(tables) % alignment) + table
    return layout.ACPI_TABLES + len(tables) - len(table)


def system_table(signature: bytes, revision: int, body: bytes) -> bytes:
    """Return ``body`` under a system description table header, with its checksum. Source: ACPI 6.5 §5.2.6."""
    length = HEADER.size + len(body)
    header = HEADER.pack(signature, length, revision, 0, b"KVMPY ", b"KVMPYPC ", 1, b"KVMP", 1)
    return with_checksum(header + body, at=HEADER_CHECKSUM)


def rsdp(rsdt: int, xsdt: int) -> bytes:
    """Return the root pointer: 20 bytes that ACPI 1.0 knows, and 16 more, each with a checksum. Source: §5.2.5.3."""
    first = with_checksum(struct.pack("<8sB6sBI", b"RSD PTR ", 0, b"KVMPY ", 2, rsdt), at=8)
    return with_checksum(first + struct.pack("<IQB3x", RSDP_SIZE, xsdt, 0), at=32)


def facs() -> bytes:
    """Return the firmware control structure: no waking vector, a free global lock. Source: ACPI 6.5 §5.2.10."""
    return struct.pack("<4sI24xB31x", b"FACS", 64, 2)


def fadt(facs_gpa: int, dsdt_gpa: int) -> bytes:
    """Return the fixed description table: where the PM1 and the reset registers are. Source: ACPI 6.5 §5.2.9.

    SMI_CMD is 0: the machine is always in ACPI mode. PM_TMR_BLK and PM_TMR_LEN are 0: there is no PM timer.
    """
    event, control = lib.KVMPY_PORT_ACPI_EVENT, lib.KVMPY_PORT_ACPI_CONTROL
    boot_flags = LEGACY_DEVICES | KEYBOARD_CONTROLLER | VGA_NOT_PRESENT
    flags = WBINVD | PROC_C1 | NO_POWER_BUTTON | NO_SLEEP_BUTTON | NO_RTC_ALARM | RESET_REG_SUP
    first = struct.pack(
        "<II BBH I4B 8I 8B 4H 5B HBI",
        *(facs_gpa, dsdt_gpa),
        *(0, 0, lib.KVMPY_IRQ_ACPI),
        *(0, 0, 0, 0, 0),  # SMI_CMD and the values written there
        *(event, 0, control, 0, 0, 0, 0, 0),  # PM1a, PM1b event; PM1a, PM1b control; PM2; PM timer; GPE0, GPE1
        *(4, 2, 0, 0, 0, 0, 0, 0),  # lengths: PM1 event, PM1 control, PM2, PM timer, GPE0, GPE1; GPE1 base; _CST
        *(NO_C2_LATENCY, NO_C3_LATENCY, 0, 0),
        *(0, 0, 0, 0, layout.CMOS_CENTURY),  # duty cycle; day alarm, month alarm, century of the RTC
        *(boot_flags, 0, flags),
    )
    reset = _io_register(lib.KVMPY_PORT_RESET, 8, BYTE_ACCESS) + struct.pack("<BHB", RESET_VALUE, 0, 5)
    # Of the two FACS fields one may be set, and the DSDT's two must agree.
    wide = struct.pack("<QQ", 0, dsdt_gpa)
    pm1 = _io_register(event, 32, WORD_ACCESS) + NO_REGISTER + _io_register(control, 16, WORD_ACCESS)
    hypervisor = b"KVMPY\0\0\0"
    return system_table(b"FACP", 6, first + reset + wide + pm1 + NO_REGISTER * 7 + hypervisor)


def _io_register(port: int, bits: int, access_size: int) -> bytes:
    return struct.pack("<BBBBQ", SYSTEM_IO, bits, 0, access_size, port)


def madt(cores: int) -> bytes:
    """Return the interrupt controllers, and each vCPU's local APIC. Source: ACPI 6.5 §5.2.12."""
    head = struct.pack("<II", layout.LOCAL_APIC, PCAT_COMPAT)
    return system_table(b"APIC", 5, head + b"".join(_madt_entries(cores)))


def _madt_entries(cores: int) -> Iterator[bytes]:
    """Yield the entries. The vCPU that boots comes first, as §5.2.12.1 asks; a processor's UID is its APIC id."""
    for apic_id in range(min(cores, FIRST_X2APIC_ID)):
        yield struct.pack("<BBBBI", LOCAL_APIC, 8, apic_id, apic_id, ENABLED)
    for apic_id in range(FIRST_X2APIC_ID, cores):
        yield struct.pack("<BBHIII", LOCAL_X2APIC, 16, 0, apic_id, ENABLED, apic_id)
    yield struct.pack("<BBBBII", IOAPIC, 12, ioapic_id(cores), 0, layout.IOAPIC, 0)
    yield struct.pack("<BBBBIH", SOURCE_OVERRIDE, 10, 0, 0, PIT_PIN, AS_THE_BUS)
    sci = lib.KVMPY_IRQ_ACPI
    yield struct.pack("<BBBBIH", SOURCE_OVERRIDE, 10, 0, sci, sci, LEVEL_ACTIVE_HIGH)
    yield struct.pack("<BBBHB", LOCAL_APIC_NMI, 6, ALL_PROCESSORS, AS_THE_BUS, NMI_LINT)
    if cores > FIRST_X2APIC_ID:
        yield struct.pack("<BBHIB3x", LOCAL_X2APIC_NMI, 12, AS_THE_BUS, ALL_X2APIC_PROCESSORS, NMI_LINT)


def dsdt(virtio: Sequence[VirtioWindow] = ()) -> bytes:
    r"""Return the DSDT: the devices, and \_S5, the number that powers off when written to PM1a control.

    Source: ACPI 6.5 §7.4.2 (_Sx: SLP_TYP of PM1a, of PM1b, two reserved), §4.8.3.2.1.
    """
    com1 = _isa_device("COM1", "PNP0501", lib.KVMPY_PORT_SERIAL, 8, lib.KVMPY_IRQ_SERIAL)
    rtc = _isa_device("RTC", "PNP0B00", layout.CMOS_PORT, 2, layout.RTC_IRQ)
    devices = [com1, rtc, *power_button(), *(virtio_device(i, window) for i, window in enumerate(virtio))]
    soft_off = aml.package(aml.integer(lib.KVMPY_ACPI_S5), aml.integer(0), aml.integer(0), aml.integer(0))
    # Revision 2: integers are of 64 bits (§5.2.11.1).
    return system_table(b"DSDT", 2, aml.scope("\\_SB", *devices) + aml.name("\\_S5", soft_off))


def _isa_device(name: str, hid: str, port: int, ports: int, irq: int) -> bytes:
    return aml.device(
        name,
        aml.name("_HID", aml.eisa_id(hid)),
        aml.name("_UID", aml.integer(1)),
        aml.name("_CRS", aml.resource_template(aml.io_ports(port, ports), aml.irq(irq))),
    )


def power_button() -> tuple[bytes, bytes]:
    """Return the power button, and the generic event device that says it was pressed: it has no other interrupt.

    Source: ACPI 6.5 §4.8.2.2.1.2 (control method power button), §5.6.9 (interrupt-signaled events).
    """
    button = aml.device("PWRB", aml.name("_HID", aml.eisa_id("PNP0C0C")))
    events = aml.device(
        "GED",
        aml.name("_HID", aml.string("ACPI0013")),
        aml.name("_CRS", aml.resource_template(aml.interrupt(lib.KVMPY_STOP_GSI))),
        aml.method("_EVT", 1, aml.notify("PWRB", BUTTON_PRESSED)),
    )
    return button, events


def virtio_device(index: int, window: VirtioWindow) -> bytes:
    """Return the device of one virtio-mmio window; _CCA says that its DMA is coherent, as all of x86 is.

    Source: ACPI 6.5 §6.2.17 (_CCA). LNRO0005 is the _HID by which Linux knows virtio-mmio.
    """
    resources = aml.resource_template(
        aml.memory32_fixed(window.gpa, layout.VIRTIO_MMIO_SIZE),
        aml.interrupt(window.gsi),
    )
    return aml.device(
        f"VI{index:02X}",
        aml.name("_HID", aml.string("LNRO0005")),
        aml.name("_UID", aml.integer(index)),
        aml.name("_CCA", aml.integer(1)),
        aml.name("_CRS", resources),
    )

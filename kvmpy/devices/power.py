"""The ACPI fixed hardware of kvmpy's board: registers that a kernel expects, and the one way to switch off.

::

    KVMPY_PORT_ACPI_EVENT    EventBlock, 4 bytes
        0  status   0: of what the FADT says there is, nothing has an event   2  enable   stored
    KVMPY_PORT_ACPI_CONTROL  ControlBlock, 2 bytes
        0  control  bit 0: SCI_EN, always set   bits 12 to 10: SLP_TYP   bit 13: SLP_EN, write-only

So the SCI is never raised: the power button is a device of the DSDT, and so is what says that it was pressed.
Not here: the tables that tell a kernel so (`kvmpy.machine.acpi`).

Source: ACPI 6.5 §4.8.3.1 (event) and §4.8.3.2 (control).
"""

from collections.abc import Callable

from kvmpy._shim import lib

EVENT_SIZE = 4
CONTROL_SIZE = 2

# Of the enable register; a kernel reads back what it has written: timer, global lock, buttons, RTC.
ENABLES = 1 << 0 | 1 << 5 | 1 << 8 | 1 << 9 | 1 << 10

SCI_EN = 1 << 0
SLP_TYP_SHIFT = 10
SLP_TYP = 7 << SLP_TYP_SHIFT
SLP_EN = 1 << 13


class EventBlock:
    """Status and enable of register group PM1a."""

    def __init__(self) -> None:
        self._enable = 0

    def read(self, offset: int, size: int) -> bytes:
        """Return bytes of both registers; past them all ones."""
        registers = self._enable << 16
        return registers.to_bytes(EVENT_SIZE, "little")[offset : offset + size].ljust(size, b"\xff")

    def write(self, offset: int, data: bytes) -> None:
        """Take the enable bits as they are. There is no status to clear."""
        for at, byte in enumerate(data, offset):
            if 2 <= at < EVENT_SIZE:
                shift = 8 * (at & 1)
                self._enable = (self._enable & ~(0xFF << shift) | byte << shift) & ENABLES


class ControlBlock:
    """Control: SLP_TYP of S5 written with SLP_EN calls ``on_power_off``; other sleep states do not exist."""

    def __init__(self, on_power_off: Callable[[], None]) -> None:
        self._on_power_off = on_power_off
        self._sleep_type = 0

    def read(self, offset: int, size: int) -> bytes:
        """Return bytes of the register; past it all ones."""
        register = SCI_EN | self._sleep_type
        return register.to_bytes(CONTROL_SIZE, "little")[offset : offset + size].ljust(size, b"\xff")

    def write(self, offset: int, data: bytes) -> None:
        """Take SLP_TYP, and switch off when SLP_EN comes with it. The other bits are for hardware that is not here."""
        for at, byte in enumerate(data, offset):
            if at == 1:  # both fields lie in the high byte
                self._sleep_type = byte << 8 & SLP_TYP
                if byte << 8 & SLP_EN and self._sleep_type >> SLP_TYP_SHIFT == lib.KVMPY_ACPI_S5:
                    self._on_power_off()

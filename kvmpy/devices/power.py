"""The ACPI fixed hardware of kvmpy's board: one power button, one way to switch off.

::

    KVMPY_PORT_ACPI_EVENT    AcpiPm1.event, 4 bytes
        0  status   bit 8: the power button was pressed; write 1 to clear
        2  enable   bit 8: the power button raises the SCI
    KVMPY_PORT_ACPI_CONTROL  AcpiPm1.control, 2 bytes
        0  control  bit 0: SCI_EN, always set   bits 12 to 10: SLP_TYP   bit 13: SLP_EN, write-only

Not here: the tables that tell a kernel so.

Source: ACPI 6.5 §4.8.3.1 (event) and §4.8.3.2 (control).
"""

from collections.abc import Callable
from threading import Lock

from kvmpy._shim import lib
from kvmpy.machine.bus import InterruptLine

EVENT_SIZE = 4
CONTROL_SIZE = 2

POWER_BUTTON = 1 << 8
# Of the enable register; bits without hardware behind them are stored: timer, global lock, sleep button, RTC.
ENABLES = 1 << 0 | 1 << 5 | POWER_BUTTON | 1 << 9 | 1 << 10

SCI_EN = 1 << 0
SLP_TYP_SHIFT = 10
SLP_TYP = 7 << SLP_TYP_SHIFT
SLP_EN = 1 << 13


class EventBlock:
    """Status and enable. The SCI is a level: high while an enabled status bit is set.

    Thread-safe: the button is pressed from another thread than the guest's.
    """

    def __init__(self, interrupt: InterruptLine) -> None:
        self._interrupt = interrupt
        self._lock = Lock()
        self._status = 0
        self._enable = 0
        self._raised = False

    def set_status(self, bits: int) -> None:
        """Set status bits, as the hardware behind them does."""
        with self._lock:
            self._status |= bits
            self._drive()

    def read(self, offset: int, size: int) -> bytes:
        """Return bytes of both registers; past them all ones."""
        with self._lock:
            registers = self._status | self._enable << 16
        return registers.to_bytes(EVENT_SIZE, "little")[offset : offset + size].ljust(size, b"\xff")

    def write(self, offset: int, data: bytes) -> None:
        """Clear the status bits that are written as 1; take the enable bits as they are."""
        with self._lock:
            for at, byte in enumerate(data, offset):
                shift = 8 * (at & 1)
                if at < 2:
                    self._status &= ~(byte << shift)
                elif at < EVENT_SIZE:
                    self._enable = (self._enable & ~(0xFF << shift) | byte << shift) & ENABLES
            self._drive()

    def _drive(self) -> None:
        level = bool(self._status & self._enable)
        if level != self._raised:
            self._raised = level
            self._interrupt(level)


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


class AcpiPm1:
    """Register group PM1a: ``event`` and ``control`` are its two blocks of ports, each a device.

    ``interrupt`` is the SCI; ``on_power_off`` says that the guest switches off.
    """

    def __init__(self, on_power_off: Callable[[], None], interrupt: InterruptLine) -> None:
        self.event = EventBlock(interrupt)
        self.control = ControlBlock(on_power_off)

    def press_power_button(self) -> None:
        """Set the button's status bit, and raise the SCI when the guest has enabled it. From any thread."""
        self.event.set_status(POWER_BUTTON)

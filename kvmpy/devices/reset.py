"""The three ways in which software resets a PC, each in a piece of old hardware.

::

    0x60   KeyboardController.data      r: output buffer      w: data of a command
    0x64   KeyboardController.command   r: status             w: command; 0xfe pulses the reset line
    0x92   SystemControlA               bit 0: reset          bit 1: A20
    0xcf9  ResetControl, offset 1       bit 2 rising: reset   bit 1: hard, not soft

A20 is always on. ``on_reset`` says only that the guest asked. Not here: a keyboard, and what a reset does.

Source: IBM PS/2 Hardware Interface Technical Reference (8042, port 0x92); Intel ICH9 datasheet §13.7.5 (0xcf9).
"""

from collections.abc import Callable

KEYBOARD_DATA_PORT = 0x60
KEYBOARD_COMMAND_PORT = 0x64
SYSTEM_CONTROL_A_PORT = 0x92
RESET_CONTROL_BASE = 0xCF8
"""Where `ResetControl` begins: one port below the register, at the PCI address register that shares its ports."""
RESET_CONTROL_SIZE = 4

# 8042: status
OUTPUT_FULL = 1 << 0
IDLE = 0x1C  # self-test passed, last write was a command, keyboard not locked; neither buffer full

# 8042: commands with an answer
READ_CONFIGURATION = 0x20
SELF_TEST = 0xAA
SELF_TEST_PASSED = 0x55
READ_OUTPUT_PORT = 0xD0
# 8042: commands that take a byte of data
WRITE_CONFIGURATION = 0x60
WITH_DATA = {WRITE_CONFIGURATION, 0xD1, 0xD2, 0xD3, 0xD4}
WRITE_OUTPUT_PORT = 0xD1
PULSE_OUTPUT_PORT = 0xF0  # to 0xff: pulses low those of bits 0 to 3 that are clear

NOT_RESET = 1 << 0  # of the output port, low active
A20 = 1 << 1


class BytePort:
    """One port of a chip as a device: a wider access is one byte after the other."""

    def __init__(self, read: Callable[[], int], write: Callable[[int], None]) -> None:
        self._read = read
        self._write = write

    def read(self, offset: int, size: int) -> bytes:
        """Read the port ``size`` times."""
        return bytes(self._read() for _ in range(size))

    def write(self, offset: int, data: bytes) -> None:
        """Write each byte of ``data`` to the port."""
        for byte in data:
            self._write(byte)


class KeyboardController:
    """An 8042 without keyboard or mouse: the reset line, A20, and the answers that A20 routines wait for.

    ``data`` and ``command`` are its two ports, each a device. Unknown commands are swallowed.
    """

    def __init__(self, on_reset: Callable[[], None]) -> None:
        self.data = BytePort(self._read_output, self._take_data)
        self.command = BytePort(self._status, self._take_command)
        self._on_reset = on_reset
        self._configuration = 0x04  # system flag; no interrupts
        self._command: int | None = None  # waits for its data
        self._output: int | None = None

    def _read_output(self) -> int:
        answer, self._output = self._output, None
        return 0 if answer is None else answer

    def _status(self) -> int:
        return IDLE | (0 if self._output is None else OUTPUT_FULL)

    def _take_command(self, command: int) -> None:
        self._command = command if command in WITH_DATA else None
        if command == SELF_TEST:
            self._output = SELF_TEST_PASSED
        elif command == READ_CONFIGURATION:
            self._output = self._configuration
        elif command == READ_OUTPUT_PORT:
            self._output = NOT_RESET | A20
        elif command >= PULSE_OUTPUT_PORT and not command & NOT_RESET:
            self._on_reset()

    def _take_data(self, byte: int) -> None:
        command, self._command = self._command, None
        if command == WRITE_CONFIGURATION:
            self._configuration = byte
        elif command == WRITE_OUTPUT_PORT and not byte & NOT_RESET:
            self._on_reset()


class SystemControlA:
    """Port 0x92: bit 0 resets, bit 1 is A20. Reads back 0x02, whatever was written."""

    def __init__(self, on_reset: Callable[[], None]) -> None:
        self._on_reset = on_reset

    def read(self, offset: int, size: int) -> bytes:
        """Return A20 on, in each byte."""
        return bytes([A20]) * size

    def write(self, offset: int, data: bytes) -> None:
        """Reset when bit 0 is set."""
        if data[0] & 1:
            self._on_reset()


SYSTEM_RESET = 1 << 1
RESET_CPU = 1 << 2
FULL_RESET = 1 << 3


class ResetControl:
    """The reset control register, a byte at offset 1 of the four ports from 0xcf8.

    The device owns all four. A 32-bit OUT to 0xcf8 is PCI's address register, which this board has not: cut into
    bytes it would reset a machine whose kernel looks for PCI function 4. Only a byte access reaches the register;
    the rest reads as all ones, which means "no PCI".
    """

    def __init__(self, on_reset: Callable[[], None]) -> None:
        self._on_reset = on_reset
        self._register = 0

    def read(self, offset: int, size: int) -> bytes:
        """Return the register, or all ones."""
        return bytes([self._register]) if (offset, size) == (1, 1) else b"\xff" * size

    def write(self, offset: int, data: bytes) -> None:
        """Reset when bit 2 rises."""
        if (offset, len(data)) != (1, 1):
            return
        rises = data[0] & ~self._register & RESET_CPU
        self._register = data[0] & (SYSTEM_RESET | RESET_CPU | FULL_RESET)
        if rises:
            self._on_reset()

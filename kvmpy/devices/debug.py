"""Ports for people who write kernels: a console, an exit, and one small device for each action of the C run loop.

::

    0xe9  DebugConsole  w: each byte is printed           r: 0xe9, "I am here" (the convention of Bochs)
    0xf4  ExitPort      w: ends the run with that value   r: 0

`Constant`, `Sink` and `Counter` are what laboratories put on a bus: what C does for CONSTANT, SINK and COUNT, to read
in Python. Not here: how an exit value ends the process.
"""

from collections.abc import Callable
from threading import Lock

from kvmpy.devices.output import SerialOutput
from kvmpy.machine.bus import Action, FastRange

CONSOLE_PRESENT = 0xE9
EXIT_PORT_SIZE = 4
"""Bytes of ports that `ExitPort` owns: room for a 32-bit OUT."""


class DebugConsole:
    """Print each byte written. There is no "busy": what comes while the reader's ring is full is counted in ``lost``.

    The ring holds 64 KiB and kvmpy's reader sleeps on it, so that it normally keeps up.
    """

    def __init__(self, output: SerialOutput) -> None:
        self.lost = 0
        self._output = output
        self._fast = FastRange(
            0, 1, on_read=Action.CONSTANT, on_write=Action.SERIAL, value=CONSOLE_PRESENT, serial=output.pointer
        )

    def fast_ranges(self) -> list[FastRange]:
        """Return what C may answer: all of it, byte by byte."""
        return [self._fast]

    def read(self, offset: int, size: int) -> bytes:
        """Return 0xe9 in each byte: there is a console."""
        return bytes([CONSOLE_PRESENT]) * size

    def write(self, offset: int, data: bytes) -> None:
        """Print ``data``."""
        for i in range(len(data)):
            if not self._output.push(data[i : i + 1]):
                self.lost += 1


class ExitPort:
    """End the run: ``on_exit`` gets the value of each write, 8, 16 or 32 bits at any of the four ports.

    In C the first write ends the run. Here a string instruction brings all its elements: the first one counts. Reads
    are all zeroes.
    """

    def __init__(self, on_exit: Callable[[int], None]) -> None:
        self._on_exit = on_exit
        self._fast = FastRange(0, EXIT_PORT_SIZE, on_read=Action.CONSTANT, on_write=Action.EXIT)

    def fast_ranges(self) -> list[FastRange]:
        """Return what C may answer: all of it. The caller of the loop gets the value in ``exit.data``."""
        return [self._fast]

    def read(self, offset: int, size: int) -> bytes:
        """Return zeroes."""
        return bytes(size)

    def write(self, offset: int, data: bytes) -> None:
        """Ask for the end of the run."""
        self._on_exit(int.from_bytes(data, "little"))


def exit_status(value: int) -> int:
    """Return the process status for a guest's ``value``, kvmpy's way: 0 is success, the low seven bits are kept."""
    return value & 0x7F


def qemu_exit_status(value: int) -> int:
    """Return the process status that QEMU's isa-debug-exit device would give: never even, so never success."""
    return (value << 1 | 1) & 0xFF


class Constant:
    """Answer each read with the low bytes of ``value`` (64 bits), at whatever offset. Writes are thrown away."""

    def __init__(self, value: int, *, size: int = 1) -> None:
        self._fast = FastRange(0, size, on_read=Action.CONSTANT, on_write=Action.SINK, value=value)

    def fast_ranges(self) -> list[FastRange]:
        """Return what C may answer: all of it."""
        return [self._fast]

    def read(self, offset: int, size: int) -> bytes:
        """Return the low ``size`` bytes of the value."""
        return _low_bytes(self._fast.value, size)

    def write(self, offset: int, data: bytes) -> None:
        """Throw ``data`` away."""


class Sink:
    """Throw writes away. Reads are all ones, as from nowhere."""

    def __init__(self, size: int = 1) -> None:
        self._fast = FastRange(0, size, on_read=Action.CONSTANT, on_write=Action.SINK, value=(1 << 64) - 1)

    def fast_ranges(self) -> list[FastRange]:
        """Return what C may answer: all of it."""
        return [self._fast]

    def read(self, offset: int, size: int) -> bytes:
        """Return all ones."""
        return b"\xff" * size

    def write(self, offset: int, data: bytes) -> None:
        """Throw ``data`` away."""


class Counter:
    """Count writes, modulo 2**64, one for each element whatever its size. Reads give the low bytes of the count."""

    def __init__(self, size: int = 1) -> None:
        self._fast = FastRange(0, size, on_read=Action.COUNT, on_write=Action.COUNT)
        self._lock = Lock()

    @property
    def value(self) -> int:
        """The number of writes so far, those that C took included."""
        return self._fast.value

    def fast_ranges(self) -> list[FastRange]:
        """Return what C may answer: all of it."""
        return [self._fast]

    def read(self, offset: int, size: int) -> bytes:
        """Return the low ``size`` bytes of the count."""
        return _low_bytes(self._fast.value, size)

    def write(self, offset: int, data: bytes) -> None:
        """Count one."""
        with self._lock:
            self._fast.value = (self._fast.value + 1) % (1 << 64)


def _low_bytes(value: int, size: int) -> bytes:
    return value.to_bytes(8, "little")[:size]

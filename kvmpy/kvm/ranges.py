"""The table of address ranges that the C run loop answers without Python.

A device describes what C may do for it as `FastRange` objects; `RangeTable` lays them out as ``struct kvmpy_range``
and binds each to its row, so that the device can change its mind while the guest runs (a plain store that the loop
sees at its next exit).
"""

from collections.abc import Iterable
from enum import IntEnum
from typing import Any

from kvmpy._shim import ffi, lib


class Space(IntEnum):
    """The two address spaces in which a guest meets devices."""

    PIO = lib.KVMPY_PIO
    MMIO = lib.KVMPY_MMIO


class Action(IntEnum):
    """What the run loop does with an access; each has the same meaning in Python, in the device that owns the range."""

    TO_PYTHON = lib.KVMPY_TO_PYTHON
    CONSTANT = lib.KVMPY_CONSTANT
    SINK = lib.KVMPY_SINK
    COUNT = lib.KVMPY_COUNT
    SERIAL = lib.KVMPY_SERIAL
    EXIT = lib.KVMPY_EXIT
    WORD = lib.KVMPY_WORD
    CLEAR = lib.KVMPY_CLEAR


class FastRange:
    """``size`` bytes at ``offset`` from a device's base, answered in C. The attributes may be set at any time.

    ``value`` is the reply of CONSTANT and the counter of COUNT (64 bits; an access takes the low bytes).
    ``serial`` is a ``struct kvmpy_serial *`` for SERIAL, ``word`` a ``uint64_t *`` for WORD and CLEAR, which take only
    accesses of ``size`` bytes; the caller keeps both alive.
    """

    def __init__(
        self,
        offset: int,
        size: int,
        *,
        on_read: Action = Action.TO_PYTHON,
        on_write: Action = Action.TO_PYTHON,
        value: int = 0,
        serial: Any = None,
        word: Any = None,
    ) -> None:
        self.offset = offset
        self.size = size
        # A row of its own until a table binds it to one that C reads.
        self._row = ffi.new("struct kvmpy_range *")
        self._row.serial = ffi.NULL if serial is None else serial
        self._row.word = ffi.NULL if word is None else word
        self.on_read = on_read
        self.on_write = on_write
        self.value = value

    def bind(self, row: Any, *, space: Space, base: int) -> None:
        """Move into ``row`` of a table, as [base+offset, base+offset+size) of ``space``."""
        ffi.memmove(row, self._row, ffi.sizeof("struct kvmpy_range"))
        row.space = space
        row.first = base + self.offset
        row.last = base + self.offset + self.size - 1
        self._row = row

    @property
    def on_read(self) -> Action:
        return Action(self._row.on_read)

    @on_read.setter
    def on_read(self, action: Action) -> None:
        self._row.on_read = action

    @property
    def on_write(self) -> Action:
        return Action(self._row.on_write)

    @on_write.setter
    def on_write(self, action: Action) -> None:
        self._row.on_write = action

    @property
    def value(self) -> int:
        return int(self._row.value)

    @value.setter
    def value(self, value: int) -> None:
        self._row.value = value


class RangeTable:
    """An immutable set of rows, sorted as C searches them; shared by all run loops of a machine.

    Raises:
        ValueError: two rows overlap.
    """

    def __init__(self, rows: Iterable[tuple[Space, int, FastRange]] = ()) -> None:
        ordered = sorted(rows, key=lambda row: (row[0], row[1] + row[2].offset))
        self.pointer = ffi.new("struct kvmpy_range[]", max(len(ordered), 1))
        self.length = len(ordered)
        self.ranges = [fast for _, _, fast in ordered]
        for i, (space, base, fast) in enumerate(ordered):
            fast.bind(self.pointer + i, space=space, base=base)
            before = self.pointer[i - 1] if i else None
            if before is not None and before.space == space and before.last >= base + fast.offset:
                raise ValueError(f"fast ranges overlap at 0x{base + fast.offset:x}")

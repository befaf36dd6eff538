"""The two buses of a PC: port I/O and memory-mapped I/O, from an address to a device.

A device is two methods. `Bus` is the readable twin of the table lookup in ``csrc/run_loop.c``: both find the range
that holds the whole access; what a range does in C, its device does here too.

Source: Intel SDM vol. 1 §19 (I/O address space).
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator
from enum import StrEnum
from typing import Protocol

from kvmpy.kvm.ranges import Action as Action
from kvmpy.kvm.ranges import FastRange as FastRange


class Device(Protocol):
    """A thing on a bus. ``offset`` is bytes from the start of its range; data is little-endian, as on the bus."""

    def read(self, offset: int, size: int) -> bytes:
        """Return exactly ``size`` bytes."""

    def write(self, offset: int, data: bytes) -> None:
        """Take ``data``. Nothing a guest writes may raise."""


class Mode(StrEnum):
    """Who answers a range: C where it can, its Python device always, or Python with each access logged."""

    C = "c"
    PYTHON = "python"
    TRACE = "trace"


class AddressRange:
    """[base, base+size) on a bus belongs to ``device``; ``reads`` and ``writes`` count what Python served."""

    def __init__(self, base: int, size: int, device: Device, name: str, mode: Mode) -> None:
        self.base, self.size, self.end = base, size, base + size
        self.device, self.name, self.mode = device, name, mode
        self.reads = self.writes = 0


class Bus:
    """An address space of ``size`` bytes. Ranges never overlap; what nobody owns reads as all ones and is counted."""

    def __init__(self, name: str, size: int) -> None:
        self.name, self.size = name, size
        self.ranges: list[AddressRange] = []
        self.unmapped_reads = self.unmapped_writes = 0
        self._bases: list[int] = []
        self._found = AddressRange(0, 0, self, "", Mode.C)  # the last that was: accesses come in runs

    def attach(self, base: int, size: int, device: Device, *, name: str, mode: Mode = Mode.C) -> AddressRange:
        """Give [base, base+size) to ``device``.

        Raises:
            ValueError: the range is empty, leaves the bus, or overlaps another; the message names it.
        """
        if size <= 0 or base < 0 or base + size > self.size:
            raise ValueError(f"{name}: 0x{base:x}+{size} is outside the {self.name} bus (0x{self.size:x} bytes)")
        for other in self.ranges:
            if base < other.base + other.size and other.base < base + size:
                raise ValueError(f"{name}: 0x{base:x}+{size} overlaps {other.name} at 0x{other.base:x}+{other.size}")
        attached = AddressRange(base, size, device, name, mode)
        at = bisect_right(self._bases, base)
        self._bases.insert(at, base)
        self.ranges.insert(at, attached)
        return attached

    def find(self, address: int, size: int) -> AddressRange | None:
        """Return the range that holds all of [address, address+size), or None."""
        end = address + size
        found = self._found
        if found.base <= address and end <= found.end:
            return found
        at = bisect_right(self._bases, address) - 1
        if at < 0 or end > self.ranges[at].end:
            return None
        self._found = found = self.ranges[at]
        return found

    def read(self, address: int, size: int) -> bytes:
        """Read ``size`` bytes. An access that leaves its range is split into bytes, each to its owner."""
        owner = self.find(address, size)
        if owner is not None:
            owner.reads += 1
            return owner.device.read(address - owner.base, size)
        if size > 1 and self._touches(address, size):
            return b"".join(self.read(address + i, 1) for i in range(size))
        self.unmapped_reads += 1
        return b"\xff" * size

    def write(self, address: int, data: bytes) -> None:
        """Write ``data``. An access that leaves its range is split into bytes, each to its owner."""
        size = len(data)
        owner = self.find(address, size)
        if owner is not None:
            owner.writes += 1
            owner.device.write(address - owner.base, data)
        elif size > 1 and self._touches(address, size):
            for i in range(size):
                self.write(address + i, data[i : i + 1])
        else:
            self.unmapped_writes += 1

    def _touches(self, address: int, size: int) -> bool:
        return any(r.base < address + size and address < r.base + r.size for r in self.ranges)

    def __iter__(self) -> Iterator[AddressRange]:
        return iter(self.ranges)


InterruptLine = Callable[[bool], None]
"""Raise (True) or lower (False) an interrupt pin. What a device gets instead of a VM."""

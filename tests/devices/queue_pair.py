"""What a driver and a device that share a queue have in common, whatever its kind."""

import struct
from typing import Any

import pytest
from watched_memory import WatchedMemory

from kvmpy import MiB
from kvmpy.devices.virtqueue import Fault, QueueFault

TABLE = 0x8000
"""The gpa of an indirect table."""


class Pair:
    """``device`` pops from what a driver has put into ``memory``, which remembers who looked where."""

    memory: WatchedMemory
    device: Any

    def table(self, *descriptors: tuple[int, int, int, int]) -> None:
        """Write an indirect table at TABLE."""
        self.memory.write(TABLE, b"".join(struct.pack("<QIHH", *descriptor) for descriptor in descriptors))

    def fault(self) -> Fault:
        """Pop, which must fault, and again, and have changed nothing."""
        before = self.memory.read(0, self.memory.size) if self.memory.size <= 1 * MiB else b""
        faults = []
        for _ in range(2):
            with pytest.raises(QueueFault) as raised:
                self.device.pop()
            faults.append(raised.value.fault)
        assert faults[0] == faults[1]
        assert not before or self.memory.read(0, self.memory.size) == before
        return faults[0]

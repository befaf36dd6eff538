"""The virtio entropy device: one queue, whose buffers it fills with random bytes of the host.

::

    driver                      requestq (0)                    VirtioRng
    a device-writable buffer --------------> os.urandom, up to 4 KiB of it
                             <-------------- used, with the number of bytes

A device may fill less than a buffer has. This one fills at most 4 KiB, so a whole ring of 256 chains, however long,
costs the host a MiB of random bytes. What a driver gives to be read is not looked at; a chain with no room comes back
with nothing in it.

Source: virtio 1.2 §5.4.
"""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from kvmpy._shim import lib
from kvmpy.devices.python_queue import PythonQueue
from kvmpy.devices.virtio_device import RING_FEATURES, Identity, scatter
from kvmpy.units import KiB

if TYPE_CHECKING:
    from kvmpy.devices.interrupt import Interrupt
    from kvmpy.devices.virtqueue import Chain, QueueSetup
    from kvmpy.machine.memory import GuestMemory

FILLED_MAX = 4 * KiB
"""Bytes that one chain gets at most."""


class NoConfig:
    """A configuration space without a field (virtio 1.2 §5.4.4): zeros."""

    generation = 0

    def read(self, offset: int, size: int) -> bytes:
        return bytes(size)

    def write(self, offset: int, data: bytes) -> None:
        pass


class VirtioRng:
    """The device. ``random`` gives as many random bytes as it is asked for, from any thread."""

    def __init__(self, memory: "GuestMemory", random: Callable[[int], bytes] = os.urandom) -> None:
        self.identity = Identity(lib.VIRTIO_ID_RNG, RING_FEATURES, 1)
        self.config = NoConfig()
        self.on_config_change: Callable[[], None] = lambda: None  # nothing ever changes
        self._memory = memory
        self._random = random

    def negotiate(self, features: int) -> None:
        """Take what the driver has accepted: no feature changes what the device does."""

    def open_queue(self, setup: "QueueSetup", interrupt: "Interrupt", kick_fd: int) -> PythonQueue:
        """Return the one queue."""
        return PythonQueue(self._memory, setup, interrupt, kick_fd, self._fill)

    def _fill(self, chain: "Chain", queue: PythonQueue) -> int:
        wanted = min(FILLED_MAX, sum(segment.size for segment in chain.writable))
        return scatter(self._memory, chain.writable, self._random(wanted))

"""The virtio console: a line to the guest without bytes in registers, with one port.

::

    host  feed() --> input --> receiveq (0): into the buffers that the driver has put there ------> guest
    host  drain() <-- SerialOutput <-- transmitq (1): out of the driver's buffers, 4 KiB at a time <-- guest
                                   <-- emerg_wr: one byte, also from a driver that has set up nothing yet

    configuration   0 cols (2)   2 rows (2)   4 max_nr_ports (4): 0, of a feature not offered   8 emerg_wr (4): reads 0

Nothing is lost on the way: input waits for buffers, and a buffer of output for room in the ring that the host reads.
What the driver has made available when the device is stopped is printed as far as there is room at once. What it puts
on the wrong side, to be read by us in receiveq or written in transmitq, is not looked at.

Not here: who reads what the guest sends, and terminals.

Source: virtio 1.2 §5.3.
"""

import os
import struct
from collections.abc import Callable
from contextlib import suppress
from threading import Lock
from typing import TYPE_CHECKING

from kvmpy._shim import lib
from kvmpy.devices.output import SerialOutput
from kvmpy.devices.python_queue import PythonQueue
from kvmpy.devices.virtio_device import RING_FEATURES, Identity, feature_bits, scatter
from kvmpy.units import KiB

if TYPE_CHECKING:
    from kvmpy.devices.interrupt import Interrupt
    from kvmpy.devices.virtqueue import Chain, QueueSetup
    from kvmpy.machine.memory import GuestMemory

RECEIVEQ, TRANSMITQ = 0, 1
PIECE = 4 * KiB
"""Bytes of a buffer that are copied at once."""

LAYOUT = struct.Struct("<HHII")
EMERG_WR = 8

COLUMNS, ROWS = 80, 24
"""The size of a terminal of which nobody knows better."""


class ConsoleConfig:
    """The configuration space. What the driver writes to emerg_wr goes to ``on_emergency``, the low byte of it."""

    def __init__(self, on_emergency: Callable[[bytes], None]) -> None:
        self._on_emergency = on_emergency
        self._state = (0, COLUMNS, ROWS)  # replaced as a whole: a reader sees one size

    @property
    def generation(self) -> int:
        """How often the size has changed."""
        return self._state[0]

    def set_size(self, columns: int, rows: int) -> bool:
        """Show another size; return whether it is another."""
        generation, *before = self._state
        if before == [columns, rows]:
            return False
        self._state = (generation + 1, columns, rows)
        return True

    def read(self, offset: int, size: int) -> bytes:
        """Return ``size`` bytes of the space; behind its end are zeros."""
        _, columns, rows = self._state
        return LAYOUT.pack(columns, rows, 0, 0)[offset : offset + size].ljust(size, b"\0")

    def write(self, offset: int, data: bytes) -> None:
        """Take an emergency write (§5.3.4); ignore any other."""
        if offset == EMERG_WR:
            self._on_emergency(data[:1])


class VirtioConsole:
    """The device. Host side: `feed` and `resize`, from any thread. Close it after its transport.

    ``output`` takes what the guest sends. Bytes of emergency writes for which it has no room are counted in ``lost``.
    ``on_drained`` is called when all that was fed is in the driver's buffers, by the thread that put it there.
    """

    def __init__(self, memory: "GuestMemory", output: SerialOutput) -> None:
        features = RING_FEATURES | feature_bits(lib.VIRTIO_CONSOLE_F_SIZE, lib.VIRTIO_CONSOLE_F_EMERG_WRITE)
        self.identity = Identity(lib.VIRTIO_ID_CONSOLE, features, 2)
        self.config = ConsoleConfig(self._write_emergency)
        self.on_config_change: Callable[[], None] = lambda: None  # until there is a transport
        self.on_drained: Callable[[], None] | None = None
        self.lost = 0
        self._memory = memory
        self._output = output
        self._piece = min(PIECE, output.capacity)
        self._lock = Lock()
        self._input = bytearray()
        self._receive_kick = -1  # receiveq's eventfd, our own descriptor of it
        self._room = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        output.on_room = self._make_room

    # --- the host's side --------------------------------------------------------------------------------------------

    @property
    def pending(self) -> int:
        """Bytes that the guest has not received yet."""
        with self._lock:
            return len(self._input)

    def feed(self, data: bytes) -> None:
        """Let the guest receive ``data``, after what was fed before. The queue has no bound: ask `pending` first."""
        with self._lock:
            self._input += data
            if self._receive_kick >= 0:
                os.eventfd_write(self._receive_kick, 1)

    def resize(self, columns: int, rows: int) -> None:
        """Tell the guest the size of the terminal.

        Raises:
            ValueError: a side has more than 65535 characters, or less than none.
        """
        if not (0 <= columns < 1 << 16 and 0 <= rows < 1 << 16):
            raise ValueError(f"a terminal of {columns} by {rows}: allowed is 0 to 65535 each way")
        if self.config.set_size(columns, rows):
            self.on_config_change()

    def close(self) -> None:
        """Free the descriptors; nobody serves a queue any more. Closing twice is harmless."""
        self._output.on_room = None
        with self._lock:
            for fd in (self._receive_kick, self._room):
                if fd >= 0:
                    os.close(fd)
            self._receive_kick = self._room = -1

    # --- what the transport calls -----------------------------------------------------------------------------------

    def negotiate(self, features: int) -> None:
        """Take what the driver has accepted: no feature changes what the device does."""

    def open_queue(self, setup: "QueueSetup", interrupt: "Interrupt", kick_fd: int) -> PythonQueue:
        """Return one of the two queues."""
        if setup.queue_index == TRANSMITQ:
            return PythonQueue(self._memory, setup, interrupt, kick_fd, self._transmit, serve_rest=True)
        with self._lock:
            if self._receive_kick < 0:
                self._receive_kick = os.dup(kick_fd)
        return PythonQueue(self._memory, setup, interrupt, kick_fd, self._receive, ready=self._has_input)

    # --- the queues -------------------------------------------------------------------------------------------------

    def _has_input(self) -> bool:
        return bool(self._input)

    def _receive(self, chain: "Chain", queue: PythonQueue) -> int:
        room = sum(segment.size for segment in chain.writable)
        with self._lock:
            data = bytes(self._input[:room])
            del self._input[:room]
            drained = not self._input
        written = scatter(self._memory, chain.writable, data)
        if drained and self.on_drained is not None:
            self.on_drained()
        return written

    def _transmit(self, chain: "Chain", queue: PythonQueue) -> int | None:
        for gpa, size in chain.readable:
            for at in range(0, size, self._piece):
                piece = self._memory.read(gpa + at, min(self._piece, size - at))
                while not self._output.push(piece):
                    if not queue.wait(self._room):
                        return None
                    with suppress(BlockingIOError):
                        os.eventfd_read(self._room)
        return 0

    def _make_room(self) -> None:
        """The reader has taken bytes."""
        os.eventfd_write(self._room, 1)

    def _write_emergency(self, byte: bytes) -> None:
        if not self._output.push(byte):
            self.lost += 1

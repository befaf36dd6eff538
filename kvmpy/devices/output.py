"""The ring through which a guest's bytes reach their reader, from C and from Python alike.

::

    vCPU threads                                      one reader
    OUT 0x3f8 in C, action SERIAL ---+
    OUT 0x3f8 in Uart16550 ----------+--> ring -----> drain(), after poll() on event_fd
    OUT 0xe9 in DebugConsole --------+

``csrc/serial.c`` is the ring itself, and says why no wake-up is lost; this is its owner. Not here: who reads, and
where the bytes go then.
"""

import os
from collections.abc import Callable

from kvmpy._shim import ffi, lib
from kvmpy.units import KiB


class SerialOutput:
    """A bounded queue of bytes: any number of producers, one reader. Bytes of one producer keep their order.

    ``event_fd`` is readable when there is something to drain. ``pointer`` is the ``struct kvmpy_serial *`` for a
    fast range; this object keeps it alive. ``on_room`` is called by the reader, in `drain`, when it has taken bytes:
    a device that waits for room hears of it there.
    """

    def __init__(self, capacity: int = 64 * KiB) -> None:
        """Make a ring of ``capacity`` bytes, a power of two.

        Raises:
            ValueError: the capacity is no power of two.
        """
        if capacity <= 0 or capacity & (capacity - 1) or capacity >= 1 << 32:
            raise ValueError(f"a ring of {capacity} bytes: a power of two below 4 GiB is allowed")
        self.capacity = capacity
        self.event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.on_room: Callable[[], None] | None = None
        self._buffer = ffi.new("uint8_t[]", capacity)
        self._taken = ffi.new("uint8_t[]", capacity)
        self.pointer = ffi.new("struct kvmpy_serial *")
        self.pointer.buffer = self._buffer
        self.pointer.capacity = capacity
        self.pointer.event_fd = self.event_fd

    def push(self, data: bytes) -> bool:
        """Append all of ``data`` and return True, or nothing and return False when it does not fit."""
        return int(lib.kvmpy_serial_push(self.pointer, data, len(data))) == 0

    def drain(self) -> bytes:
        """Take and return all that is there, at most ``capacity`` bytes. One reader at a time; never blocks."""
        # First the event, then the bytes: what is pushed in between sets the event again.
        self._clear_event()
        count = lib.kvmpy_serial_drain(self.pointer, self._taken, self.capacity)
        if self.pointer.head != self.pointer.tail and self.event_fd >= 0:
            # Pushed while we copied, onto a ring that was not empty: its producer woke nobody.
            os.eventfd_write(self.event_fd, 1)
        data = bytes(ffi.buffer(self._taken, count))
        if data and self.on_room is not None:
            self.on_room()
        return data

    def _clear_event(self) -> None:
        if self.event_fd < 0:
            return
        try:
            os.eventfd_read(self.event_fd)
        except BlockingIOError:
            return

    def close(self) -> None:
        """Close the event descriptor. No producer may run any more; bytes that are left can still be drained."""
        if self.event_fd >= 0:
            self.pointer.event_fd = -1
            os.close(self.event_fd)
            self.event_fd = -1

    def __enter__(self) -> "SerialOutput":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

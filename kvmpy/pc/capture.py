"""What the guest prints: from the ring that vCPU threads fill, to a sink and into a bounded memory."""

from collections.abc import Callable

from kvmpy.devices.output import SerialOutput
from kvmpy.pc.loop import EventLoop
from kvmpy.pc.panic import PanicWatch
from kvmpy.units import MiB

Sink = Callable[[bytes], object]
KEPT = 1 * MiB


class Capture:
    """Keeps the last MiB that came through ``output`` and hands all of it to ``sink``, in the loop's thread.

    With ``panic`` it is a console, on which a kernel's last words may come.
    """

    def __init__(self, loop: EventLoop, sink: Sink | None, *, panic: PanicWatch | None = None) -> None:
        self.output = SerialOutput()
        self.panic = panic
        self._loop = loop
        self._sink = sink
        self._kept = bytearray()
        loop.watch(self.output.event_fd, self.drain)

    def drain(self) -> None:
        """Hand on all that has been printed so far."""
        data = self.output.drain()
        if data:
            self._kept += data
            if len(self._kept) > 2 * KEPT:
                del self._kept[:-KEPT]
            if self.panic is not None:
                self.panic.hear(data)
            if self._sink is not None:
                self._sink(data)

    @property
    def data(self) -> bytes:
        """The last of what was printed, at most a MiB."""
        return bytes(self._kept[-KEPT:])

    def close(self) -> None:
        """Free the ring; the vCPUs must have stopped."""
        self._loop.unwatch(self.output.event_fd)
        self.output.close()

"""The virtio devices of a PC: their place on the board, whatever they are for.

::

    VirtioDevice <-- VirtioMmio <-- memory bus at its window
                      |     ^
               irqfd  v     |  ioeventfd on QueueNotify, one for each queue
                     GSI   kick eventfd

Imported only by a PC that has one: all this costs a start milliseconds. Disks are in `kvmpy.pc.disks`.
"""

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from kvmpy._shim import lib
from kvmpy.devices.queue_worker import QueueWorker
from kvmpy.devices.virtio_device import VirtioDevice
from kvmpy.devices.virtio_mmio import VirtioMmio
from kvmpy.machine import layout
from kvmpy.machine.bus import Mode
from kvmpy.machine.layout import VirtioWindow
from kvmpy.machine.machine import Machine
from kvmpy.machine.memory import GuestMemory
from kvmpy.pc.host_threads import HostThreads

if TYPE_CHECKING:
    from kvmpy.devices.output import SerialOutput
    from kvmpy.devices.virtio_console import VirtioConsole

OnError = Callable[[BaseException], None]


class VirtioPlace:
    """``device`` in its ``window``. ``name`` is the device's in traces, counts and ``device_modes``.

    ``title`` names the threads of its queues, which run where ``threads`` says. ``on_error`` gets what one raised, in
    that thread.
    """

    def __init__(
        self,
        device: VirtioDevice,
        window: VirtioWindow,
        memory: GuestMemory,
        *,
        name: str,
        title: str = "",
        threads: HostThreads,
        on_error: OnError,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        self.name, self.window = name, window
        self._threads, self._on_close = threads, on_close
        self._transport = VirtioMmio(
            device, memory, name=title or name, on_error=on_error, make_worker=self._make_worker
        )

    def _make_worker(self, *arguments: Any, **options: Any) -> QueueWorker:
        return self._threads.start(QueueWorker, *arguments, **options)

    def attach(self, machine: Machine, modes: Mapping[str, Mode]) -> None:
        """Put the device on the board. In mode "c" a notification exits to nobody; else Python shall see it.

        Raises:
            KvmError: the host refused.
        """
        mode = modes.get(self.name, Mode.C)
        machine.mmio.attach(self.window.gpa, layout.VIRTIO_MMIO_SIZE, self._transport, name=self.name, mode=mode)
        machine.vm.irqfd(self._transport.interrupt.fd, self.window.gsi)
        if mode is not Mode.C:
            return
        for index, fd in enumerate(self._transport.kick_fds):
            machine.vm.ioeventfd(fd, self.window.gpa + lib.VIRTIO_MMIO_QUEUE_NOTIFY, 4, datamatch=index)

    def reset(self) -> None:
        """Be as new for a board that begins anew; requests in flight are done first. The vCPUs have stopped."""
        self._transport.write(lib.VIRTIO_MMIO_STATUS, bytes(4))
        with suppress(BlockingIOError):  # an interrupt that the last board has not seen
            os.eventfd_read(self._transport.interrupt.fd)

    def stop(self) -> None:
        """Serve no request any more, for good: guest memory stays as it is from here on. The vCPUs have stopped."""
        self._transport.close()

    def close(self) -> None:
        """Stop, and free the device. Closing twice is harmless."""
        self.stop()
        self._on_close()


def open_rng(window: VirtioWindow, memory: GuestMemory, *, threads: HostThreads, on_error: OnError) -> VirtioPlace:
    """Return the place of an entropy device."""
    from kvmpy.devices.virtio_rng import VirtioRng

    return VirtioPlace(VirtioRng(memory), window, memory, name="rng", threads=threads, on_error=on_error)


def open_console(
    window: VirtioWindow, memory: GuestMemory, output: "SerialOutput", *, threads: HostThreads, on_error: OnError
) -> "tuple[VirtioPlace, VirtioConsole]":
    """Return the place of a console that prints to ``output``, and the device, which takes input."""
    from kvmpy.devices.virtio_console import VirtioConsole

    device = VirtioConsole(memory, output)
    try:
        place = VirtioPlace(
            device, window, memory, name="console", threads=threads, on_error=on_error, on_close=device.close
        )
    except BaseException:
        device.close()
        raise
    return place, device

"""The disks of a PC: from a `Disk` to an open image, a virtio-blk device, and its place on the board.

::

    open_disk --> DiskImage <-- VirtioBlk (its engine) <-- VirtioPlace <-- the board

What is opened is closed in the opposite order: no queue is served any more, then the engine, and last the image, whose
`close` makes all durable. Imported only by a PC that has disks: all this costs a start milliseconds.
"""

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from kvmpy.devices.block import BlockCounters, BlockEngine, BlockSettings, MakeEngine
from kvmpy.devices.virtio_blk import Cache, VirtioBlk
from kvmpy.errors import DiskError
from kvmpy.machine.bus import Mode
from kvmpy.machine.layout import VirtioWindow
from kvmpy.machine.machine import Machine
from kvmpy.machine.memory import GuestMemory
from kvmpy.pc.disk import Disk, Engine
from kvmpy.pc.host_threads import HostThreads
from kvmpy.pc.spec import MachineSpec
from kvmpy.pc.virtio import OnError, VirtioPlace
from kvmpy.storage.disk import DiskImage
from kvmpy.storage.open import open_disk

if TYPE_CHECKING:
    from kvmpy.devices.block_c import BlockCycles

DEVICE = "disk"
"""The name of all of them in traces, counts and ``device_modes``."""
SPIN_NS = 50_000
"""How long a worker looks for another request before it sleeps: about what a guest takes to answer an interrupt with
its next request, and what the host takes to wake a thread."""


def open_disks(
    spec: MachineSpec, memory: GuestMemory, *, threads: HostThreads, on_error: OnError
) -> "tuple[AttachedDisk, ...]":
    """Open the disks of ``spec``, all or none; ``threads`` says where their workers run.

    ``on_error`` gets what a worker raised, in its thread.

    Raises:
        DiskError: one cannot be opened, is damaged, or somebody else writes it; the message names the file.
        ValueError: its format does not exist.
    """
    with ExitStack() as undo:
        disks = []
        for index, (disk, window) in enumerate(zip(spec.disks, spec.disk_windows, strict=True)):
            settings = BlockSettings(disk.serial.encode("ascii"), disk.iops, disk.bps, spin_ns(spec.cores))
            disks.append(AttachedDisk(f"{DEVICE}{index}", disk, window, memory, settings, threads, on_error))
            undo.callback(disks[-1].close)
            if spec.measure_time:
                disks[-1].measure_time()
        undo.pop_all()
        return tuple(disks)


def spin_ns(cores: int) -> int:
    """Return how long workers look for more: not at all where they would take their time from a vCPU."""
    return SPIN_NS if len(os.sched_getaffinity(0)) > cores else 0


class AttachedDisk:
    """A disk of a PC, from its beginning to its end. ``size`` is in bytes, as the guest sees it.

    Raises:
        DiskError, ValueError: as `open_disks` says; nothing stays open.
    """

    def __init__(
        self,
        name: str,
        spec: Disk,
        window: VirtioWindow,
        memory: GuestMemory,
        settings: BlockSettings,
        threads: HostThreads,
        on_error: OnError,
    ) -> None:
        self.spec, self.window, self.path = spec, window, spec.path
        self._closing = threading.RLock()
        self._last: BlockCounters | None = None
        with ExitStack() as undo:
            direct = spec.cache is Cache.DIRECT
            self._image = open_disk(spec.path, format=spec.format, readonly=spec.readonly, direct=direct)
            undo.callback(self._image.close)
            self._device = VirtioBlk(
                memory,
                self._image,
                make_engine=self._make_engine,
                cache=spec.cache,
                queues=spec.queues,
                settings=settings,
            )
            undo.callback(self._device.close)
            self._place = VirtioPlace(
                self._device, window, memory, name=DEVICE, title=name, threads=threads, on_error=on_error
            )
            undo.callback(self._place.close)
            self._undo = undo.pop_all()

    def _make_engine(self, memory: GuestMemory, image: DiskImage, settings: BlockSettings) -> BlockEngine:
        self._engine = _engine(self.spec.engine)(memory, image, settings)
        return self._engine

    @property
    def size(self) -> int:
        return self._image.size

    @property
    def readonly(self) -> bool:
        return self._image.readonly

    def attach(self, machine: Machine, modes: Mapping[str, Mode]) -> None:
        """Put the device on the board. Raises KvmError: the host refused."""
        self._place.attach(machine, modes)

    def counters(self) -> BlockCounters:
        """Return the requests and bytes so far."""
        with self._closing:
            return self._device.counters() if self._last is None else self._last

    def measure_time(self) -> None:
        """Add up where the engine's time goes, from now on; the Python twin does not."""
        measure = getattr(self._engine, "measure", None)
        if measure is not None:
            measure()

    def cycles(self) -> "BlockCycles | None":
        """Return where the engine's time went, in cycles of the time-stamp counter; None for the Python twin."""
        cycles = getattr(self._engine, "cycles", None)
        return None if cycles is None else cycles()

    @contextmanager
    def exclusive(self) -> Iterator[Any]:
        """Keep the guest's requests waiting, and give the open image, to take a snapshot of it, say. Not nested.

        A vCPU that resets the device waits too: whoever wants the PC paused or closed does it before, or behind.

        Raises:
            ValueError: the disk is closed.
        """
        with self._closing:
            if self._last is not None:
                raise ValueError(f"the disk {self.path} is closed")
            with self._device.exclusive():
                yield self._image

    def resize(self, size: int) -> None:
        """Give the disk another size, in bytes; the guest hears of it by a configuration interrupt.

        Raises:
            DiskError: its format cannot, or ``size`` is none that it can have.
        """
        if not hasattr(self._image, "resize"):
            raise DiskError("a disk of this format has its size for good", path=self.path)
        with self.exclusive() as image:
            image.resize(size)

    def reset(self) -> None:
        """Be as new for a board that begins anew; requests in flight are done first. The vCPUs have stopped."""
        self._place.reset()

    def stop(self) -> None:
        """Serve no request any more, for good: guest memory stays as it is from here on. The vCPUs have stopped."""
        self._place.stop()

    def close(self) -> None:
        """Stop, make all durable and close the image. Closing twice is harmless. The vCPUs have stopped.

        Raises:
            DiskError: what was written could not be made durable.
        """
        self.stop()
        with self._closing:
            if self._last is None:
                self._last = self._device.counters()
                try:
                    self._undo.close()
                except OSError as error:
                    raise DiskError(error.strerror or str(error), path=self.path) from error


def _engine(engine: Engine) -> MakeEngine:
    """Return the class of the engine; each is imported only where it is used."""
    if engine is Engine.PYTHON:
        from kvmpy.devices.block_python import PythonBlock

        return PythonBlock
    from kvmpy.devices.block_c import CBlock

    return CBlock

"""A block engine between a driver's ring and a disk: requests go in, answers come out, without a VM."""

import os
import select
import threading

from kvmpy import MiB
from kvmpy._shim import lib
from kvmpy.conformance.driver import Answer, open_ring, write_request
from kvmpy.conformance.layout import place
from kvmpy.devices.block import BlockSettings
from kvmpy.devices.interrupt import Interrupt
from kvmpy.devices.virtqueue import Fault
from kvmpy.machine.memory import GuestMemory

RINGS, REQUESTS = 0x1000, 0x10_0000
SPACING = 0x4000
"""Bytes from one queue's rings to the next."""
FEATURES = sum(
    1 << bit
    for bit in (
        lib.VIRTIO_RING_F_INDIRECT_DESC,
        lib.VIRTIO_BLK_F_FLUSH,
        lib.VIRTIO_BLK_F_DISCARD,
        lib.VIRTIO_BLK_F_WRITE_ZEROES,
    )
)
EVENT_IDX, PACKED = 1 << lib.VIRTIO_RING_F_EVENT_IDX, 1 << lib.VIRTIO_F_RING_PACKED
TIME_LIMIT = 10.0
"""Seconds that a test waits for what must happen."""


class Queue:
    """One queue: the driver's ``ring``, the engine's ``queue``, and what interrupts."""

    def __init__(self, rig: "Rig", index: int, size: int, features: int) -> None:
        self.rig = rig
        self.setup = place(index, size, RINGS + SPACING * index, features)
        self.ring = open_ring(rig.memory, self.setup)
        self.interrupt = Interrupt()
        self.kick_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.queue = rig.engine.open_queue(self.setup, self.interrupt, self.kick_fd)
        self.fault: Fault | None = None
        self._thread: threading.Thread | None = None

    def submit(self, type, sector=0, *, gpa=None, table=None, **parts):
        """Build a request at ``gpa``, make it available, and return it."""
        gpa = REQUESTS + 0x8_0000 * self.setup.queue_index if gpa is None else gpa
        request = write_request(self.rig.memory, gpa, type, sector, **parts)
        self.ring.add(request.buffers, table=table)
        self.ring.publish()
        return request

    def answer(self, request) -> Answer | None:
        """Return what became of ``request``, or None: it is not done."""
        used = self.ring.used()
        if not used:
            return None
        data = self.rig.memory.read(request.data_in, request.status - request.data_in)
        return Answer(self.rig.memory.read(request.status, 1)[0], used[-1].written, data)

    def request(self, type, sector=0, **parts) -> Answer | None:
        """Make a request and have it served here and now."""
        request = self.submit(type, sector, **parts)
        assert self.queue.process() is None
        return self.answer(request)

    # --- with a thread --------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Serve in a thread, until `close`."""
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        self.fault = self.queue.serve()

    def kick(self) -> None:
        os.eventfd_write(self.kick_fd, 1)

    def wait_for_interrupt(self) -> None:
        """Wait for an interrupt and acknowledge it."""
        assert select.select([self.interrupt.fd], [], [], TIME_LIMIT)[0], "no interrupt"
        os.eventfd_read(self.interrupt.fd)
        self.interrupt.acknowledge(self.interrupt.status)

    def join(self) -> None:
        """Wait until the thread is done."""
        if self._thread is not None:
            self._thread.join(TIME_LIMIT)
            assert not self._thread.is_alive()

    def close(self) -> None:
        self.queue.stop()
        self.join()
        self.queue.close()
        self.interrupt.close()
        os.close(self.kick_fd)


class Rig:
    """An engine on ``image``, which is closed with it, and its first queue."""

    def __init__(self, image, *, make_engine, features=FEATURES, size=16, memory=None, **settings) -> None:
        self.memory = memory or GuestMemory(4 * MiB)
        self.image = image
        self.engine = make_engine(self.memory, image, BlockSettings(**settings))
        self.queues: list[Queue] = []
        self.queue = self.open_queue(features=features, size=size)
        self.request, self.submit = self.queue.request, self.queue.submit

    def open_queue(self, *, features=FEATURES, size=16) -> Queue:
        """Open one more queue."""
        self.queues.append(Queue(self, len(self.queues), size, features))
        return self.queues[-1]

    def close(self) -> None:
        for queue in self.queues:
            queue.close()
        self.engine.close()
        self.image.close()
        self.memory.close()

    def __enter__(self) -> "Rig":
        return self

    def __exit__(self, *_) -> None:
        self.close()

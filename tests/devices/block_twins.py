"""Two block engines side by side, on equal memory and equal disks: what one does to them, the other must have done."""

import errno
import mmap
import os
import random
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from request_stream import RAM, REGIONS, RINGS_END, VAST, RequestStream

from kvmpy._shim import ffi, lib
from kvmpy.conformance.driver import open_ring
from kvmpy.conformance.image import PatchworkImage, State, memory_file
from kvmpy.conformance.layout import is_packed, place
from kvmpy.conformance.ram import memory_in_regions
from kvmpy.devices.block import BlockSettings, MakeEngine
from kvmpy.devices.interrupt import Interrupt
from kvmpy.devices.virtqueue import Fault, QueueSetup, ring_fault
from kvmpy.errors import DiskError
from kvmpy.units import GiB

QUEUES = 3
CHAINS_OF_A_ROUND = 250
"""Chains with one pair of engines; then others begin anew."""
REAL = 20
"""One round in so many is on files of the host's file system."""

FEATURES = {
    name: 1 << getattr(lib, name)
    for name in (
        "VIRTIO_RING_F_INDIRECT_DESC",
        "VIRTIO_RING_F_EVENT_IDX",
        "VIRTIO_F_RING_PACKED",
        "VIRTIO_F_RING_RESET",
        "VIRTIO_BLK_F_SEG_MAX",
        "VIRTIO_BLK_F_RO",
        "VIRTIO_BLK_F_BLK_SIZE",
        "VIRTIO_BLK_F_FLUSH",
        "VIRTIO_BLK_F_TOPOLOGY",
        "VIRTIO_BLK_F_CONFIG_WCE",
        "VIRTIO_BLK_F_MQ",
        "VIRTIO_BLK_F_DISCARD",
        "VIRTIO_BLK_F_WRITE_ZEROES",
    )
}
VERSION_1 = 1 << lib.VIRTIO_F_VERSION_1
"""Always: the device refuses a driver without it."""


class Difference(AssertionError):
    """The engines did not do the same."""


class Side:
    """One engine with all that is its own."""

    def __init__(self, make_engine: MakeEngine) -> None:
        self.memory = memory_in_regions(REGIONS)
        self.interrupt = Interrupt()
        self.kick_fd = os.eventfd(0, os.EFD_NONBLOCK)
        self._make_engine = make_engine
        self._round = ExitStack()
        self.queues: dict[int, Any] = {}

    def begin(self, image: PatchworkImage, settings: BlockSettings) -> None:
        """Begin a round: a fresh engine on ``image``."""
        self.end()
        self.image = image
        self._round.callback(image.close)
        self.engine = self._make_engine(self.memory, image, settings)
        self._round.callback(self.engine.close)

    def end(self) -> None:
        """Close the engine and its queues."""
        for index in list(self.queues):
            self.close_queue(index)
        self._round.close()

    def open_queue(self, setup: QueueSetup) -> None:
        self.queues[setup.queue_index] = self.engine.open_queue(setup, self.interrupt, self.kick_fd)

    def close_queue(self, index: int) -> None:
        self.queues.pop(index).close()

    def process(self, index: int) -> tuple[Fault | None, tuple[int, ...], int]:
        """Serve queue ``index`` and return what can be seen of it from outside, but for memory, disk and interrupt."""
        self.interrupt.acknowledge(lib.VIRTIO_MMIO_INT_VRING)
        fault = self.queues[index].process()
        return fault, tuple(self.engine.counters()), self.image.asked

    def close(self) -> None:
        self.end()
        self.interrupt.close()
        os.close(self.kick_fd)
        self.memory.close()


class Twins:
    """Drives two engines with one stream of requests. ``seen`` counts what happened, by (kind, what).

    Most disks are in memory, where a flush costs nothing; one in REAL is of files in ``folder``.
    """

    def __init__(self, one: MakeEngine, other: MakeEngine, seed: int, folder: Path) -> None:
        self.seed, self.folder = seed, folder
        self.rng = random.Random(seed)
        self.sides = Side(one), Side(other)
        self.seen: Counter[tuple[str, object]] = Counter()
        self.types: Counter[int] = Counter()
        self.chains = self.rounds = self._left = 0
        self._disturbed = self._full = False
        self._streams: dict[int, RequestStream] = {}
        self.sides[0].memory.write(0, self.rng.randbytes(512 * 1024))

    def run(self, chains: int) -> None:
        """Serve ``chains`` more, as whole batches. Raises Difference, with the seed and the place."""
        end = self.chains + chains
        while self.chains < end:
            if self._left <= 0:
                self._begin_round()
            self._step()

    def close(self) -> None:
        for side in self.sides:
            side.close()

    def __enter__(self) -> "Twins":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- rounds -------------------------------------------------------------------------------------------------

    def _begin_round(self) -> None:
        draw = self.rng.random
        self.rounds += 1
        self._left = CHAINS_OF_A_ROUND
        self._streams.clear()
        kinds = [State.OWN] * 3 + [State.SHARED, State.ZERO] + [State.FULL] * (draw() < 0.15)
        chunks = [self.rng.choice(kinds) for _ in range(self.rng.choice((2, 9, 24)))]
        self._disturbed, self._full = False, State.FULL in chunks
        hidden = [chunk for chunk, state in enumerate(chunks) if state is not State.OWN and draw() < 0.4]
        readonly, alignment = draw() < 0.1, self.rng.choice((1, 1, 512, 4096))
        self.features = VERSION_1 | sum(bit for bit in FEATURES.values() if draw() < 0.6)
        for name, bit in FEATURES.items():
            self.seen[name, bool(self.features & bit)] += 1
        settings = BlockSettings(serial=self.rng.randbytes(self.rng.choice((0, 7, 20))).replace(b"\0", b"0"))
        self.sectors = 0
        make_file = self._real_file if self.rounds % REAL == 0 else memory_file
        for side in self.sides:
            image = PatchworkImage(chunks, hidden=hidden, readonly=readonly, alignment=alignment, make_file=make_file)
            side.begin(image, settings)
            self.sectors = image.size // 512
        self._forget_vast_memory()
        for index in range(QUEUES):
            self._open_queue(index)

    def _real_file(self, name: str) -> int:
        path = self.folder / name
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        path.unlink()
        return fd

    def _forget_vast_memory(self) -> None:
        for side in self.sides:
            side.memory.regions[-1].mapping.madvise(mmap.MADV_REMOVE, RAM, VAST)

    def _open_queue(self, index: int) -> None:
        """Open queue ``index`` anew, on rings of another size; now and then first where no rings may be."""
        memory = self.sides[0].memory
        packed = is_packed(self.features)
        size = self.rng.choice((1, 2, 3, 5, 16, 30, 100, 256) if packed else (1, 2, 4, 16, 16, 32, 64, 256))
        gpa = (0, 4 * GiB)[self.rng.random() < 0.2] + index * (RINGS_END // 4)
        setup = place(index, size, gpa, self.features)
        wrong = self._misplaced(setup)
        if ring_fault(memory, wrong) is not None:
            self.seen["fault", Fault.RING_ADDRESS] += 1
        ring = open_ring(memory, setup)
        self._streams[index] = RequestStream(self.rng, ring, self.sectors, self.types)
        for side in self.sides:
            if index in side.queues:
                side.close_queue(index)
            side.open_queue(setup)

    def _misplaced(self, setup: QueueSetup) -> QueueSetup:
        field = self.rng.choice(("descriptor_area", "driver_area", "device_area"))
        return setup._replace(**{field: self.rng.choice((1, 512 * 1024 - 2, 2**64 - 16, 2**40))})

    # --- steps --------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        index = int(self.rng.random() * QUEUES)
        self._disturb_host()
        chains = self._streams[index].add_batch()
        self.chains += chains
        self._left -= chains
        one, other = self.sides
        self._copy_memory()
        wish = self._streams[index].interrupt_wish()
        seen, also_seen = one.process(index), other.process(index)
        if seen != also_seen:
            self._differ(f"(fault, counters, questions) {seen} and {also_seen}")
        # In a batch that takes long, C looks in the middle too: who overwrites what it looks at may get either.
        is_same_wish = wish == self._streams[index].interrupt_wish()
        if is_same_wish and one.interrupt.status != other.interrupt.status:
            self._differ(f"InterruptStatus {one.interrupt.status} and {other.interrupt.status}")
        self._compare_memory()
        if one.image.dump() != other.image.dump():
            self._differ("the disks")
        self._follow(index, seen[0])

    def _disturb_host(self) -> None:
        """Let the host fail for a while, shrink the disk, change its mind on durability; the same on both sides."""
        draw = self.rng.random()
        if self._disturbed and draw < 0.3:
            self._disturbed = False
            self._set_host(None, self.sectors)
        elif draw > 0.98:
            self._disturbed = True
            failing = self.rng.choice((OSError(errno.ENOSPC, "full"), DiskError("damaged"), None))
            self._set_host(failing, self.rng.randrange(1, self.sectors + 1))
        elif draw > 0.96:
            for side in self.sides:
                side.engine.set_writeback(draw > 0.97)
        elif self._full and draw > 0.93:
            self._full = False
            for side in self.sides:
                side.image.heal()
        elif draw > 0.956:
            cut = self.rng.randrange(16)
            for side in self.sides:
                side.image.truncate(cut)

    def _set_host(self, failing: Exception | None, capacity: int) -> None:
        for side in self.sides:
            side.image.failing = failing
            with side.engine.exclusive():
                side.image.resize(capacity)

    def _follow(self, index: int, fault: Fault | None) -> None:
        """Let the driver see what came back; a queue that is broken, or that it has lost, is opened anew."""
        if fault is not None:
            self.seen["fault", fault] += 1
            self._open_queue(index)
            return
        stream = self._streams[index]
        for status in stream.take_back():
            self.seen["status", status] += 1
        if not stream.ring.room:
            self._open_queue(index)

    # --- memory -------------------------------------------------------------------------------------------------

    def _runs(self) -> list[tuple[int, int]]:
        """Return the (offset, bytes) of the mappings in which there may be anything but zeros."""
        runs = [(0, RAM)]
        for side in self.sides:
            end = RAM
            while True:
                try:
                    start = os.lseek(side.memory.fd, end, os.SEEK_DATA)
                except OSError:
                    break
                end = os.lseek(side.memory.fd, start, os.SEEK_HOLE)
                runs.append((start, end - start))
        return runs

    def _copy_memory(self) -> None:
        one, other = (ffi.cast("char *", side.memory.hva) for side in self.sides)
        for start, size in self._runs():
            ffi.memmove(other + start, one + start, size)

    def _compare_memory(self) -> None:
        one, other = (ffi.cast("char *", side.memory.hva) for side in self.sides)
        for start, size in self._runs():
            a, b = ffi.buffer(one + start, size), ffi.buffer(other + start, size)
            if a != b:
                at = next(i for i in range(size) if a[i] != b[i])
                self._differ(
                    f"offset 0x{start + at:x} of guest memory: {a[at : at + 16].hex()} and {b[at : at + 16].hex()}"
                )

    def _differ(self, what: str) -> None:
        raise Difference(f"seed {self.seed}, chain {self.chains}: the engines differ in {what}")

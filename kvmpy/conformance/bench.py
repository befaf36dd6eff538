"""The bench on which a hostile driver works: a device between its guest memory and its disk, with somebody watching.

::

    case --> BlockDriver --> VirtioMmio --> VirtioBlk --> engine --> PatchworkImage
               |  guest memory: full copies before and after each kick     |  compared with a model of the disk
               +---------------------------- Bench ------------------------+

What is sent with `add` is watched whole: its data, and what the disk must hold, follow from the request's own bytes.
What a case writes past `add` is its own business, and may be answered in no memory but what it says with `allow`.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Self

from kvmpy._shim import lib
from kvmpy.conformance.driver import HEADER, NO_STATUS, BlockDriver, Request, Ring, write_request
from kvmpy.conformance.image import PatchworkImage
from kvmpy.conformance.layout import Buffer, is_packed, ring_areas
from kvmpy.conformance.model import DiskModel, Sent
from kvmpy.conformance.packed_ring import PackedRing
from kvmpy.conformance.ram import HOLED, memory_in_regions
from kvmpy.conformance.split_ring import SplitRing
from kvmpy.conformance.watch import Range, copy_of, first_change, is_touched
from kvmpy.conformance.world import HIDDEN, RING_PACKED, World
from kvmpy.devices.block import MakeEngine
from kvmpy.devices.queue_worker import InlineWorker
from kvmpy.devices.virtio_blk import VirtioBlk
from kvmpy.devices.virtio_mmio import VirtioMmio
from kvmpy.storage.disk import SECTOR_SIZE
from kvmpy.units import GiB, MiB

REQUESTS = 0x4_0000
"""Where requests are built, one behind the other; above the rings."""
DATA = 0x8_0000
"""Where a case puts what it places itself."""
VAST = (8 * GiB, 32 * MiB)
UNTOUCHED = 0xC5
"""What guest memory holds at first."""


class LogCount(logging.Handler):
    """Counts what kvmpy logs."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Count a record."""
        self.count += 1


class Bench:
    """A device, its driver, and what has come of it; `start` brings it up.

    ``answers`` are the statuses that watched requests got, ``returned`` the heads of the used ring, both in order;
    ``harm`` says in words what must never have happened, ``refusals`` counts what the device's registers did not
    take, and ``errors`` are what its workers raised.
    ``readable_sector`` is what shall be readable at the end.
    """

    def __init__(self, make_engine: MakeEngine, *, packed: bool, world: World) -> None:
        self.world, self.packed = world, packed
        self.answers: list[int] = []
        self.returned: list[int] = []
        self.harm: list[str] = []
        self.errors: list[BaseException] = []
        self.refusals = self.readable_sector = 0
        self._allowed: list[Range] = []
        self._sent: dict[int, list[Sent]] = {}
        self._next_gpa = REQUESTS
        with ExitStack() as undo:
            self._make(make_engine, undo)
            self._undo = undo.pop_all()

    def _make(self, make_engine: MakeEngine, undo: ExitStack) -> None:
        world = self.world
        self.log = LogCount()
        logging.getLogger("kvmpy").addHandler(self.log)
        undo.callback(logging.getLogger("kvmpy").removeHandler, self.log)
        self.memory = undo.enter_context(memory_in_regions([*HOLED, VAST] if world.vast else HOLED))
        for gpa, size in HOLED:
            self.memory.fill(gpa, size, UNTOUCHED)
        self.image = undo.enter_context(PatchworkImage(world.chunks, hidden=(HIDDEN,), readonly=world.readonly))
        self.model = DiskModel(self.memory, self.image.contents(), world.settings.serial, self.expect)
        self.block = VirtioBlk(
            self.memory, self.image, make_engine=make_engine, queues=world.queues, settings=world.settings
        )
        undo.callback(self.block.close)
        self.device = VirtioMmio(
            self.block, self.memory, name="bench", on_error=self.errors.append, make_worker=world.make_worker
        )
        undo.callback(self.device.close)
        interrupt_fd = None if world.make_worker is InlineWorker else self.device.interrupt.fd
        self.driver = BlockDriver(self.memory, self.device, interrupt_fd=interrupt_fd)

    @property
    def features(self) -> int:
        """What a friendly driver negotiates in this world."""
        return self.driver.offered() & ~self.world.without & ~(0 if self.packed else RING_PACKED)

    def start(self) -> None:
        """Bring the device up from reset, with fresh rings. Raises ValueError: it refuses features that it offers."""
        self._sent.clear()
        self.driver.start(self.features, queues=self.world.queues, size=self.world.size)

    @property
    def ring(self) -> Ring:
        """Queue 0."""
        return self.driver.rings[0]

    @property
    def split(self) -> SplitRing:
        """Queue 0, of a variant for split rings."""
        assert isinstance(self.ring, SplitRing)
        return self.ring

    @property
    def packed_ring(self) -> PackedRing:
        """Queue 0, of a variant for packed rings."""
        assert isinstance(self.ring, PackedRing)
        return self.ring

    # --- sending ------------------------------------------------------------------------------------------------

    def request(
        self,
        type: int,
        sector: int = 0,
        *,
        data_out: bytes = b"",
        data_in: int = 0,
        readable: Sequence[int] | None = None,
        writable: Sequence[int] | None = None,
    ) -> Request:
        """Write a request to a place of its own, as `write_request` does."""
        size = HEADER.size * 4 + len(data_out) + data_in
        gpa, self._next_gpa = self._next_gpa, self._next_gpa + size + -size % 64
        return write_request(
            self.memory, gpa, type, sector, data_out=data_out, data_in=data_in, readable=readable, writable=writable
        )

    def read(
        self,
        sector: int = 0,
        sectors: int = 1,
        *,
        readable: Sequence[int] | None = None,
        writable: Sequence[int] | None = None,
    ) -> list[Buffer]:
        """Return the chain of a read."""
        size = sectors * SECTOR_SIZE
        return self.request(lib.VIRTIO_BLK_T_IN, sector, data_in=size, readable=readable, writable=writable).buffers

    def write(self, sector: int = 0, sectors: int = 1, *, readable: Sequence[int] | None = None) -> list[Buffer]:
        """Return the chain of a write, of bytes that stand nowhere else."""
        return self.request(
            lib.VIRTIO_BLK_T_OUT, sector, data_out=fresh_data(sector, sectors), readable=readable
        ).buffers

    def add(self, buffers: Sequence[Buffer], *, table: int | None = None, direct: int = 0) -> int:
        """Add a chain that is watched to queue 0; return its head."""
        head = self.ring.add(buffers, table=table, direct=direct)
        readable = (b for b in buffers if not b.writable and b.size and self.memory.contains(b.gpa, b.size))
        sent = Sent(buffers, b"".join(self.memory.read(b.gpa, b.size) for b in readable))
        self._sent.setdefault(head, []).append(sent)
        return head

    def add_again(self, head: int) -> None:
        """Offer a head once more while it is out; its request shall be answered once more."""
        self.split.offer(head)
        self._sent[head].append(self._sent[head][0])

    def send(self, buffers: Sequence[Buffer], *, table: int | None = None, direct: int = 0) -> None:
        """Add a chain that is watched, publish it and notify."""
        self.add(buffers, table=table, direct=direct)
        self.kick()

    def kick(self) -> None:
        """Publish what was added, and notify."""
        self.ring.publish()
        self.notify()

    def notify(self, queue: int = 0) -> None:
        """Notify, watch guest memory meanwhile, and look at what the device has returned."""
        with self.watched():
            self.driver.notify(queue)
        self.take_back()

    # --- watching -----------------------------------------------------------------------------------------------

    def take_back(self) -> None:
        """Look at what the device has returned, and check it."""
        for used in self.ring.used() if self.driver.rings else []:
            self.returned.append(used.head)
            sent = self._sent.get(used.head)
            if sent:
                status = self.model.complete(sent.pop(0), used.written)
                self.answers += [status] if status is not None else []
        if self.driver.needs_reset:
            statuses = (self._status_of(sent) for chains in self._sent.values() for sent in chains)
            self.expect(all(status in (None, NO_STATUS) for status in statuses), "a status without a used entry")

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Compare guest memory before and after: only what was given, and the used rings, may have changed."""
        before = self.copy()
        yield
        self.compare(before, self._given())

    def copy(self) -> bytes:
        """Return guest memory as it is."""
        return copy_of(self.memory)

    def compare(self, before: bytes, allowed: Iterable[Range]) -> None:
        """Note harm where guest memory differs from ``before`` outside of ``allowed``, and of what `allow` says."""
        changed = first_change(before, self.copy(), [*self._allowed, *allowed])
        self.expect(changed is None, f"guest memory was written at gpa 0x{changed or 0:x}")
        self.expect(not self.world.vast or not is_touched(self.memory), "the vast region was written")

    def _given(self) -> Iterator[Range]:
        """Yield what the device may write: the used rings, and the writable buffers that it says it has served."""
        for ring in self.driver.rings.values():
            descriptors, _, device = ring_areas(ring.setup)
            yield device
            if is_packed(ring.setup.features):
                yield descriptors
        for sent in (each for chains in self._sent.values() for each in chains):
            status = self._status_of(sent)
            if status == lib.VIRTIO_BLK_S_OK:
                yield from ((b.gpa, b.size) for b in sent.buffers if b.writable)
            elif status is not None and sent.status_gpa is not None:
                yield sent.status_gpa, 1  # where it refused, nothing else may be written

    def _status_of(self, sent: Sent) -> int | None:
        """Return the status byte as it is; None where there can be none."""
        gpa = sent.status_gpa
        return self.memory.read(gpa, 1)[0] if gpa is not None and self.memory.contains(gpa, 1) else None

    def allow(self, gpa: int, size: int) -> None:
        """Say that this may change too, by the device or by somebody else."""
        self._allowed.append((gpa, size))

    def expect(self, true: object, otherwise: str) -> None:
        """Note harm, in words, where something that must hold does not."""
        if not true:
            self.harm.append(otherwise)

    def refuse(self, refused: object, otherwise: str) -> None:
        """Note that the device refused what was written to a register; or harm, where it did not."""
        self.refusals += 1
        self.expect(refused, otherwise)

    @property
    def interrupted(self) -> bool:
        """Whether an interrupt for a used buffer is raised."""
        return bool(self.device.interrupt.status & lib.VIRTIO_MMIO_INT_VRING)

    @property
    def outstanding(self) -> int:
        """Watched chains that have not come back."""
        return sum(map(len, self._sent.values()))

    def forget(self) -> None:
        """Expect nothing back of what is out: the device was reset, or must not have consumed it."""
        self._sent.clear()

    def close(self) -> None:
        """Close all of it."""
        self._undo.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def fresh_data(sector: int, sectors: int) -> bytes:
    """Return bytes that no disk holds at first."""
    return b"".join(b"new %-12d" % (sector + i) * (SECTOR_SIZE // 16) for i in range(sectors))

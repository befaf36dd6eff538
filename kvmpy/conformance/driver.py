"""The driver's side of virtqueues and of a whole virtio-blk device: friendly by default, hostile on request.

::

    add(buffers)  --> descriptors (in the ring, or in an indirect table)
    publish()     --> the available ring and its index, or the flags of each chain's first descriptor
    used()        <-- what the device has returned since the last look

Every field of every structure can also be written by itself, with any value: that is how a hostile driver is made.
The rings keep no invariant that such a write breaks; they only remember what they added.
"""

import os
import select
from collections.abc import Iterator, Sequence
from itertools import starmap
from struct import Struct
from typing import Any, NamedTuple

from kvmpy._shim import lib
from kvmpy.conformance.layout import Buffer, Used, is_packed, place
from kvmpy.conformance.packed_ring import PackedRing
from kvmpy.conformance.split_ring import SplitRing
from kvmpy.devices.virtqueue import QueueSetup
from kvmpy.machine.bus import Device
from kvmpy.machine.memory import GuestMemory
from kvmpy.storage.disk import SECTOR_SIZE

HEADER = Struct("<IIQ")
"""The first 16 readable bytes of a request: type, reserved, sector (struct virtio_blk_req, §5.2.6)."""
SEGMENT = Struct("<QII")
"""One segment of DISCARD and WRITE_ZEROES: sector, num_sectors, flags."""

ACKNOWLEDGE, DRIVER = lib.VIRTIO_CONFIG_S_ACKNOWLEDGE, lib.VIRTIO_CONFIG_S_DRIVER
FEATURES_OK, DRIVER_OK = lib.VIRTIO_CONFIG_S_FEATURES_OK, lib.VIRTIO_CONFIG_S_DRIVER_OK
NEEDS_RESET = lib.VIRTIO_CONFIG_S_NEEDS_RESET

NO_STATUS = 0xEE
"""What a writable byte holds until the device writes it: no status of §5.2.6 is that."""
LIMIT = 5.0
"""Seconds to wait for an interrupt, before the device counts as silent."""
RING_SPACING = 0x4000
"""Bytes from one queue's rings to the next: room for 256 descriptors of either kind."""

Ring = SplitRing | PackedRing


class Request(NamedTuple):
    """A block request in guest memory: the readable bytes first, the writable ones behind them."""

    buffers: list[Buffer]
    data_in: int
    """gpa of the first writable byte."""
    status: int
    """gpa of the last writable byte."""


class Answer(NamedTuple):
    """What became of a request: its status byte, the length in the used ring, the data that was read."""

    status: int
    written: int
    data: bytes


def open_ring(memory: GuestMemory, setup: QueueSetup) -> Ring:
    """Return the driver's side of ``setup``, of the kind that its features say, with cleared areas."""
    return PackedRing(memory, setup) if is_packed(setup.features) else SplitRing(memory, setup)


def cut(gpa: int, sizes: Sequence[int], *, writable: bool = False) -> list[Buffer]:
    """Return buffers of these sizes, one behind the other from ``gpa`` on."""
    starts = [gpa + sum(sizes[:i]) for i in range(len(sizes))]
    return [Buffer(start, size, writable) for start, size in zip(starts, sizes, strict=True)]


def write_request(
    memory: GuestMemory,
    gpa: int,
    type: int,
    sector: int = 0,
    *,
    data_out: bytes = b"",
    data_in: int = 0,
    readable: Sequence[int] | None = None,
    writable: Sequence[int] | None = None,
) -> Request:
    """Write a request to ``gpa`` and return it as a chain.

    ``readable`` and ``writable`` are the sizes of the pieces into which the two halves are cut; left out, they are
    what drivers use: header and data, data and status.
    """
    memory.write(gpa, HEADER.pack(type, 0, sector) + data_out)
    behind = gpa + HEADER.size + len(data_out)
    start = behind + -behind % HEADER.size
    memory.fill(start, data_in + 1, NO_STATUS)
    if readable is None:
        readable = (HEADER.size, len(data_out)) if data_out else (HEADER.size,)
    if writable is None:
        writable = (data_in, 1) if data_in else (1,)
    buffers = cut(gpa, readable) + cut(start, writable, writable=True)
    return Request(buffers, start, start + data_in)


class BlockDriver:
    """A driver of the virtio-blk device behind ``registers`` (virtio 1.2 §4.2.2), by its reads and writes alone.

    ``rings_gpa`` is where queue 0 lies, the others RING_SPACING bytes further each; ``requests_gpa`` where `request`
    builds its requests. A device whose queues have threads needs its ``interrupt_fd``, to wait for; one that serves
    them inside the write of QueueNotify does not.
    """

    def __init__(
        self,
        memory: GuestMemory,
        registers: Device,
        *,
        rings_gpa: int = 0x1_0000,
        requests_gpa: int = 0x8_0000,
        interrupt_fd: int | None = None,
    ) -> None:
        self.memory, self.registers, self.interrupt_fd = memory, registers, interrupt_fd
        self.rings_gpa, self.requests_gpa = rings_gpa, requests_gpa
        self.features = 0
        self.rings: dict[int, Ring] = {}

    # --- registers ----------------------------------------------------------------------------------------------

    def get(self, register: int) -> int:
        """Read a register."""
        return int.from_bytes(self.registers.read(register, 4), "little")

    def set(self, register: int, value: int) -> None:
        """Write a register."""
        self.registers.write(register, value.to_bytes(4, "little"))

    def config(self, offset: int, size: int) -> int:
        """Read a field of the configuration space (§5.2.4)."""
        return int.from_bytes(self.registers.read(lib.VIRTIO_MMIO_CONFIG + offset, size), "little")

    @property
    def status(self) -> int:
        """The device status: ``lib.VIRTIO_CONFIG_S_*``."""
        return self.get(lib.VIRTIO_MMIO_STATUS)

    @property
    def needs_reset(self) -> bool:
        """Whether the device has given up on this driver (§2.1.2)."""
        return bool(self.status & NEEDS_RESET)

    def set_status(self, bits: int) -> None:
        """Set ``bits`` of the status beside those that are set."""
        self.set(lib.VIRTIO_MMIO_STATUS, self.status | bits)

    def offered(self) -> int:
        """Return the 64 feature bits that the device offers."""
        words = []
        for word in (0, 1):
            self.set(lib.VIRTIO_MMIO_DEVICE_FEATURES_SEL, word)
            words.append(self.get(lib.VIRTIO_MMIO_DEVICE_FEATURES))
        return words[0] | words[1] << 32

    def accept(self, features: int) -> None:
        """Write the 64 feature bits that the driver wants."""
        for word in (0, 1):
            self.set(lib.VIRTIO_MMIO_DRIVER_FEATURES_SEL, word)
            self.set(lib.VIRTIO_MMIO_DRIVER_FEATURES, features >> 32 * word & 0xFFFF_FFFF)

    # --- from reset to DRIVER_OK (§3.1.1) -----------------------------------------------------------------------

    def reset(self) -> None:
        """Write 0 to the status: no ring is the device's any more."""
        self.set(lib.VIRTIO_MMIO_STATUS, 0)
        self.rings.clear()

    def negotiate(self, features: int) -> bool:
        """Reset the device and agree on ``features``; return whether FEATURES_OK stuck."""
        self.reset()
        self.set_status(ACKNOWLEDGE)
        self.set_status(DRIVER)
        self.accept(features)
        self.features = features
        self.set_status(FEATURES_OK)
        return bool(self.status & FEATURES_OK)

    def place(self, index: int, size: int) -> QueueSetup:
        """Return queue ``index`` at its usual place."""
        return place(index, size, self.rings_gpa + RING_SPACING * index, self.features)

    def describe_queue(self, setup: QueueSetup) -> None:
        """Select a queue and write its size and addresses, as they are; do not make it ready."""
        self.set(lib.VIRTIO_MMIO_QUEUE_SEL, setup.queue_index)
        self.set(lib.VIRTIO_MMIO_QUEUE_NUM, setup.size)
        for register, gpa in (
            (lib.VIRTIO_MMIO_QUEUE_DESC_LOW, setup.descriptor_area),
            (lib.VIRTIO_MMIO_QUEUE_AVAIL_LOW, setup.driver_area),
            (lib.VIRTIO_MMIO_QUEUE_USED_LOW, setup.device_area),
        ):
            self.set(register, gpa & 0xFFFF_FFFF)
            self.set(register + 4, gpa >> 32)

    def set_up_queue(self, index: int, *, size: int = 16) -> Ring:
        """Clear the rings of queue ``index``, tell the device where they are, and make the queue ready."""
        setup = self.place(index, size)
        ring = self.rings[index] = open_ring(self.memory, setup)
        self.describe_queue(setup)
        self.set(lib.VIRTIO_MMIO_QUEUE_READY, 1)
        return ring

    def start(self, features: int, *, queues: int = 1, size: int = 16) -> None:
        """Bring the device up from reset: features, queues, DRIVER_OK. Raises ValueError: it does not agree."""
        if not self.negotiate(features):
            raise ValueError(f"the device does not accept features 0x{features:x}: it offers 0x{self.offered():x}")
        for index in range(queues):
            self.set_up_queue(index, size=size)
        self.set_status(DRIVER_OK)

    # --- requests -----------------------------------------------------------------------------------------------

    def notify(self, index: int = 0) -> None:
        """Write QueueNotify."""
        self.set(lib.VIRTIO_MMIO_QUEUE_NOTIFY, index)

    def request(self, type: int, sector: int = 0, *, queue: int = 0, **parts: Any) -> Answer | None:
        """Make a request, as `write_request` does, and return its answer, or None when the device gave none."""
        request = write_request(self.memory, self.requests_gpa, type, sector, **parts)
        ring = self.rings[queue]
        head = ring.add(request.buffers)
        ring.publish()
        self.notify(queue)
        for used in self._returned(ring):
            if used.head == head:
                data = self.memory.read(request.data_in, request.status - request.data_in)
                return Answer(self.memory.read(request.status, 1)[0], used.written, data)
        return None

    def _returned(self, ring: Ring) -> Iterator[Used]:
        """Yield what comes back, until nothing more does."""
        while True:
            yield from ring.used()
            if self.interrupt_fd is None or not select.select([self.interrupt_fd], [], [], LIMIT)[0]:
                return
            os.eventfd_read(self.interrupt_fd)
            self.registers.write(lib.VIRTIO_MMIO_INTERRUPT_ACK, (lib.VIRTIO_MMIO_INT_VRING).to_bytes(4, "little"))

    def read(self, sector: int, sectors: int = 1, *, queue: int = 0) -> bytes | None:
        """Return what the device reads, or None when it does not answer with S_OK."""
        answer = self.request(lib.VIRTIO_BLK_T_IN, sector, data_in=sectors * SECTOR_SIZE, queue=queue)
        return answer.data if answer is not None and answer.status == lib.VIRTIO_BLK_S_OK else None

    def write(self, sector: int, data: bytes, *, queue: int = 0) -> bool:
        """Write whole sectors and return whether the device says S_OK."""
        return self._is_ok(self.request(lib.VIRTIO_BLK_T_OUT, sector, data_out=data, queue=queue))

    def flush(self, *, queue: int = 0) -> bool:
        """Make all completed writes durable and return whether the device says S_OK."""
        return self._is_ok(self.request(lib.VIRTIO_BLK_T_FLUSH, queue=queue))

    def serial(self, *, queue: int = 0) -> bytes | None:
        """Return the serial number without its padding, or None."""
        answer = self.request(lib.VIRTIO_BLK_T_GET_ID, data_in=lib.VIRTIO_BLK_ID_BYTES, queue=queue)
        return answer.data.rstrip(b"\0") if answer is not None and self._is_ok(answer) else None

    def discard(self, *segments: tuple[int, int, int], queue: int = 0) -> Answer | None:
        """Discard segments of (sector, num_sectors, flags)."""
        return self.request(lib.VIRTIO_BLK_T_DISCARD, data_out=b"".join(starmap(SEGMENT.pack, segments)), queue=queue)

    def write_zeroes(self, *segments: tuple[int, int, int], queue: int = 0) -> Answer | None:
        """Zero segments of (sector, num_sectors, flags)."""
        data = b"".join(starmap(SEGMENT.pack, segments))
        return self.request(lib.VIRTIO_BLK_T_WRITE_ZEROES, data_out=data, queue=queue)

    @staticmethod
    def _is_ok(answer: Answer | None) -> bool:
        return answer is not None and answer.status == lib.VIRTIO_BLK_S_OK

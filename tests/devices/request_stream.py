"""Endless block requests for one virtqueue, friendly and hostile, from a seeded ``random.Random``.

A batch is a few chains that the friendly driver adds, of requests that are mostly what a driver sends; then, now and
then, one field somewhere (a descriptor, an indirect table, an index, a flag, an event) gets a value of its own. What
is drawn is cheap to draw: the stream is what a million chains are made of.
"""

import random
from collections import Counter

from kvmpy._shim import lib
from kvmpy.conformance.driver import HEADER, SEGMENT, Ring
from kvmpy.conformance.layout import (
    AVAIL,
    DESCRIPTOR_SIZE,
    INDIRECT,
    NEXT,
    USED,
    WRITE,
    Buffer,
    EventSuppression,
    PackedDescriptor,
    ring_areas,
)
from kvmpy.conformance.packed_ring import PackedRing
from kvmpy.storage.disk import SECTOR_SIZE
from kvmpy.units import GiB, KiB, MiB

VAST = 32 * MiB
"""A region that nobody fills: only its addresses count, where a chain has to have more than 2^32 bytes."""
REGIONS = ((0, 512 * KiB), (512 * KiB, 256 * KiB), (4 * GiB, 256 * KiB), (8 * GiB, VAST))
RAM = 1024 * KiB
"""Bytes of the regions before the vast one."""
RINGS_END = 0x1_0000
"""Queues lie below; above, and in the other regions, is what requests are made of."""

IN, OUT, FLUSH, GET_ID = lib.VIRTIO_BLK_T_IN, lib.VIRTIO_BLK_T_OUT, lib.VIRTIO_BLK_T_FLUSH, lib.VIRTIO_BLK_T_GET_ID
DISCARD, WRITE_ZEROES = lib.VIRTIO_BLK_T_DISCARD, lib.VIRTIO_BLK_T_WRITE_ZEROES
UNKNOWN = (lib.VIRTIO_BLK_T_SCSI_CMD, lib.VIRTIO_BLK_T_BARRIER, lib.VIRTIO_BLK_T_SECURE_ERASE, OUT | 1 << 16, 2**32 - 1)
TYPES = [IN] * 30 + [OUT] * 30 + [FLUSH] * 6 + [GET_ID] * 7 + [DISCARD] * 9 + [WRITE_ZEROES] * 12 + [*UNKNOWN]
REQUEST_TYPES = (IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES, *UNKNOWN)

TRANSFERS = (1, 1, 1, 1, 2, 3, 8, 9, 16)
"""Sectors of a read or write."""
SIZES_16 = (0, 1, 2, 3, 0x7FFF, 0x8000, 0xFFFE, 0xFFFF)
SIZES_32 = (0, 1, 8, 15, 16, 17, 32, 511, 512, 16 * 65536, 16 * 65537, 2**31, 2**32 - 512, 2**32 - 16, 2**32 - 1)
ADDRESSES = (0, 1, 512 * KiB, 768 * KiB, 3 * GiB, 4 * GiB, 4 * GiB + 256 * KiB, 8 * GiB, 2**63, 2**64 - 512, 2**64 - 1)
SECTORS = (0, 1, 2**23, 2**32, 2**55 - 1, 2**55, 2**63, 2**64 - 1)
HOSTILITY = 0.22
"""How many batches have a field of their own."""
IN_RINGS = 0.01
"""How many buffers lie over the rings."""


class RequestStream:
    """Requests for ``ring``, on a disk of ``sectors``. ``types`` counts what was added."""

    def __init__(self, rng: random.Random, ring: Ring, sectors: int, types: "Counter[int]") -> None:
        self.rng, self.ring, self.sectors, self.types = rng, ring, sectors, types
        self.indirect = bool(ring.setup.features >> lib.VIRTIO_RING_F_INDIRECT_DESC & 1)
        self.event_idx = bool(ring.setup.features >> lib.VIRTIO_RING_F_EVENT_IDX & 1)
        self._tables: list[tuple[int, int]] = []
        self._statuses: dict[int, int] = {}
        rng.shuffle(ring.free)

    def add_batch(self) -> int:
        """Add and publish a batch, and return how many chains it has: none where the ring is full."""
        random = self.rng.random
        wanted = 1 + int(random() ** 2 * 8)
        heads = []
        self._tables.clear()
        while len(heads) < wanted and self.ring.room:
            heads.append(self._add_request())
        self._set_events()
        self.ring.publish()
        if heads and random() < HOSTILITY:
            self.rng.choice((self._spoil_descriptor,) * 6 + (self._spoil_table,) * 4 + (self._spoil_ring,) * 2)(heads)
        return len(heads)

    def take_back(self) -> list[int]:
        """Let the driver see what was returned; return the statuses, where it knows them."""
        statuses = [self._statuses.pop(used.head, None) for used in self.ring.used()]
        return [self.ring.memory.read(gpa, 1)[0] for gpa in statuses if gpa is not None]

    def interrupt_wish(self) -> object:
        """Return what the driver area says of interrupts."""
        ring = self.ring
        return ring.driver_event if isinstance(ring, PackedRing) else (ring.avail_flags, ring.used_event)

    def _pick(self, *values: int) -> int:
        return values[int(self.rng.random() * len(values))]

    # --- requests -----------------------------------------------------------------------------------------------

    def _add_request(self) -> int:
        random = self.rng.random
        if self.ring.size >= 130 and random() < 0.03:
            return self._add_vast_chain()
        type = TYPES[int(random() * len(TYPES))]
        self.types[type] += 1
        header, readable, writable = self._request(type)
        if random() < 0.04:
            readable = self._pick(0, 1, 15, 16, 17, readable + 1, readable + 16)
        if random() < 0.04:
            writable = self._pick(0, 0, 1, 2, writable + 1, writable + 512)
        buffers = self._cut(readable, False) + self._cut(writable, True)
        self._write(header, buffers)
        return self._expect_status(self._add(buffers), buffers)

    def _expect_status(self, head: int, buffers: list[Buffer]) -> int:
        last = next((b for b in reversed(buffers) if b.size and b.writable), None)
        if last is not None and self.ring.memory.contains(last.gpa, last.size):
            self._statuses[head] = last.gpa + last.size - 1
        return head

    def _request(self, type: int) -> tuple[bytes, int, int]:
        """Return the first readable bytes, the number of all of them, and the number of the writable ones."""
        sector, data_out, data_in, payload = 0, 0, 0, b""
        if type in (IN, OUT):
            sectors = self._pick(*TRANSFERS)
            sector = self._sector(sectors)
            size = sectors * SECTOR_SIZE + (self._pick(1, 256, -511, 0) if self.rng.random() < 0.03 else 0)
            data_in, data_out = (size, 0) if type == IN else (0, size)
        elif type == GET_ID:
            data_in = self._pick(0, 1, 19, 20, 20, 20, 21, 4096)
        elif type in (DISCARD, WRITE_ZEROES):
            payload = b"".join(self._segment(type) for _ in range(self._pick(1, 1, 1, 2, 3, 16, 17)))
            data_out = len(payload) + (self._pick(-1, 8) if self.rng.random() < 0.03 else 0)
        elif self.rng.random() < 0.2:
            sector, data_out, data_in = self._pick(0, 1), self._pick(0, 512), self._pick(0, 512)
        return HEADER.pack(type, 0, sector) + payload, HEADER.size + data_out, data_in + 1

    def _sector(self, sectors: int) -> int:
        draw = self.rng.random()
        if draw < 0.9:
            return int(self.rng.random() * max(1, self.sectors - sectors + 1))
        if draw < 0.96:
            return max(0, self.sectors - sectors + self._pick(-1, 0, 1, sectors))
        return self._pick(*SECTORS)

    def _segment(self, type: int) -> bytes:
        sectors = self._pick(0, 1, 1, 2, 7, 8, 8, 9, 16, 24)
        if self.rng.random() < 0.02:
            sectors = self._pick(1 << 22, (1 << 22) + 1, 2**32 - 1)
        flags = self._pick(0, 1) if type == WRITE_ZEROES else 0
        if self.rng.random() < 0.03:
            flags = self._pick(1, 2, 2**31)
        return SEGMENT.pack(self._sector(sectors), sectors, flags)

    def _add_vast_chain(self) -> int:
        """Add a chain of about 2^32 bytes: one more is too many (virtio 1.2 §2.7.5.2)."""
        type = self._pick(IN, OUT, GET_ID)
        self.types[type] += 1
        writable = type != OUT
        data = [Buffer(8 * GiB, VAST, writable)] * self._pick(126, 127, 127, 127, 128)
        header, status = Buffer(self._gpa(16), 16), Buffer(self._gpa(1), 1, True)
        self._write(HEADER.pack(type, 0, 0), [header])
        odd = Buffer(8 * GiB, self._pick(VAST - 16, VAST - 17), writable)
        if len(data) + 3 > self.ring.room:
            data = data[: max(0, self.ring.room - 3)]
        return self._add([header, *data, odd, status][: self.ring.room])

    # --- buffers ------------------------------------------------------------------------------------------------

    def _cut(self, size: int, writable: bool) -> list[Buffer]:
        """Return ``size`` bytes in pieces anywhere in RAM."""
        random = self.rng.random
        sizes = [size]
        for _ in range(self._pick(0, 0, 1, 1, 2, 4) if size > 1 else 0):
            last = sizes.pop()
            at = self._pick(16, 512, last - 1, int(random() * (last + 1)))
            sizes += [at, last - at] if 0 <= at <= last else [last]
        if random() < 0.03:
            sizes.insert(int(random() * (len(sizes) + 1)), 0)
        if not size and random() < 0.9:
            return []
        return [Buffer(self._gpa(each), each, writable) for each in sizes]

    def _gpa(self, size: int) -> int:
        random = self.rng.random
        draw = random()
        if draw < IN_RINGS:
            area, length = ring_areas(self.ring.setup)[int(random() * 3)]
            return max(0, area + int(random() * length) - 8)
        start, end = (RINGS_END, 512 * KiB)
        if draw > 0.8:
            start, length = REGIONS[1 + (draw > 0.9)]
            end = start + length
        gpa = start + int(random() * max(1, end - start - size + 1))
        return gpa - gpa % self._pick(1, 16, 512, 512)

    def _write(self, data: bytes, buffers: list[Buffer]) -> None:
        """Put ``data`` into the readable buffers, as far as there is room."""
        memory = self.ring.memory
        for buffer in buffers:
            if not data or buffer.writable:
                return
            piece, data = data[: buffer.size], data[buffer.size :]
            if piece and memory.contains(buffer.gpa, len(piece)):
                memory.write(buffer.gpa, piece)

    def _add(self, buffers: list[Buffer]) -> int:
        """Add a chain; where indirect tables are allowed mostly, and where there is no room otherwise, with one."""
        random = self.rng.random
        buffers = buffers or [Buffer(0, 0)]
        room = self.ring.room
        if random() >= (0.5 if self.indirect else 0.01) and len(buffers) <= room:
            return self.ring.add(buffers)
        if not self.indirect and random() < 0.95:
            return self.ring.add(buffers[:room])
        direct = min(int(random() * len(buffers)), room - 1) if random() < 0.2 else 0
        size = DESCRIPTOR_SIZE * (len(buffers) - direct)
        table = self._gpa(size)
        if not self.ring.memory.contains(table, size):
            table = RINGS_END
        self._tables.append((table, len(buffers) - direct))
        return self.ring.add(buffers, table=table, direct=direct)

    # --- hostility ----------------------------------------------------------------------------------------------

    def _address(self) -> int:
        if self.rng.random() < 0.2:
            return self._gpa(0)
        return (ADDRESSES[int(self.rng.random() * len(ADDRESSES))] + self._pick(0, 0, -1, 1, -16, -512, 16)) % 2**64

    def _flags(self, flags: int) -> int:
        """Return ``flags`` with one bit changed, most often one that means something."""
        return flags ^ self._pick(NEXT, NEXT, WRITE, INDIRECT, INDIRECT, AVAIL, USED, 1 << int(self.rng.random() * 16))

    def _index(self) -> int:
        size = self.ring.size
        return self._pick(0, size - 1, size, size + 1, int(self.rng.random() * size), *SIZES_16) % 2**16

    def _spoil_descriptor(self, heads: list[int]) -> None:
        chain = self.ring.chain_of(heads[int(self.rng.random() * len(heads))])
        at = chain[int(self.rng.random() * len(chain))]
        descriptor = self.ring.descriptor(at)
        field = self._pick(0, 1, 2, 3)
        if field == 0:
            descriptor = descriptor._replace(addr=self._address())
        elif field == 1:
            descriptor = descriptor._replace(len=self._pick(*SIZES_32))
        elif field == 2:
            descriptor = descriptor._replace(flags=self._flags(descriptor.flags))
        elif isinstance(descriptor, PackedDescriptor):
            descriptor = descriptor._replace(id=self._index())
        else:
            descriptor = descriptor._replace(next=self._pick(self._index(), chain[0]), flags=descriptor.flags | NEXT)
        self.ring.set_descriptor(at, descriptor)

    def _spoil_table(self, heads: list[int]) -> None:
        if not self._tables:
            return self._spoil_descriptor(heads)
        table, entries = self._tables[int(self.rng.random() * len(self._tables))]
        entry = table + DESCRIPTOR_SIZE * int(self.rng.random() * entries)
        offset, size, value = (
            (0, 8, self._address()),
            (8, 4, self._pick(*SIZES_32)),
            (12, 2, self._flags(self._pick(0, WRITE, NEXT))),
            (14, 2, self._pick(*SIZES_16, 0, entries, entries - 1)),
        )[self._pick(0, 1, 2, 3)]
        self.ring.memory.write(entry + offset, value.to_bytes(size, "little"))
        return None

    def _spoil_ring(self, heads: list[int]) -> None:
        ring = self.ring
        if isinstance(ring, PackedRing):
            slot = self._pick(ring.next_slot, int(self.rng.random() * ring.size))
            ring.set_flags(slot, self._flags(ring.descriptor(slot).flags))
        elif self.rng.random() < 0.5:
            ring.set_avail((ring.next_avail - 1) % ring.size, self._pick(self._index(), self._index(), heads[0]))
        else:
            ring.avail_idx = (ring.avail_idx + self._pick(1, -1, ring.size, ring.size + 1, 0x8000)) % 2**16

    def _set_events(self) -> None:
        """Say when an interrupt is wanted: often soon, sometimes never, sometimes nonsense."""
        ring, draw = self.ring, self.rng.random()
        if draw < 0.6:
            return
        near = self._pick(0, 1, 2, 3, ring.size - 1)
        if isinstance(ring, PackedRing):
            near = (ring.used_slot + near) % ring.size if draw < 0.95 else self._index()
            ring.driver_event = EventSuppression(near | self._pick(0, 0x8000), self._pick(0, 1, 2, 2, 2, 3, 0xFFFF))
        elif self.event_idx:
            ring.used_event = (ring.last_used + near) % 2**16 if draw < 0.95 else self._index()
        else:
            ring.avail_flags = self._pick(0, 1, 0xFFFE, 0xFFFF)

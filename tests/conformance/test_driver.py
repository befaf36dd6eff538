"""The friendly half of the driver: what it adds is what a device finds, and what a device returns is what it sees."""

import random
from itertools import pairwise

import pytest

from kvmpy._shim import lib
from kvmpy.conformance.bench import Bench, fresh_data
from kvmpy.conformance.driver import open_ring
from kvmpy.conformance.image import pattern
from kvmpy.conformance.layout import Buffer, Used, place, ring_areas
from kvmpy.conformance.world import EVENT_IDX, INDIRECT_DESC, RING_PACKED, SECTORS, World
from kvmpy.devices.block_c import CBlock
from kvmpy.devices.block_python import PythonBlock
from kvmpy.devices.virtqueue import SplitQueue, ring_fault
from kvmpy.devices.virtqueue_packed import PackedQueue
from kvmpy.machine.memory import GuestMemory
from kvmpy.units import MiB

SIZE = 8
TABLES = 0x2000


@pytest.fixture
def memory():
    with GuestMemory(1 * MiB) as memory:
        yield memory


@pytest.fixture(params=[0, RING_PACKED], ids=["split", "packed"])
def pair(request, memory):
    """The driver's and the device's side of one queue."""
    setup = place(0, SIZE, 0x1000, request.param | INDIRECT_DESC | EVENT_IDX)
    assert ring_fault(memory, setup) is None
    return open_ring(memory, setup), (PackedQueue if request.param else SplitQueue)(memory, setup)


def chain_of(rng, most):
    readable, writable = rng.randint(0, 3), rng.randint(0, 3)
    sizes = [rng.randint(1, 600) for _ in range(max(1, readable + writable))][:most]
    return [Buffer(0x8000 + rng.randrange(0x8000), size, i >= readable) for i, size in enumerate(sizes)]


def assert_same(chain, buffers):
    assert [tuple(s) for s in chain.readable] == [(b.gpa, b.size) for b in buffers if not b.writable]
    assert [tuple(s) for s in chain.writable] == [(b.gpa, b.size) for b in buffers if b.writable]


def test_added_chains_are_what_the_device_pops(pair):
    """In order, direct, indirect and mixed, many times around the ring; each comes back to the driver once."""
    ring, device = pair
    rng = random.Random(1)
    for _ in range(300):
        added = []
        while ring.room and len(added) < 3:
            buffers = chain_of(rng, ring.room)
            table = TABLES + 0x100 * len(added) if rng.random() < 0.5 else None
            direct = rng.randrange(min(len(buffers), ring.room)) if table is not None else 0
            added.append((ring.add(buffers, table=table, direct=direct), buffers))
        assert not device.available()
        ring.publish()
        returned = []
        for head, buffers in added:
            chain = device.pop()
            assert chain.head == head
            assert_same(chain, buffers)
            written = rng.randint(0, 99) if chain.writable else 0
            device.push(chain, written)
            returned.append(Used(head, written))
        assert device.pop() is None
        assert ring.used() == returned
        assert ring.used() == []
        assert ring.room == SIZE


def test_ring_that_is_full_takes_no_more(pair):
    ring, _ = pair
    ring.add([Buffer(0x8000, 1)] * SIZE)
    assert ring.room == 0
    with pytest.raises(IndexError, match=r"^1 \w+: 0 of 8 are free$"):
        ring.add([Buffer(0x8000, 1)])


def test_edited_descriptor_is_what_was_written(pair):
    """One field of one descriptor changes, also of a chain that is not published yet."""
    ring, device = pair
    head = ring.add([Buffer(0x8000, 16), Buffer(0x9000, 16), Buffer(0xA000, 1, True)])
    ring.edit(head, 0, len=7)
    ring.edit(head, 1, addr=0xB000, set_flags=lib.VRING_DESC_F_WRITE)
    ring.publish()
    chain = device.pop()
    assert_same(chain, [Buffer(0x8000, 7), Buffer(0xB000, 16, True), Buffer(0xA000, 1, True)])


def test_areas_do_not_overlap_and_are_aligned(memory):
    for features in (0, RING_PACKED):
        for size in (1, 2, 16, 256):
            setup = place(0, size, 0x4000, features)
            areas = sorted(ring_areas(setup))
            assert ring_fault(memory, setup) is None
            assert all(gpa + length <= following for (gpa, length), (following, _) in pairwise(areas))


@pytest.fixture(params=[CBlock, PythonBlock], ids=["c", "python"])
def make_engine(request):
    return request.param


@pytest.mark.parametrize("packed", [False, True])
def test_driver_gets_everything_from_a_real_device(make_engine, packed):
    """virtio 1.2 §5.2.6: each request of a driver that does as it should is answered with S_OK."""
    with Bench(make_engine, packed=packed, world=World(queues=2)) as bench:
        bench.start()
        driver = bench.driver
        assert driver.config(0, 8) == SECTORS
        assert driver.read(9) == pattern(9)
        assert driver.write(3, fresh_data(3, 2), queue=1)
        assert driver.read(3, 2) == fresh_data(3, 2)
        assert driver.flush()
        assert driver.serial() == b"conformance-disk"
        assert driver.discard((3, 1, 0)).status == driver.write_zeroes((4, 1, 1)).status == lib.VIRTIO_BLK_S_OK
        assert driver.read(3, 2) == bytes(1024)
        assert driver.read(SECTORS) is None
        assert not driver.write(SECTORS, bytes(512))
        assert bench.image.is_intact()


def test_driver_says_when_the_device_does_not_agree(make_engine):
    with Bench(make_engine, packed=False, world=World()) as bench, pytest.raises(ValueError, match="does not accept"):
        bench.driver.start(1 << 63)

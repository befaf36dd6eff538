"""Hostile drivers of the entropy device and of the console: each breaks a ring, and nothing else.

The device says DEVICE_NEEDS_RESET, has touched no byte outside the rings, and serves again after a reset. What the
queue code finds wrong with a ring is tested with the queues; here, that no device does without it.
"""

import random
import threading

import pytest
from console_bench import ConsoleBench
from mmio_driver import LIMIT, ROUNDS, in_thread, joined
from virtio_bench import DATA, EVENT_IDX, INDIRECT, KINDS, PACKED, RING_RESET, VirtioBench

from kvmpy._shim import lib
from kvmpy.conformance.layout import INDIRECT as INDIRECT_FLAG
from kvmpy.conformance.layout import NEXT, WRITE, Descriptor
from kvmpy.devices.queue_worker import InlineWorker, QueueWorker
from kvmpy.devices.virtio_console import RECEIVEQ, TRANSMITQ
from kvmpy.devices.virtio_rng import VirtioRng
from kvmpy.devices.virtqueue import Fault
from kvmpy.units import MiB

TABLE = 0x8000
RAM = 2 * MiB


class Side:
    """One queue of one device: how to make it, and which way its buffers go."""

    def __init__(self, make, queue, *, writable):
        self.make, self.queue, self.writable = make, queue, writable

    def __repr__(self):
        return f"{self.make.__name__}-{self.queue}"


def rng(make_worker=InlineWorker):
    return VirtioBench(VirtioRng, make_worker)


def console(make_worker=InlineWorker):
    bench = ConsoleBench(make_worker=make_worker)
    bench.device.feed(b"typed ahead")  # else its receiveq is not looked at
    return bench


SIDES = [Side(rng, 0, writable=True), Side(console, RECEIVEQ, writable=True), Side(console, TRANSMITQ, writable=False)]


@pytest.fixture(params=SIDES, ids=repr)
def side(request):
    return request.param


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def features(request):
    return request.param | INDIRECT


@pytest.fixture
def bench(side, features):
    bench = side.make()
    bench.start(features)
    yield bench
    bench.close()


def outside_rings(bench):
    low, high = bench.driver.rings_gpa, bench.driver.rings_gpa + 0x8000
    return bench.memory.read(0, low), bench.memory.read(high, RAM - high)


def expect_broken(bench, side, fault):
    """Notify; the device must break with ``fault``, and change no byte but in the rings."""
    before = outside_rings(bench)
    bench.driver.notify(side.queue)
    assert (bench.mmio.fault, bench.driver.needs_reset) == (fault, True)
    assert outside_rings(bench) == before
    if hasattr(bench, "output"):
        assert bench.output.drain() == b""


def expect_service(bench, side, features=0):
    """Reset the device; it must serve again."""
    bench.start(features)
    bench.memory.write(DATA, b"some text")
    if hasattr(bench, "output"):
        bench.device.feed(b"typed")
    bench.offer(side.queue, (DATA, 9, side.writable))
    assert len(bench.driver.rings[side.queue].used()) == 1
    assert bench.driver.status == 15
    if hasattr(bench, "output"):
        bench.output.drain()


# --- buffers, in rings of either kind ---------------------------------------------------------------------------

WRONG_BUFFERS = {
    "beyond RAM": (1 << 40, 16),
    "from nowhere at all": (2**64 - 16, 16),
    "across the end of RAM": (RAM - 8, 16),
    "across 2^64": (2**64 - 8, 16),
    "4 GiB less one": (DATA, 2**32 - 1),
    "in a window of registers": (lib.KVMPY_VIRTIO_MMIO, 4),
}


@pytest.mark.parametrize("wrong", WRONG_BUFFERS.values(), ids=WRONG_BUFFERS)
@pytest.mark.parametrize("behind", [False, True], ids=["alone", "behind a good one"])
def test_buffer_that_is_not_ram(bench, side, features, wrong, behind):
    """Nothing of the chain is used, also not what is right."""
    good = [(DATA, 8, side.writable)] if behind else []
    bench.offer(side.queue, *good, (*wrong, side.writable), notify=False)
    expect_broken(bench, side, Fault.BUFFER_ADDRESS)
    expect_service(bench, side, features)


def test_readable_buffer_behind_a_writable_one(bench, side, features):
    """virtio 1.2 §2.7.4.2."""
    bench.offer(side.queue, (DATA, 8, True), (DATA + 8, 8, False), notify=False)
    expect_broken(bench, side, Fault.BUFFER_ORDER)
    expect_service(bench, side, features)


def test_unknown_flags(bench, side, features):
    head = bench.offer(side.queue, (DATA, 8, side.writable), notify=False)
    bench.driver.rings[side.queue].edit(head, 0, set_flags=1 << 3)
    expect_broken(bench, side, Fault.UNKNOWN_FLAGS)
    expect_service(bench, side, features)


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"addr": 1 << 40}, Fault.INDIRECT_ADDRESS),
        ({"addr": RAM - 16}, Fault.INDIRECT_ADDRESS),
        ({"len": 0}, Fault.INDIRECT_LENGTH),
        ({"len": 17}, Fault.INDIRECT_LENGTH),
        ({"len": 2**32 - 16}, Fault.INDIRECT_LENGTH),
        ({"set_flags": NEXT}, Fault.INDIRECT_AND_NEXT),
    ],
)
def test_indirect_table_that_is_none(bench, side, features, fields, fault):
    """virtio 1.2 §2.7.5.3."""
    way = side.writable
    head = bench.offer(side.queue, (DATA, 8, way), (DATA + 8, 8, way), table=TABLE, notify=False)
    bench.driver.rings[side.queue].edit(head, 0, **fields)
    expect_broken(bench, side, fault)
    expect_service(bench, side, features)


def test_indirect_table_that_was_not_negotiated(side):
    bench = side.make()
    bench.start()
    bench.offer(side.queue, (DATA, 8, side.writable), table=TABLE, notify=False)
    expect_broken(bench, side, Fault.INDIRECT_NOT_NEGOTIATED)
    bench.close()


def test_nested_indirect_table(bench, side, features):
    way = side.writable
    bench.offer(side.queue, (DATA, 8, way), (DATA + 8, 8, way), table=TABLE, notify=False)
    entry = bench.memory.read(TABLE, 16)
    flags_at = 14 if features & PACKED else 12
    flags = int.from_bytes(entry[flags_at : flags_at + 2], "little") | INDIRECT_FLAG
    bench.memory.write(TABLE + flags_at, flags.to_bytes(2, "little"))
    expect_broken(bench, side, Fault.INDIRECT_NESTED)


# --- split rings ------------------------------------------------------------------------------------------------


@pytest.fixture
def split(side):
    bench = side.make()
    bench.start(INDIRECT)
    yield bench
    bench.close()


def way(side):
    return WRITE if side.writable else 0


@pytest.mark.parametrize("loop", [1, 3, 16])
def test_chain_that_loops(split, side, loop):
    """virtio 1.2 §2.7.5.2: nothing goes round for ever."""
    ring = split.driver.rings[side.queue]
    for i in range(loop):
        ring.set_descriptor(i, Descriptor(DATA + 16 * i, 16, NEXT | way(side), (i + 1) % loop))
    ring.offer(0)
    ring.publish()
    expect_broken(split, side, Fault.CHAIN_TOO_LONG)
    expect_service(split, side)


def test_loop_inside_an_indirect_table(split, side):
    ring = split.driver.rings[side.queue]
    for i in range(2):
        entry = DATA.to_bytes(8, "little") + (16).to_bytes(4, "little") + bytes([NEXT | way(side), 0, 1 - i, 0])
        split.memory.write(TABLE + 16 * i, entry)
    ring.set_descriptor(0, Descriptor(TABLE, 32, INDIRECT_FLAG))
    ring.offer(0)
    ring.publish()
    expect_broken(split, side, Fault.CHAIN_TOO_LONG)


@pytest.mark.parametrize("following", [16, 0xFFFF])
def test_next_beyond_the_table(split, side, following):
    ring = split.driver.rings[side.queue]
    ring.set_descriptor(0, Descriptor(DATA, 16, NEXT | way(side), following))
    ring.offer(0)
    ring.publish()
    expect_broken(split, side, Fault.NEXT)


@pytest.mark.parametrize("head", [16, 0xFFFF])
def test_head_beyond_the_table(split, side, head):
    split.driver.rings[side.queue].offer(head)
    split.driver.rings[side.queue].publish()
    expect_broken(split, side, Fault.HEAD)
    expect_service(split, side)


@pytest.mark.parametrize("index", [17, 0x8000, 0xFFFF])
def test_available_index_that_jumps(split, side, index):
    """Further ahead than the ring is long, or back."""
    split.driver.rings[side.queue].avail_idx = index
    expect_broken(split, side, Fault.AVAIL_INDEX)
    expect_service(split, side)


def test_same_head_sixteen_times(split, side):
    """It is the driver's own buffer; each time it comes back."""
    ring = split.driver.rings[side.queue]
    ring.set_descriptor(0, Descriptor(DATA, 1, way(side)))
    for _ in range(16):
        ring.offer(0)
    ring.publish()
    if side.make is console:
        split.device.feed(b"0123456789")
    split.driver.notify(side.queue)
    assert ring.used_idx == 16
    assert not split.driver.needs_reset


# --- packed rings -----------------------------------------------------------------------------------------------


@pytest.fixture
def packed(side):
    bench = side.make()
    bench.start(PACKED | INDIRECT)
    yield bench
    bench.close()


def test_buffer_id_beyond_the_ring(packed, side):
    head = packed.offer(side.queue, (DATA, 16, side.writable), notify=False)
    packed.driver.rings[side.queue].edit(head, 0, id=16)
    expect_broken(packed, side, Fault.BUFFER_ID)
    expect_service(packed, side, PACKED)


def test_chain_that_runs_on_into_nothing(packed, side):
    head = packed.offer(side.queue, (DATA, 16, side.writable), notify=False)
    packed.driver.rings[side.queue].edit(head, 0, set_flags=NEXT)
    expect_broken(packed, side, Fault.PACKED_NOT_AVAILABLE)
    expect_service(packed, side, PACKED)


# --- buffers that lie in the way --------------------------------------------------------------------------------


def test_buffers_over_the_rings_harm_the_driver_alone(bench, side):
    """virtio 1.2 says nothing of it: what the device writes there is what the driver has asked for."""
    for gpa in range(bench.driver.rings_gpa, bench.driver.rings_gpa + 0x8000, 0x400):
        if bench.driver.needs_reset or not bench.driver.rings[side.queue].room:
            break
        bench.offer(side.queue, (gpa, 0x400, side.writable))
        if hasattr(bench, "output"):
            bench.output.drain()
    low, high = outside_rings(bench)
    assert not any(low)
    assert not any(high)


# --- lifecycle, with threads ------------------------------------------------------------------------------------


def test_resets_while_requests_are_in_flight(side, features):
    """virtio 1.2 §2.4.1: when the status reads 0, nothing is written to guest memory any more."""
    bench = side.make(QueueWorker)
    stop = threading.Event()
    reader = in_thread(lambda: read_until(bench, stop))
    for _ in range(ROUNDS // 10):
        bench.start(features | RING_RESET)
        if side.make is console and side.writable:
            bench.device.feed(b"x" * 64)
        for i in range(8):
            bench.offer(side.queue, (DATA + 0x1000 * i, 0x1000, side.writable))
        bench.driver.reset()
        before = bench.memory.read(0, RAM)
        assert bench.driver.status == 0
        assert bench.memory.read(0, RAM) == before
        bench.memory.fill(DATA, 0x8000)
    stop.set()
    assert joined(reader)
    bench.close()


def read_until(bench, stop):
    while not stop.wait(0.0005):
        if hasattr(bench, "output"):
            bench.output.drain()


def test_storm_of_notifications_is_survived(side):
    """Of queues that are there and that are not, before and behind everything; the device serves afterwards."""
    bench = side.make(QueueWorker)
    for step in (lambda: None, bench.start, bench.driver.reset, lambda: bench.start(EVENT_IDX)):
        step()
        for index in range(ROUNDS):
            bench.driver.notify(index % 5)
    bench.memory.write(DATA, b"some text")
    bench.offer(side.queue, (DATA, 9, side.writable))
    assert len(bench.wait_for_used(side.queue)) == 1
    bench.close()


def test_rings_of_noise_are_survived(side, features):
    """Any bytes in rings and buffers, any number of times: no exception, no byte outside RAM, and an end."""
    rng = random.Random(f"{side}{features}")
    bench = side.make()
    for _ in range(ROUNDS // 2):
        bench.start(features | (EVENT_IDX if rng.randrange(2) else 0), size=rng.choice([1, 2, 16]))
        for _ in range(rng.randrange(40)):
            gpa = bench.driver.rings_gpa + 0x4000 * side.queue + rng.randrange(0x180)
            bench.memory.write(gpa, rng.randbytes(rng.choice([1, 2, 8])))
        if hasattr(bench, "output"):
            bench.output.drain()
            bench.device.feed(b"x" * rng.randrange(20))
        bench.driver.notify(side.queue)
    expect_service(bench, side)
    bench.close()


def test_workers_end_when_the_other_queue_breaks():
    """One fault breaks the device: nobody goes on to serve the console's other queue."""
    bench = console(QueueWorker)
    bench.start()
    ring = bench.driver.rings[TRANSMITQ]
    ring.offer(0xFFFF)
    ring.publish()
    bench.driver.notify(TRANSMITQ)
    broken = threading.Event()
    waiter = in_thread(lambda: wait_until_broken(bench, broken))
    assert broken.wait(LIMIT)
    assert joined(waiter)
    bench.offer(RECEIVEQ, (DATA, 64, True))
    bench.device.feed(b"typed")
    bench.mmio.close()
    assert bench.memory.read(DATA, 64) == bytes(64)
    bench.close()


def wait_until_broken(bench, broken):
    while not bench.driver.needs_reset:
        bench.driver.notify(TRANSMITQ)
    broken.set()

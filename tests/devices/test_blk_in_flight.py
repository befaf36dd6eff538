"""A block device's requests in flight, each queue in its thread: resets, faults, and an owner who wants quiet."""

import os
import random
import threading

import pytest
from blk_bench import ENGINES, FLUSH, REQUESTS, SECTORS, BlkBench
from mmio_driver import DRIVER_OK, LIMIT, NEEDS_RESET, PACKED, RING_RESET, in_thread, joined, wait_for_config_interrupt

from kvmpy._shim import lib
from kvmpy.devices.block import BlockSettings
from kvmpy.devices.queue_worker import QueueWorker
from kvmpy.devices.virtio_mmio import QUEUE_RESET
from kvmpy.storage.disk import SECTOR_SIZE

CAMPAIGN = 10_000
ROUNDS = CAMPAIGN if os.environ.get("KVMPY_CAMPAIGN") == "1" else CAMPAIGN // 50
IN, OUT = lib.VIRTIO_BLK_T_IN, lib.VIRTIO_BLK_T_OUT


@pytest.fixture(params=ENGINES.values(), ids=ENGINES)
def engine(request):
    """Return the class of an engine."""
    return request.param


@pytest.fixture
def make_bench(engine):
    """Return a function that makes a `BlkBench` with threads; the test's end closes it."""
    benches = []

    def make(image=None, **options):
        benches.append(BlkBench(image, make_engine=engine, make_worker=QueueWorker, **options))
        return benches[-1]

    yield make
    for bench in benches:
        bench.close()


@pytest.fixture
def bench(make_bench):
    """Two queues, live, with the features that tests here need."""
    bench = make_bench(queues=2)
    bench.start(FLUSH | RING_RESET, queues=2)
    return bench


def hold(bench, type=IN, **parts):
    """Return a request that the disk has begun and does not finish until its gate opens."""
    bench.image.gate.clear()
    request = bench.submit(type, **parts)
    assert bench.image.asked.wait(LIMIT)
    return request


def content(bench):
    """Return all of guest memory and of the disk."""
    return bench.memory.read(0, bench.memory.size), bench.image.read()


def reset(bench):
    bench.driver.reset()


def reset_queue(bench):
    bench.driver.set(lib.VIRTIO_MMIO_QUEUE_SEL, 0)
    bench.driver.set(QUEUE_RESET, 1)


def stop_queue(bench):
    bench.driver.set(lib.VIRTIO_MMIO_QUEUE_SEL, 0)
    bench.driver.set(lib.VIRTIO_MMIO_QUEUE_READY, 0)


def fail(bench):
    bench.driver.set_status(lib.VIRTIO_CONFIG_S_FAILED)


@pytest.mark.parametrize("end", [reset, reset_queue, stop_queue, fail])
@pytest.mark.parametrize("type", [IN, OUT])
def test_nothing_changes_after_the_end_of_a_queue(bench, end, type):
    """virtio 1.2 §2.4.1: no byte of guest memory, and none of the disk; whatever waited in the ring stays there."""
    parts = {"data_in": 4096} if type == IN else {"data_out": b"w" * 4096}
    hold(bench, type, sector=8, **parts)
    for slot in range(1, 4):
        bench.submit(type, 8 * slot, slot=slot, **parts)
    returned = threading.Event()
    ending = in_thread(lambda: (end(bench), returned.set()))
    assert not returned.wait(0.05), "it ended while a request was in flight"
    bench.image.gate.set()
    assert joined(ending)
    before = content(bench)
    for fd in bench.mmio.kick_fds:
        os.eventfd_write(fd, 1)
    bench.driver.notify(0)
    if end in (reset_queue, stop_queue):
        # The other queue lives; when it has answered, the first has had its time too.
        bench.submit(lib.VIRTIO_BLK_T_FLUSH, queue=1, slot=5)
        bench.wait_for_used(queue=1)
        start = REQUESTS
        assert bench.memory.read(start, 4 << 16) == before[0][start : start + (4 << 16)]
    else:
        assert content(bench)[0] == before[0]
    assert bench.image.read() == before[1]


def test_request_in_flight_is_completed_by_a_reset_or_never(bench):
    """What the driver finds after a reset is whole: all the data and the status, or nothing of it."""
    request = hold(bench, data_in=4096, sector=4)
    ending = in_thread(bench.driver.reset)
    bench.image.gate.set()
    assert joined(ending)
    data, status = bench.memory.read(request.data_in, 4096), bench.memory.read(request.status, 1)
    done = b"".join(bytes([sector]) * SECTOR_SIZE for sector in range(4, 12))
    assert (data, status) in ((done, b"\0"), (b"\xee" * 4096, b"\xee"))


def test_device_works_again_after_a_reset_in_flight(bench):
    hold(bench, data_in=512)
    ending = in_thread(bench.driver.reset)
    bench.image.gate.set()
    assert joined(ending)
    bench.start(PACKED, size=32)
    request = bench.submit(IN, 7, data_in=512)
    bench.wait_for_used()
    assert bench.memory.read(request.data_in, 513) == bytes([7]) * 512 + b"\0"


def test_closing_waits_for_what_is_in_flight(make_bench):
    bench = make_bench()
    bench.start()
    request = hold(bench, data_in=512)
    closed = threading.Event()
    closing = in_thread(lambda: (bench.mmio.close(), closed.set()))
    assert not closed.wait(0.05)
    bench.image.gate.set()
    assert joined(closing)
    assert bench.memory.read(request.status, 1) in (b"\0", b"\xee")


def test_reset_does_not_wait_for_the_rate_limit(make_bench):
    """A request may have to wait for an hour; the reset that takes it away may not."""
    bench = make_bench(settings=BlockSettings(bps=1))
    bench.start()
    bench.submit(IN, 0, data_in=4096)
    bench.wait_for_used()
    second = bench.submit(IN, 0, data_in=4096, slot=1)
    assert joined(in_thread(bench.driver.reset))
    assert bench.memory.read(second.status, 1) == b"\xee"


def test_fault_on_one_queue_while_another_is_busy(bench):
    """DEVICE_NEEDS_RESET is said at once; the reset then waits for the other queue."""
    hold(bench, data_in=512)
    bench.memory.write(bench.driver.rings[1].setup.driver_area, b"\0\0\xff\xff")  # an index far ahead
    bench.driver.notify(1)
    wait_for_config_interrupt(bench.mmio)
    assert bench.driver.status & (DRIVER_OK | NEEDS_RESET) == DRIVER_OK | NEEDS_RESET
    ending = in_thread(bench.driver.reset)
    bench.image.gate.set()
    assert joined(ending)
    assert bench.driver.status == 0


def test_exclusive_keeps_requests_waiting_and_loses_none(bench):
    """A snapshot or another size: requests wait meanwhile, and then see the disk as it has become."""
    with bench.blk.exclusive():
        cut_off = bench.submit(IN, SECTORS - 1, data_in=512)
        kept = bench.submit(IN, 3, data_in=512, queue=1, slot=1)
        bench.image.resize(SECTORS // 2)
        assert [bench.driver.rings[queue].used() for queue in (0, 1)] == [[], []]
    bench.wait_for_used()
    bench.wait_for_used(queue=1)
    assert bench.memory.read(cut_off.status, 1) == bytes([lib.VIRTIO_BLK_S_IOERR])
    assert bench.memory.read(kept.data_in, 513) == bytes([3]) * 512 + b"\0"


def test_exclusive_waits_for_what_is_in_flight(bench):
    request = hold(bench, data_in=512)
    inside = threading.Event()

    def enter():
        with bench.blk.exclusive():
            inside.set()

    entering = in_thread(enter)
    assert not inside.wait(0.05)
    bench.image.gate.set()
    assert joined(entering)
    bench.wait_for_used()
    assert bench.memory.read(request.status, 1) == b"\0"


def test_storm_of_resets_with_requests_in_flight(make_bench):
    """Another kind of ring and another size each time; reads that are completed are right, and none comes late."""
    bench = make_bench(queues=2)
    rng = random.Random(1)
    for number in range(ROUNDS // 4):
        bench.start(rng.choice((0, PACKED)), queues=2, size=rng.choice((16, 32, 256)))
        slots = [(slot, rng.randrange(2), rng.randrange(SECTORS)) for slot in range(3)]
        requests = [(sector, bench.submit(IN, sector, slot=slot, queue=q, data_in=512)) for slot, q, sector in slots]
        if number % 3 == 0:
            first_queue = slots[0][1]
            bench.wait_for_used(queue=first_queue)
        bench.driver.reset()
        before = bench.memory.read(0, bench.memory.size)
        for sector, request in requests:
            data, status = bench.memory.read(request.data_in, 512), bench.memory.read(request.status, 1)
            assert status == b"\xee" or (status, data) == (b"\0", bytes([sector % 251]) * 512)
        assert bench.memory.read(0, bench.memory.size) == before

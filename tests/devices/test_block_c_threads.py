"""The C engine in threads: waking and stopping, rate limits, keeping requests out, telling the driver in time."""

import os
import random
import select
import threading
import time

import pytest
from engine_rig import FEATURES, PACKED, REQUESTS, TIME_LIMIT, Rig

from kvmpy import MiB
from kvmpy._shim import lib
from kvmpy.conformance.driver import NO_STATUS, SEGMENT
from kvmpy.conformance.image import CHUNK, PatchworkImage, State, pattern
from kvmpy.devices.block_c import CBlock
from kvmpy.devices.virtqueue import Fault
from kvmpy.machine.memory import GuestMemory
from kvmpy.storage.disk import SECTOR_SIZE

IN, OUT, GET_ID = lib.VIRTIO_BLK_T_IN, lib.VIRTIO_BLK_T_OUT, lib.VIRTIO_BLK_T_GET_ID
DISCARD = lib.VIRTIO_BLK_T_DISCARD
OK, IOERR = lib.VIRTIO_BLK_S_OK, lib.VIRTIO_BLK_S_IOERR
OWN, SHARED = State.OWN, State.SHARED
LONG_NS = 3600 * 10**9


def make_rig(chunks=(OWN, OWN), features=FEATURES, **options):
    return Rig(PatchworkImage(chunks), features=features, make_engine=CBlock, **options)


def is_done(rig, request):
    return rig.memory.read(request.status, 1)[0] != NO_STATUS


def is_soon_done(rig, request):
    """Look for 5 ms, in which a worker that may would do it many times."""
    end = time.monotonic_ns() + 5_000_000
    while time.monotonic_ns() < end and not is_done(rig, request):
        pass
    return is_done(rig, request)


def wait_for(what):
    deadline = time.monotonic() + TIME_LIMIT
    while not what():
        assert time.monotonic() < deadline


# --- waking and stopping ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [0, PACKED])
def test_each_kick_wakes(features):
    """Nobody reads the kick eventfd, and each kick is heard all the same; so is what came before the first."""
    with make_rig(features=FEATURES | features) as rig:
        request = rig.submit(IN, 1, data_in=512)
        rig.queue.start()
        for _ in range(200):
            rig.queue.wait_for_interrupt()
            assert rig.queue.answer(request) == (OK, 513, pattern(1))
            request = rig.submit(IN, 1, data_in=512)
            rig.queue.kick()
        rig.queue.wait_for_interrupt()


def test_worker_sleeps_between_kicks():
    """Those that it has heard do not keep it awake, though nobody has read them."""
    with make_rig() as rig:
        rig.submit(GET_ID)
        rig.queue.start()
        for _ in range(3):
            rig.queue.kick()
        rig.queue.wait_for_interrupt()
        start = time.process_time()
        assert not select.select([rig.queue.interrupt.fd], [], [], 0.05)[0]
        assert time.process_time() - start < 0.02


def test_storm_of_kicks_is_one_look():
    """Case 43: kicks without requests cost their writer more than the worker, and hold nothing up."""
    with make_rig() as rig:
        rig.queue.start()
        for _ in range(20_000):
            rig.queue.kick()
        request = rig.submit(IN, data_in=512)
        rig.queue.kick()
        rig.queue.wait_for_interrupt()
        assert rig.queue.answer(request).status == OK


def test_driver_that_kicks_only_when_asked_to_loses_nothing():
    """§2.7.10: the device looks again behind the moment in which it asks for notifications.

    The worker is held where it has found nothing more and interrupts the driver: an eventfd that is full blocks. Then
    something comes, and the driver has been told not to notify.
    """
    with make_rig() as rig:
        interrupt = rig.queue.interrupt
        os.set_blocking(interrupt.fd, True)
        os.eventfd_write(interrupt.fd, 2**64 - 2)
        rig.submit(GET_ID)
        rig.queue.start()
        wait_for(lambda: interrupt.status)
        rig.submit(GET_ID)
        assert rig.memory.read(rig.queue.setup.device_area, 1)[0] == lib.VRING_USED_F_NO_NOTIFY
        interrupt.acknowledge(interrupt.status)
        assert os.eventfd_read(interrupt.fd) == 2**64 - 2
        done = 0
        while done < 2:
            rig.queue.wait_for_interrupt()
            done += len(rig.queue.ring.used())


@pytest.mark.parametrize("spin_ns", [0, LONG_NS], ids=["asleep", "spinning"])
def test_stop_ends_a_waiting_worker(spin_ns):
    with make_rig(spin_ns=spin_ns) as rig:
        rig.submit(GET_ID)
        rig.queue.start()
        rig.queue.wait_for_interrupt()
        rig.queue.queue.stop()
        rig.queue.join()
        assert rig.queue.fault is None


def test_stopped_queue_stays_stopped():
    with make_rig() as rig:
        rig.queue.queue.stop()
        before = rig.memory.read(rig.queue.setup.device_area, 6)
        rig.submit(GET_ID)
        assert rig.queue.queue.serve() is rig.queue.queue.process() is None
        assert rig.memory.read(rig.queue.setup.device_area, 6) == before
        rig.queue.queue.close()
        rig.queue.queue.stop()


def test_spinning_worker_needs_no_kick():
    """While it looks for more, the driver is told not to notify."""
    with make_rig(spin_ns=LONG_NS) as rig:
        rig.submit(GET_ID)
        rig.queue.start()
        for _ in range(20):
            rig.queue.wait_for_interrupt()
            assert rig.memory.read(rig.queue.setup.device_area, 2)[0] == lib.VRING_USED_F_NO_NOTIFY
            assert rig.queue.ring.used()
            rig.submit(GET_ID)
        rig.queue.wait_for_interrupt()


def test_fault_ends_a_worker():
    with make_rig() as rig:
        rig.queue.start()
        rig.queue.ring.offer(0xFFFF)
        rig.queue.ring.publish()
        rig.queue.kick()
        rig.queue.join()
        assert rig.queue.fault is Fault.HEAD


def test_driver_hears_of_completions_before_a_long_batch_ends():
    """A batch of 128 MiB takes many times 50 microseconds. Where this thread is not woken in time it looks again."""
    with make_rig([OWN] * 256, memory=GuestMemory(8 * MiB), size=128) as rig:
        done = []
        while not done or (done[-1] == 128 and len(done) < 10):
            for i in range(128):
                rig.submit(IN, data_in=1 * MiB, table=0x4_0000 + 64 * i)
            batch = threading.Thread(target=rig.queue.queue.process)
            batch.start()
            rig.queue.wait_for_interrupt()
            done.append(len(rig.queue.ring.used()))
            batch.join()
            rig.queue.ring.used()
        assert done[-1] < 128


def test_driver_hears_of_completions_before_the_image_is_asked():
    """That takes its time: it copies, and makes durable."""
    statuses = []
    with make_rig([OWN, SHARED]) as rig:
        rig.image.on_ask = lambda: statuses.append(rig.queue.interrupt.status)
        rig.submit(IN, 0, data_in=512)
        rig.submit(OUT, CHUNK, data_out=bytes(512), gpa=REQUESTS + 4096)
        rig.queue.queue.process()
        assert statuses == [lib.VIRTIO_MMIO_INT_VRING]


# --- rate limits --------------------------------------------------------------------------------------------------


def test_stop_ends_a_wait_for_tokens():
    """What waits stays undone; what was done before is told first. FLUSH and GET_ID pay nothing."""
    with make_rig(iops=1) as rig:
        done = rig.submit(OUT, 0, data_out=b"1" * 512)
        free = rig.submit(GET_ID, gpa=REQUESTS + 4096)
        waiting = rig.submit(OUT, 1, data_out=b"2" * 512, gpa=REQUESTS + 8192)
        rig.queue.start()
        rig.queue.wait_for_interrupt()
        rig.queue.queue.stop()
        rig.queue.join()
        assert [is_done(rig, each) for each in (done, free, waiting)] == [True, True, False]
        assert rig.image.contents()[:1024] == b"1" * 512 + pattern(1)


def test_rate_limit_is_kept():
    """And a request larger than the bucket passes: it holds 10 ms worth."""
    with make_rig([OWN] * 64, bps=10_000_000) as rig:
        start = time.monotonic()
        for _ in range(5):
            assert rig.request(IN, data_in=512 * SECTOR_SIZE).status == OK
        # The first takes what is saved up, and 0.16 s of debt; each later one pays for the one before it.
        assert 4 * 512 * SECTOR_SIZE / 10_000_000 - 0.01 <= time.monotonic() - start < TIME_LIMIT


def test_queues_share_the_limit():
    with make_rig(iops=1) as rig:
        other = rig.open_queue()
        assert rig.request(IN, data_in=512).status == OK
        request = other.submit(IN, data_in=512)
        other.start()
        other.queue.stop()
        other.join()
        assert not is_done(rig, request)


# --- keeping requests out -----------------------------------------------------------------------------------------


def test_exclusive_keeps_requests_out():
    """Inside nothing is executed; behind it, capacity and extents are the image's new ones."""
    with make_rig([OWN] * 4) as rig:
        rig.queue.start()
        with rig.engine.exclusive():
            request = rig.submit(OUT, CHUNK, data_out=bytes(512))
            rig.queue.kick()
            before = rig.image.dump()
            rig.image.resize(CHUNK)
            assert not is_soon_done(rig, request)
        rig.queue.wait_for_interrupt()
        assert rig.queue.answer(request).status == IOERR
        assert rig.image.dump() == before


def test_image_is_not_asked_for_what_is_no_longer_on_the_disk():
    """It has shrunk between the question and its turn."""
    with make_rig([SHARED] * 2) as rig:
        request = rig.submit(OUT, CHUNK, data_out=bytes(512))
        with rig.engine._image_lock:
            rig.queue.start()
            wait_for(lambda: rig.queue.queue._queue.exit.sectors)
            rig.engine._disk.capacity = CHUNK
        rig.queue.wait_for_interrupt()
        assert rig.queue.answer(request).status == IOERR
        assert rig.image.asked == 0


def test_exclusive_waits_for_the_image():
    """While it answers one question it is asked nothing else."""
    asked, go_on, inside = threading.Event(), threading.Event(), threading.Event()
    with make_rig([SHARED] * 4) as rig:

        def wait():
            asked.set()
            assert go_on.wait(TIME_LIMIT)
            assert not inside.is_set()

        def snapshot():
            with rig.engine.exclusive():
                inside.set()

        rig.image.on_ask = wait
        request = rig.submit(OUT, 0, data_out=b"x" * 512)
        rig.queue.start()
        rig.queue.kick()
        assert asked.wait(TIME_LIMIT)
        thread = threading.Thread(target=snapshot)
        thread.start()
        go_on.set()
        assert inside.wait(TIME_LIMIT)
        thread.join()
        rig.queue.wait_for_interrupt()
        assert rig.queue.answer(request).status == OK
        assert rig.image.contents()[:512] == b"x" * 512


def test_other_queues_go_on_while_the_image_copies():
    asked, go_on = threading.Event(), threading.Event()
    with make_rig([OWN, SHARED]) as rig:
        rig.image.on_ask = lambda: asked.set() or go_on.wait(TIME_LIMIT)
        rig.submit(OUT, CHUNK, data_out=bytes(512))
        rig.queue.start()
        assert asked.wait(TIME_LIMIT)
        assert rig.open_queue().request(IN, 0, data_in=512).data == pattern(0)
        go_on.set()
        rig.queue.wait_for_interrupt()


def test_what_two_queues_want_is_asked_once():
    asked, go_on = threading.Event(), threading.Event()
    with make_rig([SHARED] * 2) as rig:
        rig.image.on_ask = lambda: asked.set() or go_on.wait(TIME_LIMIT)
        other = rig.open_queue()
        for queue, sector in ((rig.queue, 0), (other, 1)):
            queue.submit(OUT, sector, data_out=bytes(512))
            queue.start()
            assert asked.wait(TIME_LIMIT)
        wait_for(lambda: other.queue._queue.exit.sectors)
        go_on.set()
        for queue in (rig.queue, other):
            queue.wait_for_interrupt()
        assert rig.image.asked == 1
        assert rig.image.contents()[:1024] == bytes(1024)


def test_no_request_is_executed_while_the_image_zeroes():
    """It gives room back, which it may use for other sectors before it returns."""
    done = []
    with make_rig([OWN, SHARED]) as rig:
        other = rig.open_queue()
        request = other.submit(IN, 0, data_in=512)

        def look():
            other.start()
            done.append(is_soon_done(rig, request))

        rig.image.on_ask = look
        assert rig.request(DISCARD, data_out=SEGMENT.pack(CHUNK, 1, 0)).status == OK
        other.wait_for_interrupt()
        assert done == [False]
        assert is_done(rig, request)


def test_queues_and_changes_at_once():
    """Four workers write their own sectors, mapped piece by piece, while the table is read anew all the time."""
    with make_rig([SHARED] * 16, memory=GuestMemory(8 * MiB)) as rig:
        queues = [rig.queue, *(rig.open_queue() for _ in range(3))]
        model = bytearray(rig.image.contents())
        rng = random.Random(4)

        def drive(queue, index, seed):
            rng = random.Random(seed)
            for _ in range(100):
                sector = rng.randrange(32) * 4 + index
                data = rng.randbytes(512)
                request = queue.submit(OUT, sector, data_out=data)
                queue.kick()
                queue.wait_for_interrupt()
                assert queue.answer(request).status == OK
                model[sector * 512 : sector * 512 + 512] = data

        threads = [threading.Thread(target=drive, args=(queue, i, rng.random())) for i, queue in enumerate(queues)]
        for each in (*queues, *threads):
            each.start()
        while any(thread.is_alive() for thread in threads):
            with rig.engine.exclusive():
                pass
        for thread in threads:
            thread.join()
        assert rig.image.contents() == model
        assert rig.engine.counters().writes == 400
        assert rig.image.is_intact()

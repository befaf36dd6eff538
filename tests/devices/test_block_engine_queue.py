"""A queue being served: kicks and interrupts, faults and stops, durability, several queues at once."""

import os
import threading
from contextlib import suppress

import pytest
from engine_rig import EVENT_IDX, FEATURES, PACKED, TIME_LIMIT

from kvmpy._shim import lib
from kvmpy.conformance.driver import NO_STATUS
from kvmpy.conformance.image import CHUNK, PatchworkImage, State, pattern
from kvmpy.conformance.layout import NEXT, Descriptor
from kvmpy.devices.block import BlockCounters
from kvmpy.devices.virtqueue import Fault

IN, OUT, FLUSH, DISCARD = lib.VIRTIO_BLK_T_IN, lib.VIRTIO_BLK_T_OUT, lib.VIRTIO_BLK_T_FLUSH, lib.VIRTIO_BLK_T_DISCARD
OK, IOERR = lib.VIRTIO_BLK_S_OK, lib.VIRTIO_BLK_S_IOERR
VRING = lib.VIRTIO_MMIO_INT_VRING
SECTOR = bytes(512)


def plain(chunks=4):
    """A disk that is written in place."""
    return PatchworkImage([State.OWN] * chunks)


@pytest.fixture
def rig(make_rig):
    with make_rig(plain()) as rig:
        yield rig


# --- kicks and interrupts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [0, EVENT_IDX, PACKED, PACKED | EVENT_IDX])
def test_each_kick_is_served_and_interrupts(make_rig, features):
    """§2.7.13, §2.7.14: from the notification to the interrupt, in a thread of its own."""
    with make_rig(plain(), features=FEATURES | features, size=4) as rig:
        queue = rig.queue
        queue.start()
        for sector in range(20):
            request = queue.submit(IN, sector, data_in=512)
            queue.kick()
            queue.wait_for_interrupt()
            assert queue.answer(request).data == pattern(sector)
            if features & EVENT_IDX and not features & PACKED:
                queue.ring.used_event = queue.ring.last_used
            if features == PACKED | EVENT_IDX:
                wrap = lib.VRING_PACKED_EVENT_F_WRAP_CTR
                queue.ring.driver_event = (queue.ring.used_slot | queue.ring.used_wrap << wrap, 2)


def test_what_is_there_before_the_first_kick_is_served(rig):
    """A driver may fill the ring before it is looked at."""
    request = rig.submit(IN, 3, data_in=512)
    rig.queue.start()
    rig.queue.wait_for_interrupt()
    assert rig.queue.answer(request).data == pattern(3)


def test_batch_has_one_interrupt(rig):
    """§2.7.7.2; and between chains the driver need not notify, afterwards it must."""
    for i in range(5):
        rig.submit(IN, i, data_in=512, gpa=0x10_0000 + 0x1000 * i)
    assert rig.queue.queue.process() is None
    assert len(rig.queue.ring.used()) == 5
    assert os.eventfd_read(rig.queue.interrupt.fd) == 1
    assert rig.queue.interrupt.status == VRING
    assert rig.queue.ring.used_flags == 0
    assert rig.queue.queue.process() is None
    with pytest.raises(BlockingIOError):
        os.eventfd_read(rig.queue.interrupt.fd)


def test_no_interrupt_that_is_not_wanted(rig):
    rig.queue.ring.avail_flags = lib.VRING_AVAIL_F_NO_INTERRUPT
    assert rig.request(IN, 0, data_in=512).status == OK
    assert rig.queue.interrupt.status == 0


def test_empty_queue_asks_for_notifications(make_rig):
    """Also when there was nothing: the driver of a fresh ring shall know where we are."""
    with make_rig(plain(), features=FEATURES | PACKED | EVENT_IDX) as rig:
        assert rig.queue.queue.process() is None
        assert rig.queue.ring.device_event == (1 << 15, lib.VRING_PACKED_EVENT_FLAG_DESC)


# --- faults and stops -------------------------------------------------------------------------------------------


def break_ring(queue):
    """Make a chain available that loops."""
    queue.ring.set_descriptor(queue.ring.size - 1, Descriptor(0, 16, NEXT, queue.ring.size - 1))
    queue.ring.offer(queue.ring.size - 1)
    queue.ring.publish()


def test_fault_breaks_the_queue_for_ever(rig):
    """What came before it is completed and told; then nothing is, even if the driver repairs its ring."""
    good = rig.submit(IN, 2, data_in=512)
    break_ring(rig.queue)
    rig.submit(IN, 3, data_in=512, gpa=0x18_0000)
    assert rig.queue.queue.process() is Fault.CHAIN_TOO_LONG
    assert rig.queue.answer(good).data == pattern(2)
    assert rig.queue.ring.used_idx == 1
    assert rig.queue.interrupt.status == VRING
    assert rig.queue.ring.used_flags == lib.VRING_USED_F_NO_NOTIFY, "notifications are left as they were"
    rig.queue.ring.set_descriptor(rig.queue.ring.size - 1, Descriptor(0, 16, 0, 0))
    assert rig.queue.queue.process() is Fault.CHAIN_TOO_LONG
    assert rig.queue.queue.serve() is Fault.CHAIN_TOO_LONG
    assert rig.queue.ring.used_idx == 1


def test_serve_returns_the_fault(rig):
    rig.queue.start()
    break_ring(rig.queue)
    rig.queue.kick()
    rig.queue.join()
    assert rig.queue.fault is Fault.CHAIN_TOO_LONG


def test_broken_queue_leaves_its_neighbours_alone(rig):
    other = rig.open_queue()
    break_ring(rig.queue)
    assert rig.queue.queue.process() is Fault.CHAIN_TOO_LONG
    assert other.request(IN, 5, data_in=512).data == pattern(5)


def test_stop_ends_serve_and_stays(rig):
    rig.queue.start()
    rig.queue.queue.stop()
    rig.queue.join()
    assert rig.queue.fault is None
    rig.submit(IN, 0, data_in=512)
    before = rig.memory.read(0, rig.memory.size)
    assert rig.queue.queue.process() is None
    assert rig.queue.queue.serve() is None
    assert rig.memory.read(0, rig.memory.size) == before, "a stopped queue touches no guest memory"


def test_stop_between_two_chains(make_rig):
    """One that is being executed may be completed, the next is not begun."""
    with make_rig(PatchworkImage([State.SHARED] * 4)) as rig:
        rig.submit(OUT, 0, data_out=SECTOR)
        second = rig.submit(OUT, CHUNK, data_out=SECTOR, gpa=0x18_0000)
        rig.image.on_ask = rig.queue.queue.stop
        assert rig.queue.queue.process() is None
        assert rig.image.asked == 1
        assert rig.memory.read(second.status, 1)[0] == NO_STATUS
        assert rig.queue.ring.used_flags == lib.VRING_USED_F_NO_NOTIFY, "notifications are left as they were"


def test_closing_gives_back_every_descriptor(make_rig):
    before = len(os.listdir("/proc/self/fd"))
    with make_rig(plain()) as rig:
        rig.open_queue()
        rig.request(IN, 0, data_in=512)
    assert len(os.listdir("/proc/self/fd")) == before


def test_closing_twice_is_harmless(rig):
    for _ in range(2):
        rig.queue.queue.close()
        rig.engine.close()
    rig.queues.clear()


# --- one disk, several hands ------------------------------------------------------------------------------------


def test_exclusive_keeps_requests_out(make_rig):
    with make_rig(PatchworkImage([State.SHARED])) as rig:
        asked = threading.Event()
        rig.image.on_ask = asked.set
        rig.submit(OUT, data_out=SECTOR)
        with rig.engine.exclusive():
            rig.queue.start()
            assert not asked.wait(0.05)
        assert asked.wait(TIME_LIMIT)


def test_exclusive_waits_for_the_request_that_is_being_executed(make_rig):
    with make_rig(PatchworkImage([State.SHARED])) as rig:
        asked, go_on, inside = threading.Event(), threading.Event(), threading.Event()

        def ask():
            asked.set()
            assert go_on.wait(TIME_LIMIT)

        def change():
            with rig.engine.exclusive():
                inside.set()

        rig.image.on_ask = ask
        rig.submit(OUT, data_out=SECTOR)
        rig.queue.start()
        assert asked.wait(TIME_LIMIT)
        changer = threading.Thread(target=change)
        changer.start()
        assert not inside.wait(0.05)
        go_on.set()
        assert inside.wait(TIME_LIMIT)
        changer.join()


def test_exclusive_takes_capacity_and_extents_anew(make_rig):
    """At its end, also when it ended by an error."""
    with make_rig(PatchworkImage([State.OWN, State.SHARED])) as rig:
        with suppress(KeyError), rig.engine.exclusive():
            rig.image.resize(9)
            rig.image.map(CHUNK, 1, write=True)
            raise KeyError
        assert rig.request(IN, 8, data_in=1024).status == IOERR
        before = rig.image.asked
        assert rig.request(OUT, 8, data_out=SECTOR).status == OK
        assert rig.image.asked == before


def test_queues_at_once_do_not_mix_up_their_data(make_rig):
    """Several threads on one disk of shared chunks: each writes and reads back what is its own."""
    with make_rig(PatchworkImage([State.SHARED] * 16)) as rig:
        queues = [rig.queue, *(rig.open_queue(features=FEATURES | kind) for kind in (PACKED, EVENT_IDX))]
        wrong = []

        def use(queue, seed):
            for i in range(40):
                sector = (i * 3 + seed) % 127 // 3 * 3 + seed
                data = bytes([seed * 40 + i]) * 512
                written = queue.request(OUT, sector, data_out=data)
                read = queue.request(IN, sector, data_in=512)
                if (written.status, read.data) != (OK, data):
                    wrong.append((seed, sector))

        threads = [threading.Thread(target=use, args=(queue, seed)) for seed, queue in enumerate(queues)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(TIME_LIMIT)
        assert wrong == []
        assert rig.engine.counters().writes == rig.engine.counters().reads == 120
        assert rig.image.is_intact()


def test_counters(rig):
    """Completed requests by type, whatever their status; bytes of those that were done."""
    rig.request(IN, 0, data_in=1024)
    rig.request(IN, 2**40, data_in=512)
    rig.request(OUT, 0, data_out=SECTOR)
    rig.request(OUT, 0, data_out=SECTOR, data_in=1)
    rig.request(FLUSH)
    rig.request(FLUSH, 1)
    rig.request(lib.VIRTIO_BLK_T_GET_ID, data_in=20)
    rig.request(77)
    rig.open_queue().request(IN, 0, data_in=512)
    expected = BlockCounters(reads=3, writes=2, flushes=2, others=2, errors=4, bytes_read=1536, bytes_written=512)
    assert rig.engine.counters() == expected

"""Rate limits of a disk: who pays, how much passes, and that nothing waits that need not."""

import os
import time

from engine_rig import TIME_LIMIT

from kvmpy._shim import lib
from kvmpy.conformance.driver import NO_STATUS, SEGMENT
from kvmpy.conformance.image import PatchworkImage, State

IN, FLUSH, DISCARD = lib.VIRTIO_BLK_T_IN, lib.VIRTIO_BLK_T_FLUSH, lib.VIRTIO_BLK_T_DISCARD
OK, IOERR = lib.VIRTIO_BLK_S_OK, lib.VIRTIO_BLK_S_IOERR
VRING = lib.VIRTIO_MMIO_INT_VRING


def plain():
    """A disk that is written in place."""
    return PatchworkImage([State.OWN] * 4)


def test_iops_are_kept(make_rig):
    """1 token a request; 10 ms worth at once, or twice that where they were not spent before."""
    with make_rig(plain(), size=256, iops=1000) as rig:
        for i in range(120):
            rig.submit(IN, i % 32, data_in=512, gpa=0x10_0000 + 0x800 * i, readable=[16], writable=[513])
        start = time.monotonic()
        assert rig.queue.queue.process() is None
        elapsed = time.monotonic() - start
        assert len(rig.queue.ring.used()) == 120
        assert (120 - 22) / 1000 <= elapsed < TIME_LIMIT / 5


def test_only_data_pays_and_only_where_it_moves(make_rig):
    """FLUSH, GET_ID and what is refused are free; DISCARD is a request without bytes."""
    with make_rig(plain(), iops=1, bps=1) as rig:
        start = time.monotonic()
        for _ in range(20):
            assert rig.request(FLUSH).status == OK
            assert rig.request(lib.VIRTIO_BLK_T_GET_ID, data_in=20).status == OK
            assert rig.request(IN, 2**40, data_in=512).status == IOERR
        assert rig.request(DISCARD, data_out=SEGMENT.pack(0, 1, 0)).status == OK
        assert time.monotonic() - start < TIME_LIMIT / 2


def test_request_larger_than_the_bucket_passes_and_the_next_one_waits(make_rig):
    """Case 58: it must not block for ever. Then stopping does not wait for the years that the debt takes."""
    with make_rig(plain(), bps=1) as rig:
        answer = rig.request(IN, data_in=32 * 512)
        assert answer.status == OK
        rig.queue.start()
        flushed, waiting = rig.submit(FLUSH), rig.submit(IN, data_in=512, gpa=0x18_0000)
        rig.queue.interrupt.acknowledge(VRING)
        os.eventfd_read(rig.queue.interrupt.fd)
        rig.queue.kick()
        rig.queue.wait_for_interrupt()
        assert rig.memory.read(flushed.status, 1)[0] == OK, "what is done is told before the wait"
        rig.queue.queue.stop()
        rig.queue.join()
        assert rig.memory.read(waiting.status, 1)[0] == NO_STATUS
        assert rig.queue.ring.used_idx == 2


def test_queues_share_the_limit_and_a_waiting_one_does_not_block_the_other(make_rig):
    with make_rig(plain(), bps=1) as rig:
        other = rig.open_queue()
        assert rig.request(IN, data_in=512).status == OK
        rig.submit(IN, data_in=512)
        rig.queue.start()
        assert other.request(FLUSH).status == OK
        with rig.engine.exclusive():
            pass

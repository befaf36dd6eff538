"""The virtio console: what is fed reaches the driver's buffers, what the driver sends reaches the host, all of it."""

import os
import threading

import pytest
from console_bench import ConsoleBench
from mmio_driver import LIMIT, VERSION_1, in_thread, joined, wait_for_config_interrupt
from virtio_bench import DATA, EVENT_IDX, INDIRECT, KINDS, PACKED, RING_RESET

from kvmpy._shim import lib
from kvmpy.devices.queue_worker import QueueWorker
from kvmpy.devices.virtio_console import EMERG_WR, RECEIVEQ, TRANSMITQ
from kvmpy.devices.virtio_device import feature_bits
from kvmpy.units import KiB

CONFIG = lib.VIRTIO_MMIO_CONFIG
CONSOLE_FEATURES = feature_bits(0, 2)
"""VIRTIO_CONSOLE_F_SIZE, VIRTIO_CONSOLE_F_EMERG_WRITE (virtio 1.2 §5.3.3)."""
TABLE = 0x8000


@pytest.fixture
def bench():
    bench = ConsoleBench()
    yield bench
    bench.close()


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def live(bench, request):
    """A device with rings of either kind."""
    bench.start(request.param | INDIRECT)
    return bench


@pytest.fixture
def threaded():
    """With a thread for each queue, and a ring of 16 bytes to the host."""
    bench = ConsoleBench(capacity=16, make_worker=QueueWorker)
    bench.start()
    yield bench
    bench.close()


def test_device_is_a_console_with_one_port(bench):
    """virtio 1.2 §5.3.1: device id 3; §5.3.2: receiveq 0, transmitq 1; §5.3.3: MULTIPORT is not offered."""
    assert bench.driver.get(lib.VIRTIO_MMIO_DEVICE_ID) == 3
    ring_features = VERSION_1 | PACKED | RING_RESET | INDIRECT | EVENT_IDX
    assert bench.driver.offered() == ring_features | CONSOLE_FEATURES
    for index, size in ((RECEIVEQ, 256), (TRANSMITQ, 256), (2, 0)):
        bench.driver.set(lib.VIRTIO_MMIO_QUEUE_SEL, index)
        assert bench.driver.get(lib.VIRTIO_MMIO_QUEUE_NUM_MAX) == size


# --- from the guest ---------------------------------------------------------------------------------------------


def test_what_the_guest_sends_comes_out(live):
    """virtio 1.2 §5.3.6: characters placed in the transmitq; the device writes nothing into the buffer."""
    live.send(b"hello, ")
    live.send(b"wor", b"", b"ld", table=TABLE)
    assert live.output.drain() == b"hello, world"
    assert live.used(TRANSMITQ) == [0, 0]


def test_buffers_to_be_written_are_not_touched_in_the_transmitq(live):
    live.memory.write(DATA, b"abc")
    live.offer(TRANSMITQ, (DATA, 2, False), (DATA + 2, 1, True))
    live.offer(TRANSMITQ, (DATA, 3, True))
    assert (live.output.drain(), live.used(TRANSMITQ)) == (b"ab", [0, 0])
    assert live.memory.read(DATA, 3) == b"abc"


def test_output_waits_for_room_and_loses_nothing(threaded):
    """The host reads slowly, 16 bytes at a time: the buffer comes back when all of it is on its way."""
    text = bytes(range(200))
    threaded.send(text)
    got = b""
    while len(got) < len(text):
        got += threaded.output.drain()
    assert got == text
    assert threaded.wait_for_used(TRANSMITQ) == [0]


def test_chains_that_are_done_are_told_before_the_device_waits_for_room(threaded):
    """Otherwise a driver that wants its first buffer back would wait for a host that reads nothing."""
    threaded.send(b"0123456789", notify=False)
    threaded.send(b"abcdefghij", gpa=DATA + 16)
    assert threaded.wait_for_used(TRANSMITQ) == [0]
    assert threaded.output.drain() == b"0123456789"
    assert threaded.wait_for_used(TRANSMITQ) == [0]
    assert threaded.output.drain() == b"abcdefghij"


def test_what_is_available_when_the_device_is_closed_is_printed():
    """A guest may end itself right behind its last words: no thread need have seen them yet."""
    for _ in range(50):
        bench = ConsoleBench(make_worker=QueueWorker)
        bench.start()
        bench.send(b"last ", notify=False)
        bench.send(b"words", gpa=DATA + 8)
        bench.mmio.close()
        assert bench.output.drain() == b"last words"
        bench.close()


def test_close_does_not_wait_for_a_host_that_does_not_read(threaded):
    """Of what has no room the rest is gone: nobody would take it."""
    threaded.send(b"0123456789", b"abcdefghij")
    threaded.send(b"more", gpa=DATA + 64)
    assert joined(in_thread(threaded.mmio.close))
    assert threaded.output.drain() == b"0123456789"
    bench = ConsoleBench(capacity=16, make_worker=QueueWorker)
    bench.start()
    bench.send(b"0123456789", notify=False)
    bench.send(b"abcdefghij", gpa=DATA + 64)
    assert joined(in_thread(bench.mmio.close))
    assert bench.output.drain() == b"0123456789"
    bench.close()


def test_reset_ends_output_that_waits_for_room(threaded):
    """virtio 1.2 §2.4.1: when the status reads 0, no buffer is the device's any more."""
    threaded.send(b"x" * 1000)
    assert joined(in_thread(threaded.driver.reset))
    assert threaded.driver.status == 0
    threaded.output.drain()
    threaded.start()
    threaded.send(b"again")
    assert threaded.wait_for_used(TRANSMITQ) == [0]
    assert threaded.output.drain() == b"again"


def test_huge_chain_can_be_stopped(threaded):
    """The same MiB, sixteen times in a chain, and nobody who reads: no copy of that size, and no wait."""
    threaded.offer(TRANSMITQ, *[(DATA, 1000 * KiB, False)] * 16)
    assert joined(in_thread(threaded.mmio.close))


# --- emergency writes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"!", b"!\0", b"!\xff\xff\xff", b"!" + bytes(7)])
def test_emergency_write_needs_no_driver(bench, data):
    """virtio 1.2 §5.3.4: without initializing the device, or even acknowledging the feature; the lower byte."""
    bench.mmio.write(CONFIG + EMERG_WR, data)
    assert bench.output.drain() == b"!"
    assert bench.mmio.read(CONFIG + EMERG_WR, 4) == bytes(4)


def test_emergency_writes_into_a_full_ring_are_counted():
    bench = ConsoleBench(capacity=16)
    for _ in range(20):
        bench.mmio.write(CONFIG + EMERG_WR, b"!\0\0\0")
    assert (bench.output.drain(), bench.device.lost) == (b"!" * 16, 4)
    bench.close()


def test_other_fields_cannot_be_written(bench):
    before = bench.mmio.read(CONFIG, 16)
    for offset in (0, 1, 2, 4, 7, 9, 11, 12, 0xEFF):
        bench.mmio.write(CONFIG + offset, b"\xff")
    assert bench.mmio.read(CONFIG, 16) == before
    assert bench.output.drain() == b""


# --- to the guest -----------------------------------------------------------------------------------------------


def test_input_goes_into_the_drivers_buffers(live):
    """virtio 1.2 §5.3.6: the driver populates the receiveq with empty buffers."""
    live.offer(RECEIVEQ, (DATA, 64, True))
    live.offer(RECEIVEQ, (DATA + 64, 64, True))
    assert live.used(RECEIVEQ) == []
    live.feed(b"ls\n")
    assert (live.used(RECEIVEQ), live.device.pending) == ([3], 0)
    live.feed(b"pwd\n")
    assert live.used(RECEIVEQ) == [4]
    assert live.memory.read(DATA, 4) == b"ls\n\0"
    assert live.memory.read(DATA + 64, 5) == b"pwd\n\0"


def test_input_waits_for_buffers(live):
    live.feed(b"abcdefgh")
    assert live.device.pending == 8
    live.offer(RECEIVEQ, (DATA, 2, True), (DATA + 2, 1, True))
    assert (live.used(RECEIVEQ), live.device.pending) == ([3], 5)
    live.offer(RECEIVEQ, (DATA + 8, 64, True))
    assert (live.used(RECEIVEQ), live.device.pending) == ([5], 0)
    assert live.memory.read(DATA, 16) == b"abc\0\0\0\0\0defgh\0\0\0"


def test_input_from_before_the_driver_is_not_lost(bench):
    """Also over a reset: who typed ahead typed for whoever listens next."""
    bench.device.feed(b"early")
    bench.start()
    bench.driver.reset()
    bench.start()
    bench.offer(RECEIVEQ, (DATA, 64, True))
    assert bench.used(RECEIVEQ) == [5]


def test_chain_without_room_takes_no_input(live):
    """An empty buffer, or one to be read, comes back with nothing; the next one gets all."""
    live.device.feed(b"abc")
    live.offer(RECEIVEQ, (DATA, 0, True))
    live.offer(RECEIVEQ, (DATA, 64, False))
    live.offer(RECEIVEQ, (DATA, 64, True))
    assert live.used(RECEIVEQ) == [0, 0, 3]


def test_drained_is_told_when_all_input_has_gone(live):
    """Once for each time, and never while some waits: whoever reads a file for the guest reads on then."""
    told = []
    live.device.on_drained = lambda: told.append(live.device.pending)
    live.offer(RECEIVEQ, (DATA, 2, True))
    live.feed(b"abc")
    assert told == []
    live.offer(RECEIVEQ, (DATA, 2, True))
    assert told == [0]
    live.offer(RECEIVEQ, (DATA, 2, True))
    assert told == [0]


def test_feeding_wakes_the_thread_of_the_queue(threaded):
    drained = threading.Event()
    threaded.device.on_drained = drained.set
    threaded.offer(RECEIVEQ, (DATA, 64, True))
    threaded.device.feed(b"typed")
    assert threaded.wait_for_used(RECEIVEQ) == [5]
    assert drained.wait(LIMIT)


def test_closed_console_reaches_no_stranger(bench):
    """Its descriptors may be somebody else's by then: when it is fed, and when what it sent is read."""
    bench.start()
    bench.send(b"abc")
    bench.mmio.close()
    bench.device.feed(b"abc")
    bench.device.close()
    others = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(8)]
    bench.device.feed(b"abc")
    assert (bench.device.pending, bench.output.drain()) == (6, b"abc")
    for fd in others:
        with pytest.raises(BlockingIOError):
            os.eventfd_read(fd)
        os.close(fd)


# --- size -------------------------------------------------------------------------------------------------------


def test_driver_hears_of_another_size(bench):
    """virtio 1.2 §5.3.4: cols and rows; §2.5.2: a configuration change interrupt, and another generation."""
    assert bench.mmio.read(CONFIG, 4) == b"\x50\0\x18\0"
    bench.device.resize(132, 43)
    assert bench.mmio.interrupt.status == 0
    bench.start()
    generation = bench.driver.get(lib.VIRTIO_MMIO_CONFIG_GENERATION)
    bench.device.resize(100, 50)
    wait_for_config_interrupt(bench.mmio)
    assert bench.mmio.read(CONFIG, 4) == b"\x64\0\x32\0"
    assert bench.driver.get(lib.VIRTIO_MMIO_CONFIG_GENERATION) == generation + 1
    bench.mmio.interrupt.acknowledge(2)
    bench.device.resize(100, 50)
    assert bench.mmio.interrupt.status == 0


@pytest.mark.parametrize("size", [(-1, 24), (80, -1), (65536, 24), (80, 65536)])
def test_size_beyond_the_field_is_refused(bench, size):
    with pytest.raises(ValueError, match="0 to 65535"):
        bench.device.resize(*size)


def test_nothing_stays_open():
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        bench = ConsoleBench(make_worker=QueueWorker)
        bench.start()
        bench.driver.reset()
        bench.start()
        bench.close()
    assert len(os.listdir("/proc/self/fd")) == before

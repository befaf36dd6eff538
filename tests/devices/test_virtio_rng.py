"""The entropy device: random bytes into a driver's buffers, and nothing else anywhere."""

import os

import pytest
from mmio_driver import VERSION_1
from virtio_bench import DATA, EVENT_IDX, INDIRECT, KINDS, PACKED, RING_RESET, VirtioBench

from kvmpy._shim import lib
from kvmpy.devices.queue_worker import QueueWorker
from kvmpy.devices.virtio_rng import FILLED_MAX, VirtioRng
from kvmpy.units import KiB, MiB

TABLE = 0x8000


class Source:
    """The bytes 1, 2, ... 255, 1, ...: memory holds none of them before. ``asked``: how many each time."""

    def __init__(self):
        self.given = 0
        self.asked = []

    def __call__(self, size):
        self.asked.append(size)
        data = bytes((self.given + i) % 255 + 1 for i in range(size))
        self.given += size
        return data


@pytest.fixture
def source():
    return Source()


@pytest.fixture
def bench(source):
    bench = VirtioBench(lambda memory: VirtioRng(memory, source))
    yield bench
    bench.close()


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def live(bench, request):
    """A device with rings of either kind."""
    bench.start(request.param | INDIRECT)
    return bench


def test_device_is_an_entropy_source_with_one_queue(bench):
    """virtio 1.2 §5.4.1: device id 4; §5.4.3: no feature bits of its own; §5.4.4: no configuration."""
    assert bench.driver.get(lib.VIRTIO_MMIO_DEVICE_ID) == 4
    assert bench.driver.offered() == VERSION_1 | PACKED | RING_RESET | INDIRECT | EVENT_IDX
    bench.driver.set(lib.VIRTIO_MMIO_QUEUE_SEL, 1)
    assert bench.driver.get(lib.VIRTIO_MMIO_QUEUE_NUM_MAX) == 0
    bench.mmio.write(lib.VIRTIO_MMIO_CONFIG, b"\xff" * 8)
    assert bench.mmio.read(lib.VIRTIO_MMIO_CONFIG, 8) == bytes(8)


def test_buffer_is_filled(live):
    """virtio 1.2 §5.4.6.2: one or more random bytes."""
    live.offer(0, (DATA, 64, True))
    assert live.used(0) == [64]
    assert live.memory.read(DATA - 1, 66) == bytes([0, *range(1, 65), 0])


def test_pieces_of_a_chain_are_filled_one_after_the_other(live):
    live.offer(0, (DATA, 3, True), (DATA + 0x100, 0, True), (DATA + 0x200, 5, True))
    assert live.used(0) == [8]
    assert live.memory.read(DATA, 4) == b"\1\2\3\0"
    assert live.memory.read(DATA + 0x200, 6) == b"\4\5\6\7\10\0"


def test_indirect_table_is_filled(live):
    live.offer(0, (DATA, 3, True), (DATA + 3, 4, True), table=TABLE)
    assert live.used(0) == [7]
    assert live.memory.read(DATA, 8) == b"\1\2\3\4\5\6\7\0"


def test_long_buffer_gets_its_first_4_kib(live, source):
    """virtio 1.2 §5.4.6.2: the device MAY use less than the entire buffer; so no guest makes the host fill a GiB."""
    live.offer(0, (DATA, 512 * KiB, True))
    assert live.used(0) == [FILLED_MAX]
    assert live.memory.read(DATA + FILLED_MAX - 1, 2) == bytes([(FILLED_MAX - 1) % 255 + 1, 0])
    assert source.asked == [FILLED_MAX]


def test_full_ring_costs_a_mib_at_most(bench, source):
    """A notification is bounded, however much room the guest offers: the same buffer 256 times."""
    bench.start(size=256)
    for _ in range(256):
        bench.offer(0, (DATA, 1 * MiB, True), notify=False)
    bench.driver.notify(0)
    assert bench.used(0) == [FILLED_MAX] * 256
    assert sum(source.asked) == 1 * MiB


def test_what_is_given_to_be_read_is_not_looked_at(live):
    """virtio 1.2 §5.4.6.1: the driver MUST NOT place device-readable buffers into the queue."""
    live.memory.write(DATA, b"secret")
    live.offer(0, (DATA, 6, False), (DATA + 0x100, 4, True))
    live.offer(0, (DATA, 6, False))
    live.offer(0, (DATA, 0, True))
    assert live.used(0) == [4, 0, 0]
    assert live.memory.read(DATA, 7) == b"secret\0"
    assert live.memory.read(DATA + 0x100, 5) == b"\1\2\3\4\0"


def test_random_bytes_are_the_hosts():
    bench = VirtioBench(VirtioRng)
    bench.start()
    bench.offer(0, (DATA, 4096, True))
    data = bench.memory.read(DATA, 4096)
    assert len(set(data)) > 200
    bench.offer(0, (DATA, 4096, True))
    assert bench.memory.read(DATA, 4096) != data
    bench.close()


def test_thread_serves_and_interrupts():
    """virtio 1.2 §2.7.13: from the notification to the interrupt, in a thread of its own."""
    bench = VirtioBench(VirtioRng, QueueWorker)
    bench.start()
    for _ in range(20):
        bench.offer(0, (DATA, 64, True))
        assert bench.wait_for_used(0) == [64]
    bench.close()


def test_source_that_fails_is_reported_and_the_device_needs_a_reset(bench, monkeypatch):
    """A defect of the host's is not the guest's: the PC hears of it."""

    def fail(size):
        raise OSError("no randomness")

    bench.start()
    monkeypatch.setattr(bench.device, "_random", fail)
    bench.offer(0, (DATA, 64, True))
    assert [str(error) for error in bench.errors] == ["no randomness"]
    assert bench.driver.needs_reset
    bench.errors.clear()


def test_nothing_stays_open():
    before = len(os.listdir("/proc/self/fd"))
    bench = VirtioBench(VirtioRng, QueueWorker)
    bench.start()
    bench.close()
    assert len(os.listdir("/proc/self/fd")) == before

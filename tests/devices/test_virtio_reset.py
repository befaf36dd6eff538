"""The ends of a virtio device's queues: reset, queue reset, FAILED; what is in flight, and who waits for whom."""

import os
import random
import threading

import pytest
from mmio_driver import (
    ACKNOWLEDGE,
    DRIVER,
    FAILED,
    FAULT,
    FEATURES_OK,
    LIMIT,
    LIVE,
    NEEDS_RESET,
    PACKED,
    RING_RESET,
    ROUNDS,
    VERSION_1,
    WAIT,
    Bench,
    in_thread,
    joined,
)

from kvmpy._shim import lib
from kvmpy.devices.queue_worker import InlineWorker, QueueWorker
from kvmpy.devices.virtio_mmio import QUEUE_RESET


def end_by(way, driver):
    """End queue 0 in one of the ways that promise to drain it."""
    match way:
        case "reset":
            driver.status = 0
        case "FAILED":
            driver.status = FAILED
        case "QueueReady":
            driver.stop_queue(0)
        case "QueueReset":
            driver.reset_queue(0)
        case "close":
            driver.mmio.close()


@pytest.mark.parametrize("way", ["reset", "FAILED", "QueueReady", "QueueReset", "close"])
def test_nothing_is_written_after_a_queue_ended(threaded, way):
    """virtio 1.2 §2.4.1, §4.2.2.1: what is in flight ends first; then guest memory is the driver's alone."""
    driver = threaded.driver
    driver.order(0, WAIT)
    driver.start(VERSION_1 | RING_RESET, queues=(0,))
    assert threaded.device.entered.wait(LIMIT)
    returned = threading.Event()
    ending = in_thread(lambda: (end_by(way, driver), returned.set()))
    assert not returned.wait(0.05), "the queue ended while a request was in flight"
    if way == "reset":
        assert driver.status == LIVE, "a reset is complete when the status reads 0, not before"
    if way == "QueueReset":
        assert driver.read(QUEUE_RESET) == 1
    threaded.device.gate.set()
    assert joined(ending)
    memory = driver.memory.read(0, driver.memory.size)
    assert driver.count(0) == 1, "the request in flight was completed"
    for fd in threaded.mmio.kick_fds:
        if way != "close":
            os.eventfd_write(fd, 1)
    assert threaded.device.opened[0].closed
    assert driver.memory.read(0, driver.memory.size) == memory


def test_reset_that_does_not_wait_would_be_seen():
    """The planted defect: a worker that is not waited for writes to memory that is the driver's again."""
    workers = []

    class Impatient(QueueWorker):
        def join(self):
            workers.append(super().join)

    bench = Bench(Impatient)
    bench.driver.order(0, WAIT)
    bench.driver.start(queues=(0,))
    assert bench.device.entered.wait(LIMIT)
    bench.driver.status = 0
    assert (bench.driver.status, bench.driver.count(0)) == (0, 0)
    bench.device.gate.set()
    workers[0]()
    assert bench.driver.count(0) == 1
    bench.close()


def test_vcpus_that_write_wait_for_a_reset_under_way(threaded):
    """Otherwise one could start the device anew while its old queues still end. Reading never waits."""
    driver = threaded.driver
    driver.order(0, WAIT)
    driver.start(queues=(0,))
    assert threaded.device.entered.wait(LIMIT)
    first, second = threading.Event(), threading.Event()
    ending = [in_thread(lambda: (driver.write(lib.VIRTIO_MMIO_STATUS, 0), first.set()))]
    assert threaded.device.told_to_stop.wait(LIMIT), "the reset is under way"
    ending.append(in_thread(lambda: (driver.write(lib.VIRTIO_MMIO_STATUS, ACKNOWLEDGE), second.set())))
    assert not second.wait(0.05)
    assert not first.is_set()
    assert driver.status == LIVE
    threaded.device.gate.set()
    assert all(joined(thread) for thread in ending)
    assert driver.status == ACKNOWLEDGE


def test_reset_puts_all_back(bench, driver):
    driver.start(VERSION_1 | RING_RESET)
    driver.write(lib.VIRTIO_MMIO_DEVICE_FEATURES_SEL, 1)
    driver.status = 0
    registers = [driver.read(register) for register in range(0, 0x100, 4)]
    fresh = Bench(InlineWorker)
    assert registers == [fresh.driver.read(register) for register in range(0, 0x100, 4)]
    fresh.close()
    assert bench.device.negotiated == [0, VERSION_1 | RING_RESET, 0]
    driver.status = ACKNOWLEDGE | DRIVER | FEATURES_OK
    assert driver.status == ACKNOWLEDGE | DRIVER, "the driver's features are forgotten"


def test_device_begins_again_with_another_size_and_other_rings(bench, driver):
    driver.start(size=8)
    driver.start(VERSION_1 | PACKED, size=5, queues=(1,))
    driver.start(size=256)
    setups = [queue.setup for queue in bench.device.opened]
    assert [setup.size for setup in setups] == [8, 8, 5, 256, 256]
    assert [setup.has(lib.VIRTIO_F_RING_PACKED) for setup in setups] == [False, False, True, False, False]


def test_reset_waits_for_a_worker_that_reports_a_fault():
    """The worker wants the status while the reset waits for the worker: neither may hold what the other needs."""
    for _ in range(ROUNDS // 10):
        bench = Bench(QueueWorker)
        bench.driver.order(0, FAULT)
        bench.driver.order(1, FAULT)
        bench.driver.negotiate()
        bench.driver.set_queue(0)
        bench.driver.set_queue(1)

        def start_and_reset(driver=bench.driver):
            driver.status = LIVE
            driver.status = 0

        assert joined(in_thread(start_and_reset))
        assert (bench.driver.status, bench.driver.acknowledge()) == (0, 0)
        bench.close()


def test_storm_of_resets_leaves_nothing_behind(threaded):
    descriptors, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(ROUNDS // 4):
        threaded.driver.start()
        threaded.driver.kick(0)
        threaded.driver.status = 0
    assert all(queue.closed for queue in threaded.device.opened)
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == (descriptors, threads)


def test_resets_from_many_vcpus_at_once(threaded):
    """Each vCPU starts, kicks and resets as it likes: nothing hangs, and the device works afterwards."""
    start = threading.Barrier(3)

    def drive(seed):
        rng = random.Random(seed)
        start.wait()
        for _ in range(ROUNDS // 4):
            driver = threaded.driver
            match rng.randrange(4):
                case 0:
                    driver.status = 0
                case 1:
                    driver.kick(rng.randrange(3))
                case 2:
                    driver.negotiate()
                    driver.set_queue(rng.randrange(2))
                    driver.status = LIVE
                case 3:
                    driver.status = FAILED

    assert all(joined(thread) for thread in [in_thread(lambda seed=seed: drive(seed)) for seed in range(3)])
    threaded.driver.start()
    threaded.wait_for_count(0, 1)
    assert threaded.errors == []


# --- queue reset ------------------------------------------------------------------------------------------------


def test_queue_is_reset_alone_and_comes_back(bench, driver):
    """virtio 1.2 §2.6.1: the other queues live on; the queue may come back with another size."""
    driver.start(VERSION_1 | RING_RESET)
    driver.reset_queue(0)
    assert (driver.read(QUEUE_RESET), driver.ready(0), driver.ready(1)) == (0, 0, 1)
    driver.kick(0)
    driver.kick(1)
    assert (driver.count(0), driver.count(1)) == (1, 2)
    assert driver.set_queue(0, size=4) == 1
    assert [queue.setup.size for queue in bench.device.opened] == [8, 8, 4]
    assert driver.count(0) == 2
    assert driver.status == LIVE


def test_queue_reset_forgets_the_registers(bench, driver):
    driver.start(VERSION_1 | RING_RESET)
    driver.reset_queue(0)
    driver.write(lib.VIRTIO_MMIO_QUEUE_READY, 1)
    assert driver.ready(0) == 0
    assert driver.status == LIVE | NEEDS_RESET
    assert driver.acknowledge() & lib.VIRTIO_MMIO_INT_CONFIG


def test_queue_reset_that_was_not_negotiated_is_ignored(driver):
    driver.start(VERSION_1)
    driver.reset_queue(0)
    assert driver.ready(0) == 1
    driver.kick(0)
    assert driver.count(0) == 2


def test_queue_that_was_reset_comes_back_once(driver):
    driver.start(VERSION_1 | RING_RESET)
    driver.reset_queue(0)
    assert driver.set_queue(0) == 1
    driver.stop_queue(0)
    assert driver.set_queue(0) == 0

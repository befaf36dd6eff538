"""The life of a virtio device: the status machine, faults, any register traffic. Resets: test_virtio_reset.py."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mmio_driver import (
    ACKNOWLEDGE,
    DRIVER,
    DRIVER_OK,
    FAILED,
    FAULT,
    FEATURES_OK,
    LIMIT,
    LIVE,
    NEEDS_RESET,
    NEGOTIATED,
    RAISE,
    RING_RESET,
    ROUNDS,
    VERSION_1,
    Bench,
    in_thread,
    joined,
    wait_for_config_interrupt,
)

from kvmpy._shim import lib
from kvmpy.devices.queue_worker import InlineWorker, QueueWorker
from kvmpy.devices.virtqueue import Fault

# --- the status machine -----------------------------------------------------------------------------------------

STATES = [0, ACKNOWLEDGE, ACKNOWLEDGE | DRIVER, NEGOTIATED, LIVE]
STATES += [NEGOTIATED | NEEDS_RESET, LIVE | NEEDS_RESET]
STATES += [state | FAILED for state in STATES]


def bring_to(driver, state):
    """Take the device to ``state``, with features accepted (so that FEATURES_OK would hold) but no queue."""
    driver.status = 0
    driver.accept(VERSION_1)
    if state & NEEDS_RESET and state & DRIVER_OK:
        driver.order(0, FAULT)
        driver.start(queues=(0,))
        driver.order(0, 0)
    elif state & LIVE:
        driver.status = state & LIVE
        if state & NEEDS_RESET:
            driver.set_queue(0, size=0)
    if state & FAILED:
        driver.status = FAILED
    assert driver.status == state


def expected(state, value):
    """Return what Status reads after ``value`` was written to it in ``state``: the model."""
    if value == 0:
        return 0
    if value & FAILED:
        return state | FAILED
    if state & (FAILED | NEEDS_RESET):
        return state
    for step in (ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK):
        if not (state | value) & step:
            break
        state |= step
    return state


@pytest.mark.parametrize("state", STATES, ids=hex)
def test_each_value_in_each_state(driver, state):
    """virtio 1.2 §2.1, §3.1.1: steps in their order, none undone but by a reset, nothing after FAILED but a reset."""
    for value in (*range(256), 0x100, 0x8000_0000, 0xFFFF_FF00, 0xFFFF_FFFF):
        bring_to(driver, state)
        driver.status = value
        assert driver.status == expected(state, value), hex(value)


def test_steps_can_be_taken_one_by_one_by_their_bits_alone(driver):
    """The driver MUST NOT clear a bit; where it does, nothing is cleared."""
    driver.accept(VERSION_1)
    for step, status in ((ACKNOWLEDGE, 1), (DRIVER, 3), (FEATURES_OK, NEGOTIATED), (DRIVER_OK, LIVE)):
        driver.status = step
        assert driver.status == status


def test_driver_ok_without_features_ok_starts_nothing(bench, driver):
    """virtio 1.2 §2.1.2: no buffer is consumed before DRIVER_OK, and that wants features agreed upon."""
    driver.status = 0
    driver.status = ACKNOWLEDGE | DRIVER | DRIVER_OK
    assert driver.status == ACKNOWLEDGE | DRIVER
    driver.set_queue(0)
    driver.kick(0)
    assert bench.device.opened == []


def test_refused_features_can_be_mended_without_a_reset(driver):
    driver.status = ACKNOWLEDGE | DRIVER
    driver.accept(VERSION_1 | 1)
    driver.status = NEGOTIATED
    assert driver.status == ACKNOWLEDGE | DRIVER
    driver.accept(VERSION_1)
    driver.status = NEGOTIATED
    assert driver.status == NEGOTIATED


def test_kick_before_driver_ok_is_ignored(bench, driver):
    """virtio 1.2 §3.1.1: the driver MUST NOT notify before DRIVER_OK, nor the device consume."""
    driver.negotiate()
    driver.set_queue(0)
    for index in (0, 1, 2, 0xFFFF_FFFF):
        driver.kick(index)
    assert bench.device.opened == []
    assert driver.count(0) == 0
    driver.status = LIVE
    assert driver.count(0) == 1


def test_kick_after_reset_is_ignored(driver):
    driver.start()
    driver.status = 0
    driver.kick(0)
    assert driver.count(0) == 1


def test_only_queues_that_are_ready_are_served(bench, driver):
    driver.start(queues=(1,))
    driver.kick(0)
    assert [queue.setup.queue_index for queue in bench.device.opened] == [1]


def test_failed_ends_the_queues(bench, driver):
    driver.start()
    driver.status = FAILED
    assert all(queue.closed for queue in bench.device.opened)
    driver.kick(0)
    assert driver.count(0) == 1
    driver.start()
    assert driver.count(0) == 2


# --- faults -----------------------------------------------------------------------------------------------------


def test_broken_queue_makes_the_device_need_a_reset(threaded):
    """virtio 1.2 §2.1.2: with DRIVER_OK set, the device MUST send a configuration change notification."""
    driver = threaded.driver
    driver.start()
    threaded.wait_for_count(0, 1)
    driver.order(1, FAULT)
    driver.kick(1)
    wait_for_config_interrupt(threaded.mmio)
    assert driver.status == LIVE | NEEDS_RESET
    assert threaded.mmio.fault is Fault.HEAD
    assert threaded.device.opened[0].stopped, "no queue is served after one is broken"
    driver.status = 0
    assert (driver.status, threaded.mmio.fault) == (0, None)
    driver.order(1, 0)
    driver.start()
    threaded.wait_for_count(1, 1)


def test_nothing_is_served_by_a_broken_device(bench, driver):
    """Neither a kick nor a queue that comes back from a reset."""
    driver.start(VERSION_1 | RING_RESET)
    driver.order(1, FAULT)
    driver.kick(1)
    driver.kick(0)
    assert driver.count(0) == 1
    driver.reset_queue(0)
    assert driver.set_queue(0) == 0
    assert (driver.count(0), len(bench.device.opened)) == (1, 2)


def test_queue_that_breaks_at_once_keeps_the_others_from_starting(bench, driver):
    driver.order(0, FAULT)
    driver.start()
    assert driver.status == LIVE | NEEDS_RESET
    assert [queue.setup.queue_index for queue in bench.device.opened] == [0]


def test_queue_that_starts_while_another_breaks_is_stopped():
    """The one that breaks finds no worker to stop yet: who starts it must look again."""
    started = []

    def break_and_make(queue, **options):
        started.append(QueueWorker(queue, **options))
        options["on_fault"](Fault.NEXT)
        return started[-1]

    bench = Bench(break_and_make)
    bench.driver.start(queues=(0,))
    assert joined(in_thread(started[0].join))
    bench.close()


def test_exception_in_a_queue_is_reported_and_breaks_the_device(threaded):
    threaded.driver.order(0, RAISE)
    threaded.driver.start()
    assert threaded.failed.wait(LIMIT)
    assert [str(error) for error in threaded.errors] == ["a defect in a device"]
    assert threaded.driver.status == LIVE | NEEDS_RESET


def test_host_that_gives_no_thread_breaks_the_device_only():
    """A guest's write raises nothing, and the queue that was opened is closed."""

    def refuse(queue, **_):
        raise RuntimeError("can't start new thread")

    bench = Bench(refuse)
    bench.driver.start(queues=(0,))
    assert bench.driver.status == LIVE | NEEDS_RESET
    assert [str(error) for error in bench.errors] == ["can't start new thread"]
    assert bench.device.opened[0].closed
    bench.close()


# --- anything at all --------------------------------------------------------------------------------------------

addresses = st.one_of(st.sampled_from(range(0, 0x100, 4)), st.integers(0, 0xFFF))
values = st.one_of(st.sampled_from([0, 1, 2, 3, 8, 11, 15, 128, 0x10000, 0xFFFF_FFFF]), st.integers(0, 2**32 - 1))
whole = st.sampled_from([("negotiate",), ("set_queue", 0), ("set_queue", 1), ("go",), ("swap",), ("break", 1)])
traffic = st.lists(
    st.one_of(
        st.tuples(st.just("write"), addresses, values),
        st.tuples(st.just("write"), st.just(lib.VIRTIO_MMIO_STATUS), values),
        st.tuples(st.just("wide"), addresses, st.sampled_from([1, 2, 3, 8])),
        st.tuples(st.just("kick"), st.integers(0, 2)),
        whole,
    ),
    max_size=60,
)


def do(bench, action, *arguments):
    """Do one thing that a guest, or the owner of the disk, may do."""
    driver = bench.driver
    match action:
        case "write":
            bench.mmio.write(arguments[0], arguments[1].to_bytes(4, "little"))
        case "wide":
            bench.mmio.write(arguments[0], b"\x0f" * arguments[1])
            assert len(bench.mmio.read(*arguments)) == arguments[1]
        case "kick":
            driver.kick(*arguments)
        case "negotiate":
            driver.negotiate(VERSION_1 | RING_RESET)
        case "set_queue":
            driver.set_queue(*arguments)
        case "go":
            driver.status = LIVE
        case "swap":
            bench.device.config.swap()
            bench.device.on_config_change()
        case "break":
            driver.order(arguments[0], FAULT)


@settings(deadline=None, max_examples=ROUNDS)
@given(traffic)
def test_any_register_traffic_is_survived(traffic):
    """Nothing raises, each register answers with 4 bytes, and the status never says what cannot be."""
    bench = Bench(InlineWorker)
    try:
        for action in traffic:
            before = bench.mmio.status
            do(bench, *action)
            status = bench.mmio.status
            lost = before & ~status
            assert not lost or action[0] in ("write", "negotiate"), "only a reset takes bits away"
            steps = status & LIVE
            assert steps in (0, ACKNOWLEDGE, ACKNOWLEDGE | DRIVER, NEGOTIATED, LIVE)
            assert not status & ~(LIVE | NEEDS_RESET | FAILED)
            served = [queue for queue in bench.device.opened if not queue.closed]
            assert not served or status & DRIVER_OK
        assert all(len(bench.mmio.read(register, 4)) == 4 for register in range(0, 0x1000, 4))
        assert bench.errors == []
    finally:
        bench.close()

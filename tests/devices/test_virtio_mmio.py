"""The registers of virtio-mmio: identity, features, queues, widths. The life of a device: test_virtio_status.py."""

import struct
import threading

import pytest
from mmio_driver import (
    LIVE,
    NEEDS_RESET,
    NEGOTIATED,
    PACKED,
    RINGS,
    TICKER_FEATURE,
    VERSION_1,
    Bench,
    in_thread,
    joined,
)

from kvmpy._shim import ffi, lib
from kvmpy.devices.queue_worker import InlineWorker
from kvmpy.devices.virtio_mmio import MMIO_SIZE, QUEUE_RESET
from kvmpy.devices.virtqueue import QUEUE_SIZE_MAX, Fault
from kvmpy.kvm.ranges import RangeTable, Space
from kvmpy.units import MiB

CONFIG = lib.VIRTIO_MMIO_CONFIG
REGISTERS = range(0, CONFIG, 4)
QUEUE_REGISTERS = (
    lib.VIRTIO_MMIO_QUEUE_NUM,
    lib.VIRTIO_MMIO_QUEUE_READY,
    QUEUE_RESET,
    lib.VIRTIO_MMIO_QUEUE_DESC_LOW,
    lib.VIRTIO_MMIO_QUEUE_DESC_HIGH,
    lib.VIRTIO_MMIO_QUEUE_AVAIL_LOW,
    lib.VIRTIO_MMIO_QUEUE_AVAIL_HIGH,
    lib.VIRTIO_MMIO_QUEUE_USED_LOW,
    lib.VIRTIO_MMIO_QUEUE_USED_HIGH,
)


@pytest.fixture
def bench():
    bench = Bench(InlineWorker)
    yield bench
    bench.close()


@pytest.fixture
def driver(bench):
    return bench.driver


def snapshot(driver):
    """Return all that can be read from the registers."""
    return [driver.read(register) for register in REGISTERS]


# --- identity and features --------------------------------------------------------------------------------------


def test_device_is_found(driver):
    """virtio 1.2 §4.2.2.1: MagicValue is 0x74726976, Version is 2."""
    assert driver.read(lib.VIRTIO_MMIO_MAGIC_VALUE) == 0x74726976
    assert driver.read(lib.VIRTIO_MMIO_VERSION) == 2
    assert driver.read(lib.VIRTIO_MMIO_DEVICE_ID) == 42
    assert driver.mmio.read(lib.VIRTIO_MMIO_VENDOR_ID, 4) == b"KVMP"


def test_features_are_read_in_words_of_32(bench, driver):
    assert driver.offered() == bench.device.identity.features
    for sel in (2, 3, 31, 0xFFFF_FFFF):
        driver.write(lib.VIRTIO_MMIO_DEVICE_FEATURES_SEL, sel)
        assert driver.read(lib.VIRTIO_MMIO_DEVICE_FEATURES) == 0


def test_accepted_features_reach_the_device(bench, driver):
    assert driver.negotiate(VERSION_1 | TICKER_FEATURE) == NEGOTIATED
    assert bench.device.negotiated[-1] == VERSION_1 | TICKER_FEATURE


def test_features_can_be_written_again_before_they_are_final(bench, driver):
    """A word replaces what it had before; it is not added to it."""
    driver.accept(0xFFFF_FFFF_FFFF_FFFF)
    assert driver.negotiate(VERSION_1) == NEGOTIATED
    assert bench.device.negotiated[-1] == VERSION_1


@pytest.mark.parametrize("bit", [0, 4, 31, 33, 63, 64, 95, 32 * 0xFFFF_FFFF])
def test_feature_that_was_not_offered_is_refused(driver, bit):
    """virtio 1.2 §2.2.2: the device MUST fail to set FEATURES_OK. Bits above 63 are no exception."""
    driver.status = 0
    driver.status = 3
    driver.accept(VERSION_1)
    driver.write(lib.VIRTIO_MMIO_DRIVER_FEATURES_SEL, bit // 32)
    driver.write(lib.VIRTIO_MMIO_DRIVER_FEATURES, 1 << bit % 32 | (1 if bit // 32 == 1 else 0))
    driver.status = NEGOTIATED
    assert driver.status == 3


def test_driver_without_version_1_is_refused(bench, driver):
    """virtio 1.2 §6.1: there is no legacy interface here."""
    assert driver.negotiate(TICKER_FEATURE) == 3
    assert driver.negotiate(0) == 3
    assert not any(bench.device.negotiated)


def test_zeros_above_bit_63_refuse_nothing(driver):
    driver.status = 3
    driver.accept(VERSION_1)
    driver.write(lib.VIRTIO_MMIO_DRIVER_FEATURES_SEL, 2)
    driver.write(lib.VIRTIO_MMIO_DRIVER_FEATURES, 0)
    driver.status = NEGOTIATED
    assert driver.status == NEGOTIATED


def test_features_are_fixed_after_features_ok(bench, driver):
    """virtio 1.2 §3.1.1: the driver MUST NOT accept new feature bits after this step."""
    assert driver.negotiate(VERSION_1) == NEGOTIATED
    driver.accept(VERSION_1 | TICKER_FEATURE | PACKED | 1 << 64)
    driver.set_queue(0)
    driver.status = LIVE
    assert bench.device.opened[0].setup.features == VERSION_1
    assert bench.device.negotiated == [0, VERSION_1]


def test_shared_memory_regions_do_not_exist(driver):
    """virtio 1.2 §4.2.2: the length of a region that does not exist is -1, as is its address."""
    for region in (0, 7):
        driver.write(0x0AC, region)
        assert [driver.read(register) for register in range(0x0B0, 0x0C0, 4)] == [0xFFFF_FFFF] * 4


def test_write_only_registers_read_as_zero(driver):
    driver.start()
    for register in (0x014, 0x020, 0x024, 0x030, 0x038, 0x050, 0x064, 0x080, 0x084, 0x090, 0x0A0):
        assert driver.read(register) == 0


def test_read_only_registers_ignore_writes(driver):
    before = snapshot(driver)
    for register in (0x000, 0x004, 0x008, 0x00C, 0x010, 0x034, 0x060, 0x0B0, 0x0FC):
        driver.write(register, 0xFFFF_FFFF)
    assert snapshot(driver) == before


# --- accesses of other widths -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_registers_of_another_width_read_as_zeros_and_take_nothing(driver, size):
    """virtio 1.2 §4.2.2.2: only 32 bit wide and aligned accesses. A byte of Status is no reset."""
    driver.start()
    before = snapshot(driver)
    for offset in range(CONFIG):
        assert driver.mmio.read(offset, size) == bytes(size)
        driver.mmio.write(offset, bytes(size))
        driver.mmio.write(offset, b"\xff" * size)
    assert snapshot(driver) == before


def test_registers_that_are_not_aligned_read_as_zeros_and_take_nothing(driver):
    driver.start()
    before = snapshot(driver)
    for offset in range(CONFIG):
        if offset % 4:
            assert driver.mmio.read(offset, 4) == bytes(4)
            driver.mmio.write(offset, bytes(4))
            driver.mmio.write(offset, b"\xff" * 4)
    assert snapshot(driver) == before


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_configuration_is_read_in_any_width(bench, driver, size):
    text = bench.device.config.text + bytes(16)
    for offset in range(24):
        assert driver.mmio.read(CONFIG + offset, size) == text[offset : offset + size]


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_window_ends_in_zeros(driver, size):
    last = MMIO_SIZE - size
    assert driver.mmio.read(last, size) == bytes(size)
    driver.mmio.write(last, b"\xff" * size)


# --- queues -----------------------------------------------------------------------------------------------------


def test_queue_that_does_not_exist_has_no_size(driver):
    """virtio 1.2 §4.2.2: QueueNumMax is zero if the queue is not available."""
    for sel, size in ((0, QUEUE_SIZE_MAX), (1, QUEUE_SIZE_MAX), (2, 0), (0xFFFF, 0), (0xFFFF_FFFF, 0)):
        driver.write(lib.VIRTIO_MMIO_QUEUE_SEL, sel)
        assert driver.read(lib.VIRTIO_MMIO_QUEUE_NUM_MAX) == size


@pytest.mark.parametrize("sel", [2, 0xFFFF, 0x8000_0000, 0xFFFF_FFFF])
def test_registers_of_a_queue_that_does_not_exist_are_inert(bench, driver, sel):
    driver.start()
    driver.write(lib.VIRTIO_MMIO_QUEUE_SEL, sel)
    for register in QUEUE_REGISTERS:
        for value in (1, 0, 0xFFFF_FFFF):
            driver.write(register, value)
        assert driver.read(register) == 0
    driver.kick(sel)
    assert driver.status == LIVE
    assert [driver.ready(index) for index in (0, 1)] == [1, 1]
    assert (driver.count(0), driver.count(1)) == (1, 1)


def test_queue_is_opened_as_the_driver_wrote_it(bench, driver):
    driver.memory.write(0x1F_0000, bytes(64))
    assert driver.negotiate(VERSION_1 | TICKER_FEATURE) == NEGOTIATED
    assert driver.set_queue(1, size=16, areas=(0x1F_0000, 0x1F_1002, 0x1F_2004)) == 1
    driver.status = LIVE
    (queue,) = bench.device.opened
    assert queue.setup == (1, 16, 0x1F_0000, 0x1F_1002, 0x1F_2004, VERSION_1 | TICKER_FEATURE)


@pytest.mark.parametrize("size", [0, 3, 24, 255, QUEUE_SIZE_MAX * 2, QUEUE_SIZE_MAX + 1, 1 << 16, 0xFFFF_FFFF])
def test_queue_of_a_wrong_size_is_refused(bench, driver, size):
    """virtio 1.2 §2.7: a power of two; §4.2.2.2: not above QueueNumMax."""
    driver.negotiate()
    assert driver.set_queue(0, size=size) == 0
    assert driver.status == NEGOTIATED | NEEDS_RESET
    assert bench.mmio.fault is Fault.RING_ADDRESS


@pytest.mark.parametrize("size", [1, 2, 128, QUEUE_SIZE_MAX])
def test_queue_of_a_right_size_is_taken(driver, size):
    driver.negotiate()
    assert driver.set_queue(0, size=size) == 1


@pytest.mark.parametrize("size", [1, 3, 255, QUEUE_SIZE_MAX])
def test_packed_queue_may_have_any_size(driver, size):
    """virtio 1.2 §2.8.10.1: the size of a packed ring needs to be no power of two."""
    driver.negotiate(VERSION_1 | PACKED)
    assert driver.set_queue(0, size=size) == 1
    assert driver.set_queue(1, size=0) == 0


END = 2 * MiB
WRONG_AREAS = {
    "descriptors unaligned": (RINGS + 8, RINGS + 0x4000, RINGS + 0x8000),
    "available ring unaligned": (RINGS, RINGS + 0x4001, RINGS + 0x8000),
    "used ring unaligned": (RINGS, RINGS + 0x4000, RINGS + 0x8002),
    "descriptors outside RAM": (END, RINGS + 0x4000, RINGS + 0x8000),
    "available ring across the end of RAM": (RINGS, END - 8, RINGS + 0x8000),
    "used ring far away": (RINGS, RINGS + 0x4000, 1 << 40),
    "descriptors wrap 2^64": (2**64 - 16, RINGS + 0x4000, RINGS + 0x8000),
    "available ring wraps 2^64": (RINGS, 2**64 - 2, RINGS + 0x8000),
}


@pytest.mark.parametrize("areas", WRONG_AREAS.values(), ids=WRONG_AREAS)
def test_queue_with_its_rings_nowhere_is_refused(bench, driver, areas):
    driver.negotiate()
    assert driver.set_queue(0, areas=areas) == 0
    assert driver.status == NEGOTIATED | NEEDS_RESET
    assert driver.read(lib.VIRTIO_MMIO_INTERRUPT_STATUS) == 0, "nobody is there to be interrupted before DRIVER_OK"
    driver.status = LIVE
    assert driver.status == NEGOTIATED | NEEDS_RESET
    assert bench.device.opened == []
    driver.start()
    assert bench.mmio.fault is None


def test_overlapping_rings_are_the_drivers_business(driver):
    driver.negotiate()
    assert driver.set_queue(0, areas=(RINGS, RINGS, RINGS)) == 1


@pytest.mark.parametrize("live", [False, True], ids=["before DRIVER_OK", "live"])
def test_ready_queue_cannot_be_moved(bench, driver, live):
    """virtio 1.2 §4.2.2.2: when QueueReady is not zero, the driver MUST NOT access the size and the addresses."""
    driver.negotiate()
    driver.set_queue(0)
    if live:
        driver.status = LIVE
    assert driver.set_queue(0, size=16, areas=(0, 0, 0)) == 1
    driver.status = LIVE
    assert bench.device.opened[0].setup == (0, 8, *driver.areas(0), VERSION_1)


def test_queue_is_not_ready_before_the_features_are(driver):
    """Nobody knows yet what its rings look like."""
    driver.status = 3
    driver.accept(VERSION_1)
    assert driver.set_queue(0) == 0
    assert driver.status == 3


def test_queue_that_was_not_ready_stays_out_of_a_live_device(bench, driver):
    """virtio 1.2 §3.1.1: virtqueues are set up before DRIVER_OK."""
    driver.start(queues=(0,))
    assert driver.set_queue(1) == 0
    driver.stop_queue(0)
    assert driver.set_queue(0) == 0
    assert driver.status == LIVE
    assert len(bench.device.opened) == 1


@pytest.mark.parametrize("value", [2, 3, 0x8000_0001])
def test_only_one_makes_a_queue_ready(driver, value):
    driver.negotiate()
    driver.set_queue(0)
    driver.stop_queue(0)
    driver.write(lib.VIRTIO_MMIO_QUEUE_READY, value)
    assert driver.ready(0) == 0


# --- interrupts and configuration -------------------------------------------------------------------------------


def test_interrupt_is_shown_until_it_is_acknowledged(driver):
    """virtio 1.2 §4.2.2.1: each event, from the moment it takes place until the driver acknowledges it."""
    driver.start()
    assert driver.read(lib.VIRTIO_MMIO_INTERRUPT_STATUS) == lib.VIRTIO_MMIO_INT_VRING
    driver.write(lib.VIRTIO_MMIO_INTERRUPT_ACK, lib.VIRTIO_MMIO_INT_CONFIG)
    assert driver.acknowledge() == lib.VIRTIO_MMIO_INT_VRING
    assert driver.acknowledge() == 0


def test_c_and_python_answer_the_interrupt_registers_alike(bench, driver):
    """The run loop reads and clears the same word; a width that it leaves to Python has no effect there either."""
    interrupt, base = bench.mmio.interrupt, 0xD000_0000
    table = RangeTable((Space.MMIO, base, fast) for fast in bench.mmio.fast_ranges())
    run, loop = ffi.new("struct kvm_run *"), ffi.new("struct kvmpy_loop *")
    counts = ffi.new("struct kvmpy_range_count[]", table.length)
    loop.run, loop.ranges, loop.nr_ranges, loop.counts = run, table.pointer, table.length, counts
    run.exit_reason = lib.KVM_EXIT_MMIO

    def access(register, data, *, is_write):
        run.mmio.phys_addr, run.mmio.len, run.mmio.is_write = base + register, len(data), is_write
        ffi.buffer(run.mmio.data)[: len(data)] = data
        answered = lib.kvmpy_handle_exit(loop) == -1
        return answered, bytes(ffi.buffer(run.mmio.data)[: len(data)])

    interrupt.raise_(3)
    assert access(lib.VIRTIO_MMIO_INTERRUPT_STATUS, bytes(4), is_write=False) == (True, b"\3\0\0\0")
    assert access(lib.VIRTIO_MMIO_INTERRUPT_ACK, b"\1\0\0\0", is_write=True)[0]
    assert driver.read(lib.VIRTIO_MMIO_INTERRUPT_STATUS) == 2
    for size in (1, 2, 8):
        assert not access(lib.VIRTIO_MMIO_INTERRUPT_ACK, b"\xff" * size, is_write=True)[0]
        assert not access(lib.VIRTIO_MMIO_INTERRUPT_STATUS, bytes(size), is_write=False)[0]


def test_generation_changes_with_the_configuration(bench, driver):
    before = driver.read(lib.VIRTIO_MMIO_CONFIG_GENERATION)
    bench.device.config.swap()
    assert driver.read(lib.VIRTIO_MMIO_CONFIG_GENERATION) != before


def test_configuration_read_between_two_equal_generations_is_of_one_state(bench, driver):
    """virtio 1.2 §2.5.1: read, compare the generation, read again where it differs."""
    stop = threading.Event()

    def keep_swapping():
        while not stop.is_set():
            bench.device.config.swap()

    swapper = in_thread(keep_swapping)
    same = 0
    for _ in range(3000):
        before = driver.read(lib.VIRTIO_MMIO_CONFIG_GENERATION)
        text = b"".join(driver.mmio.read(CONFIG + offset, 4) for offset in range(0, 16, 4))
        if driver.read(lib.VIRTIO_MMIO_CONFIG_GENERATION) == before:
            same += 1
            assert text in (b"abcdefghijklmnop", b"ABCDEFGHIJKLMNOP")
    stop.set()
    assert joined(swapper)
    assert same > 0


def test_change_of_configuration_interrupts_a_driver(bench, driver):
    driver.status = 1
    bench.device.on_config_change()
    assert driver.acknowledge() == 0, "there is no driver yet that could have read it"
    driver.status = 3
    bench.device.on_config_change()
    assert driver.acknowledge() == lib.VIRTIO_MMIO_INT_CONFIG
    driver.status = 0
    bench.device.on_config_change()
    assert driver.acknowledge() == 0


def test_kick_of_queue_reaches_only_that_queue(driver):
    driver.start()
    driver.kick(1)
    assert (driver.count(0), driver.count(1)) == (1, 2)
    assert struct.pack("<I", 2) == driver.memory.read(driver.areas(1)[2], 4)

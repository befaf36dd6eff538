"""The virtio block device: features, configuration, cache modes, capacity. What is in flight: test_blk_in_flight.py."""

import struct

import pytest
from blk_bench import CONFIG_WCE, ENGINES, FLUSH, SECTORS, BlkBench, HeldImage
from mmio_driver import VERSION_1

from kvmpy._shim import lib
from kvmpy.devices.block import BlockSettings
from kvmpy.devices.virtio_blk import QUEUES_MAX, Cache, VirtioBlk, offered_features
from kvmpy.devices.virtio_device import feature_bits
from kvmpy.storage.disk import SECTOR_SIZE
from kvmpy.units import KiB

CONFIG = lib.VIRTIO_MMIO_CONFIG
CONFIG_SIZE = 60
RO = feature_bits(lib.VIRTIO_BLK_F_RO)
DISCARD = feature_bits(lib.VIRTIO_BLK_F_DISCARD)
WRITE_ZEROES = feature_bits(lib.VIRTIO_BLK_F_WRITE_ZEROES)
WRITEBACK = 32
"""Offset of the field."""


@pytest.fixture(params=ENGINES.values(), ids=ENGINES)
def engine(request):
    """Return the class of an engine."""
    return request.param


@pytest.fixture
def make_bench(engine):
    """Return a function that makes a `BlkBench`; the test's end closes it."""
    benches = []

    def make(image=None, **options):
        benches.append(BlkBench(image, make_engine=engine, **options))
        return benches[-1]

    yield make
    for bench in benches:
        bench.close()


@pytest.fixture
def bench(make_bench):
    return make_bench()


# --- features ---------------------------------------------------------------------------------------------------

ALWAYS = {
    "VIRTIO_F_VERSION_1",
    "VIRTIO_F_RING_PACKED",
    "VIRTIO_F_RING_RESET",
    "VIRTIO_RING_F_INDIRECT_DESC",
    "VIRTIO_RING_F_EVENT_IDX",
    "VIRTIO_BLK_F_SEG_MAX",
    "VIRTIO_BLK_F_BLK_SIZE",
    "VIRTIO_BLK_F_FLUSH",
    "VIRTIO_BLK_F_TOPOLOGY",
    "VIRTIO_BLK_F_MQ",
}
WRITES = {"VIRTIO_BLK_F_DISCARD", "VIRTIO_BLK_F_WRITE_ZEROES"}


@pytest.mark.parametrize(
    ("readonly", "cache", "names"),
    [
        (False, Cache.WRITEBACK, ALWAYS | WRITES | {"VIRTIO_BLK_F_CONFIG_WCE"}),
        (False, Cache.DIRECT, ALWAYS | WRITES | {"VIRTIO_BLK_F_CONFIG_WCE"}),
        (False, Cache.WRITETHROUGH, ALWAYS | WRITES),
        (True, Cache.WRITEBACK, ALWAYS | {"VIRTIO_BLK_F_RO", "VIRTIO_BLK_F_CONFIG_WCE"}),
        (True, Cache.WRITETHROUGH, ALWAYS | {"VIRTIO_BLK_F_RO"}),
    ],
)
def test_features_offered(make_bench, readonly, cache, names):
    """virtio 1.2 §5.2.5.2: FLUSH MUST be offered with CONFIG_WCE, and SHOULD be always."""
    bench = make_bench(HeldImage(readonly=readonly), cache=cache)
    assert bench.driver.offered() == feature_bits(*(getattr(lib, name) for name in names))
    assert bench.driver.get(lib.VIRTIO_MMIO_DEVICE_ID) == lib.VIRTIO_ID_BLOCK


def test_each_subset_of_the_features_is_accepted(bench):
    """virtio 1.2 §2.2.2: the device SHOULD accept any valid subset."""
    offered = bench.driver.offered()
    for bit in range(64):
        if offered >> bit & 1 and bit != lib.VIRTIO_F_VERSION_1:
            assert bench.driver.negotiate(offered & ~(1 << bit))
            assert bench.driver.negotiate(VERSION_1 | 1 << bit)


def test_readonly_disk_refuses_writes(make_bench):
    """virtio 1.2 §5.2.5: if RO is set by the device, any write request will fail."""
    bench = make_bench(HeldImage(readonly=True))
    for features in (0, RO):
        bench.start(features)
        assert not bench.driver.write(0, b"x" * SECTOR_SIZE)
        assert bench.driver.read(1) == bytes([1]) * SECTOR_SIZE


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_all_that_is_offered_works(bench, packed):
    """Every feature negotiated at once, on either kind of ring."""
    features = bench.driver.offered() & (-1 if packed else ~feature_bits(lib.VIRTIO_F_RING_PACKED))
    bench.start(features)
    driver = bench.driver
    assert driver.write(3, b"abcd" * 256)
    assert driver.flush()
    assert driver.read(2, 4) == bytes([2]) * 512 + b"abcd" * 256 + bytes([5]) * 512
    for answer in (driver.discard((3, 1, 0)), driver.write_zeroes((4, 1, lib.VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP))):
        assert answer is not None
        assert answer.status == lib.VIRTIO_BLK_S_OK
    assert driver.read(3, 2) == bytes(1024)
    assert not driver.needs_reset


# --- the configuration space ------------------------------------------------------------------------------------

FIELDS = [
    ("capacity, low", 0, 4, SECTORS),
    ("capacity, high", 4, 4, 0),
    ("size_max", 8, 4, 0),
    ("seg_max", 12, 4, 254),
    ("geometry.cylinders", 16, 2, 0),
    ("geometry.heads", 18, 1, 0),
    ("geometry.sectors", 19, 1, 0),
    ("blk_size", 20, 4, 512),
    ("topology.physical_block_exp", 24, 1, 3),
    ("topology.alignment_offset", 25, 1, 0),
    ("topology.min_io_size", 26, 2, 8),
    ("topology.opt_io_size", 28, 4, 64 * KiB // 512),
    ("writeback", 32, 1, 1),
    ("unused0", 33, 1, 0),
    ("num_queues", 34, 2, 3),
    ("max_discard_sectors", 36, 4, 1 << 22),
    ("max_discard_seg", 40, 4, 16),
    ("discard_sector_alignment", 44, 4, 8),
    ("max_write_zeroes_sectors", 48, 4, 1 << 22),
    ("max_write_zeroes_seg", 52, 4, 16),
    ("write_zeroes_may_unmap", 56, 1, 1),
    ("unused1, first", 57, 1, 0),
    ("unused1, rest", 58, 2, 0),
    ("max_secure_erase_sectors, which is not there", 60, 4, 0),
]


@pytest.mark.parametrize(("offset", "size", "value"), [field[1:] for field in FIELDS], ids=[f[0] for f in FIELDS])
def test_each_field_of_the_configuration(make_bench, offset, size, value):
    """virtio 1.2 §5.2.4; §2.5.2: each field can be read before FEATURES_OK."""
    assert make_bench(queues=3).driver.config(offset, size) == value


def test_capacity_of_a_large_disk_has_64_bits(make_bench):
    image = HeldImage()
    image.size = 5 << 41
    assert struct.unpack("<Q", make_bench(image).mmio.read(CONFIG, 8)) == (5 << 32,)


def test_configuration_is_the_same_in_every_width(bench):
    whole = b"".join(bench.mmio.read(CONFIG + offset, 1) for offset in range(CONFIG_SIZE + 16))
    assert whole[CONFIG_SIZE:] == bytes(16)
    for size in (2, 4, 8):
        for offset in range(CONFIG_SIZE + 8):
            assert bench.mmio.read(CONFIG + offset, size) == whole[offset : offset + size]


@pytest.mark.parametrize(("alignment", "exponent", "blocks"), [(1, 3, 8), (512, 3, 8), (4096, 3, 8), (16 * KiB, 5, 32)])
def test_block_size_stays_512_whatever_the_host_wants(make_bench, alignment, exponent, blocks):
    """Partition tables count in it: a disk must read the same with cache=direct."""
    driver = make_bench(HeldImage(alignment=alignment)).driver
    assert (driver.config(20, 4), driver.config(24, 1), driver.config(26, 2)) == (512, exponent, blocks)


def test_configuration_is_read_only_but_for_writeback(bench):
    bench.start(FLUSH | CONFIG_WCE)
    before = bench.mmio.read(CONFIG, 64)
    generation = bench.generation
    for size in (1, 2, 4, 8):
        for offset in range(64):
            for byte in (b"\0", b"\1", b"\xff"):
                if (size, offset) != (1, WRITEBACK):
                    bench.mmio.write(CONFIG + offset, byte * size)
    bench.mmio.write(CONFIG + WRITEBACK, b"\2")
    bench.mmio.write(CONFIG + WRITEBACK, b"\xff")
    assert bench.mmio.read(CONFIG, 64) == before
    assert bench.generation == generation


# --- cache modes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", [Cache.WRITEBACK, Cache.DIRECT])
@pytest.mark.parametrize(
    ("features", "writeback"),
    [
        (FLUSH | CONFIG_WCE, 1),
        (FLUSH, 1),  # §5.2.5.1: the driver SHOULD assume presence of a writeback cache
        (CONFIG_WCE, 0),  # §5.2.5.2: without FLUSH the device MUST initialize writeback to 0
        (0, 0),  # §5.2.5.1: the driver MAY deduce the presence of a writethrough cache
    ],
)
def test_cache_begins_as_the_features_say(make_bench, cache, features, writeback):
    bench = make_bench(cache=cache)
    bench.start(features)
    assert bench.writeback == writeback


def test_driver_that_negotiated_it_switches_the_cache(bench):
    """virtio 1.2 §5.2.5: 0 corresponds to a writethrough cache, 1 to a writeback cache."""
    bench.start(FLUSH | CONFIG_WCE)
    for writeback in (0, 1, 1, 0):
        bench.mmio.write(CONFIG + WRITEBACK, bytes([writeback]))
        assert bench.writeback == writeback


def test_reset_puts_the_cache_back(bench):
    bench.start(FLUSH | CONFIG_WCE)
    bench.mmio.write(CONFIG + WRITEBACK, b"\0")
    bench.driver.reset()
    assert bench.writeback == 1
    bench.mmio.write(CONFIG + WRITEBACK, b"\0")
    assert bench.writeback == 1, "the features of the driver before are forgotten"


@pytest.mark.parametrize(("features", "writeback"), [(FLUSH, 1), (CONFIG_WCE, 0), (0, 0)])
def test_cache_is_not_switched_where_that_was_not_negotiated(bench, features, writeback):
    """Nor to writeback by a driver that cannot flush."""
    bench.start(features)
    bench.mmio.write(CONFIG + WRITEBACK, bytes([1 - writeback]))
    assert bench.writeback == writeback


def test_writethrough_is_the_owners_promise(make_bench):
    """No driver can take it back: neither by what it negotiates nor by the field."""
    bench = make_bench(cache=Cache.WRITETHROUGH)
    assert bench.writeback == 0
    assert not bench.driver.negotiate(VERSION_1 | FLUSH | CONFIG_WCE)
    for features in (0, FLUSH):
        bench.start(features)
        bench.mmio.write(CONFIG + WRITEBACK, b"\1")
        assert bench.writeback == 0
    assert bench.driver.flush(), "a FLUSH has nothing to do, and is answered"
    assert True not in bench.modes


# --- capacity, serial number, queues, counters ------------------------------------------------------------------


def test_new_capacity_is_shown_and_told(bench):
    """virtio 1.2 §3.2, §4.2.2.1: another generation, and a configuration change notification."""
    bench.start()
    generation = bench.generation
    assert bench.driver.read(SECTORS) is None
    bench.acknowledge()
    with bench.blk.exclusive():
        bench.image.resize(2 * SECTORS)
    assert bench.generation != generation
    assert bench.acknowledge() == lib.VIRTIO_MMIO_INT_CONFIG
    assert bench.driver.config(0, 4) == 2 * SECTORS
    assert bench.driver.read(SECTORS) == bytes(SECTOR_SIZE)


def test_what_was_cut_off_is_an_error(bench):
    bench.start()
    assert bench.driver.read(SECTORS - 1) is not None
    with bench.blk.exclusive():
        bench.image.resize(SECTORS // 2)
    assert bench.driver.config(0, 4) == SECTORS // 2
    assert bench.driver.read(SECTORS - 1) is None
    assert not bench.driver.write(SECTORS // 2, bytes(512))


def test_exclusive_without_another_size_disturbs_nobody(bench):
    """A snapshot is not the driver's business."""
    bench.start()
    generation = bench.generation
    with bench.blk.exclusive():
        pass
    assert (bench.generation, bench.acknowledge()) == (generation, 0)


def test_new_capacity_is_shown_also_when_the_change_failed_half_way(bench):
    def resize_and_fail():
        with bench.blk.exclusive():
            bench.image.resize(SECTORS // 2)
            raise OSError("and then the host failed")

    bench.start()
    with pytest.raises(OSError, match="host failed"):
        resize_and_fail()
    assert bench.driver.config(0, 4) == SECTORS // 2
    assert bench.acknowledge() == lib.VIRTIO_MMIO_INT_CONFIG


@pytest.mark.parametrize("serial", [b"", b"disk-0001", b"x" * 20])
def test_serial_number_is_told(make_bench, serial):
    bench = make_bench(settings=BlockSettings(serial=serial))
    bench.start()
    assert bench.driver.serial() == serial


def refused(**options):
    """Make a device that is refused before it has touched anything."""
    image = HeldImage()
    try:
        VirtioBlk(None, image, make_engine=None, **options)
    finally:
        image.close()


def test_serial_number_that_is_too_long_is_refused():
    with pytest.raises(ValueError, match="at most 20 bytes"):
        refused(settings=BlockSettings(serial=b"x" * 21))


@pytest.mark.parametrize("queues", [0, -1, QUEUES_MAX + 1])
def test_wrong_number_of_queues_is_refused(queues):
    with pytest.raises(ValueError, match=f"1 to {QUEUES_MAX}"):
        refused(queues=queues)


@pytest.mark.parametrize("queues", [1, 4, QUEUES_MAX])
def test_each_queue_is_served(make_bench, queues):
    bench = make_bench(queues=queues)
    bench.start(feature_bits(lib.VIRTIO_BLK_F_MQ), queues=min(queues, 4))
    assert bench.driver.config(34, 2) == queues
    for index in range(min(queues, 4)):
        assert bench.driver.read(index, queue=index) == bytes([index]) * SECTOR_SIZE


def test_counters_say_what_was_done(bench):
    bench.start()
    bench.driver.read(0, 2)
    bench.driver.write(0, bytes(512))
    bench.driver.read(SECTORS)
    bench.driver.flush()
    bench.driver.serial()
    counters = bench.blk.counters()
    assert (counters.reads, counters.writes, counters.flushes, counters.others, counters.errors) == (2, 1, 1, 1, 1)
    assert (counters.bytes_read, counters.bytes_written) == (1024, 512)
    bench.driver.reset()
    assert bench.blk.counters() == counters, "they are the owner's, not the driver's"


def test_offered_features_are_a_function_of_the_disk():
    """What a wiring test may ask without opening anything."""
    assert offered_features(readonly=True, cache=Cache.DIRECT) & (RO | DISCARD | WRITE_ZEROES) == RO
    assert offered_features(readonly=False, cache=Cache.DIRECT) & (RO | DISCARD | WRITE_ZEROES) == (
        DISCARD | WRITE_ZEROES
    )

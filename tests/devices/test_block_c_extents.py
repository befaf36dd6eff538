"""The C engine's array of extents, compared with the readable table; and its rate limit."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpy._shim import ffi, lib
from kvmpy.devices.block_c_extents import DiskExtents
from kvmpy.devices.extent_table import ExtentTable
from kvmpy.devices.token_bucket import NANOSECONDS, TokenBucket
from kvmpy.errors import DiskError
from kvmpy.storage.disk import SECTOR_SIZE, ZEROS, Extent

SECTORS = 40
MOMENT_NS = 10


class Table:
    """A ``struct kvmpy_disk`` that has nothing but extents."""

    def __init__(self):
        self.disk = ffi.new("struct kvmpy_disk *")
        self.extents = DiskExtents(self.disk)

    def rows(self):
        return [self.disk.extents[i] for i in range(self.disk.nr_extents)]

    def sectors(self):
        """Say of each sector where it is: (fd, offset, writable)."""
        places = [None] * SECTORS
        for row in self.rows():
            fd = ZEROS if row.file == lib.KVMPY_ZEROS else self.disk.files[row.file].fd
            for i in range(row.sectors):
                assert places[row.sector + i] is None
                places[row.sector + i] = (fd, row.offset + i * SECTOR_SIZE * (fd != ZEROS), bool(row.writable))
        return places

    def missing(self, sector, sectors, writable):
        """The first run that is missing, as (sector, sectors), or None."""
        begin = ffi.new("uint64_t *")
        count = lib.kvmpy_disk_missing(self.disk, sector, sectors, writable, begin)
        return (begin[0], count) if count else None


@st.composite
def extents(draw):
    """A few extents that follow each other without a gap, as an image returns them."""
    sector = draw(st.integers(0, SECTORS - 1))
    found = []
    while not found or (sector < SECTORS and draw(st.booleans())):
        sectors = draw(st.integers(1, SECTORS - sector))
        fd = draw(st.sampled_from((ZEROS, 3, 4)))
        # Mostly at the offset where its neighbour would go on.
        offset = draw(st.sampled_from((0, sector, sector, sector + 7))) * SECTOR_SIZE if fd != ZEROS else 0
        found.append(Extent(sector, sectors, fd, offset, fd == 4, fd))
        sector += sectors
    return found


@given(st.lists(extents(), max_size=12))
def test_array_and_readable_table_are_the_same(splices):
    """After each splice: each sector, the first run that is missing from each range; and nothing is in two rows."""
    table, twin = Table(), ExtentTable()
    for each in splices:
        table.extents.splice(each)
        twin.splice(each)
        places = [twin.covering(sector, 1) for sector in range(SECTORS)]
        assert table.sectors() == [(e[0].fd, e[0].offset, e[0].writable) if e else None for e in places]
        for sector in range(0, SECTORS, 3):
            for sectors in (0, 1, 5, SECTORS - sector):
                assert table.missing(sector, sectors, False) == twin.first_gap(sector, sectors)
                assert table.missing(sector, sectors, True) == twin.first_unwritable(sector, sectors)
    for row, after in pairwise(table.rows()):
        assert row.sector + row.sectors <= after.sector


def test_neighbours_that_continue_each_other_become_one():
    """So a disk that is written from one end to the other has one extent at the end, not one a chunk."""
    table = Table()
    table.extents.splice([Extent(0, 1024, 3, 0, False, 3)])
    for sector in (*range(0, 1024, 16), *range(8, 1024, 16)):
        table.extents.splice([Extent(sector, 8, 4, sector * SECTOR_SIZE, True, 4)])
    (row,) = table.rows()
    assert (row.sector, row.sectors, row.offset, row.writable) == (0, 1024, 0, True)


def test_half_a_million_extents():
    """The array grows; a change in the middle is one."""
    table = Table()
    count = 500_000
    table.extents.replace(Extent(2 * i, 1, 3, 0, True, 3) for i in range(count))
    assert table.disk.nr_extents == count
    assert table.missing(count, 3, False) == (count + 1, 1)
    table.extents.splice([Extent(count, 3, 3, 512, True, 3)])
    assert table.missing(count, 3, True) is None
    assert table.disk.nr_extents == count - 1


def test_files_are_remembered():
    """What was written to a file that no extent is in any more is still for FLUSH."""
    table = Table()
    fds = range(100, 130)
    table.extents.replace([Extent(fd, 1, fd, 0, fd % 2 == 0, fd + 1000) for fd in fds])
    table.extents.replace([Extent(0, 1, 100)])
    files = [table.disk.files[i] for i in range(table.disk.nr_files)]
    assert [(file.fd, file.unaligned_fd, file.was_writable) for file in files] == [
        *((fd, fd + 1000, fd % 2 == 0) for fd in fds),
        (100, 100, 0),
    ]


@pytest.mark.parametrize("second", [Extent(3, 2, 3), Extent(0, 1, ZEROS)])
def test_extents_that_do_not_ascend_are_refused(second):
    table = Table()
    table.extents.splice([Extent(1, 1, 3)])
    with pytest.raises(DiskError):
        table.extents.splice([Extent(2, 2, 3), second])
    assert len(table.rows()) == 1


# --- the rate limit ---------------------------------------------------------------------------------------------


class Bucket:
    """C's bucket of bytes, with a given clock."""

    def __init__(self, rate):
        self.limits = ffi.new("struct kvmpy_limits *")
        self.limits.bytes.rate = rate

    def take(self, cost, now_ns):
        """As `TokenBucket.take`."""
        return lib.kvmpy_limits_take(self.limits, cost, now_ns + NANOSECONDS)  # it was full by then


@given(
    st.integers(10**3, 10**8).map(lambda hundreds: 100 * hundreds),
    st.lists(st.tuples(st.integers(1, 1 << 32), st.integers(0, NANOSECONDS)), max_size=30),
)
def test_both_buckets_let_pass_the_same(rate, requests):
    """And ask to wait as long, but for the moment that a double rounds."""
    bucket, twin = Bucket(rate), TokenBucket(rate, rate // 100)
    now_ns = 0
    for cost, passed_ns in requests:
        now_ns += passed_ns
        waits = [each.take(cost, now_ns) for each in (bucket, twin)]
        assert abs(waits[0] - waits[1]) <= MOMENT_NS
        now_ns += max(waits) + MOMENT_NS
        for each, waited in zip((bucket, twin), waits, strict=True):
            assert not waited or each.take(cost, now_ns) == 0


def test_rate_is_kept_over_time():
    """After the first 10 ms worth, as many in each second as were asked for (2 % are promised)."""
    bucket = Bucket(3333)
    now_ns = passed = 0
    while now_ns < 10 * NANOSECONDS:
        wait_ns = bucket.take(1, now_ns)
        now_ns += wait_ns
        passed += not wait_ns
    assert 33_330 <= passed <= 33_330 + 33 + 2


def test_request_larger_than_the_bucket_passes_and_leaves_its_debt():
    """However long the bucket was full before: that is worth no more than the bucket holds."""
    bucket = Bucket(1000)
    assert bucket.take(5000, 3600 * NANOSECONDS) == 0
    wait_ns = bucket.take(1, 3600 * NANOSECONDS)
    assert wait_ns == pytest.approx(4_990_000_000, abs=10)
    assert bucket.take(1, 3600 * NANOSECONDS + wait_ns) == 0


def test_request_pays_in_both_buckets_or_in_none():
    limits = Bucket(1000).limits
    limits.requests.rate = 10
    assert lib.kvmpy_limits_take(limits, 500, NANOSECONDS) == 0
    levels = limits.requests.level, limits.bytes.level
    assert lib.kvmpy_limits_take(limits, 500, NANOSECONDS) > 0
    assert (limits.requests.level, limits.bytes.level) == levels

"""Requests on the C engine: what a guest sees of its disk, when the image is asked, and what a failing host does."""

import os
import random

import pytest
from engine_rig import EVENT_IDX, FEATURES, PACKED, REQUESTS, Rig

from kvmpy._shim import lib
from kvmpy.conformance.driver import NO_STATUS, SEGMENT, write_request
from kvmpy.conformance.image import CHUNK, PatchworkImage, State, pattern
from kvmpy.conformance.layout import Buffer
from kvmpy.devices.block_c import CBlock
from kvmpy.storage.disk import SECTOR_SIZE
from kvmpy.storage.raw import open_raw

IN, OUT, FLUSH, GET_ID = lib.VIRTIO_BLK_T_IN, lib.VIRTIO_BLK_T_OUT, lib.VIRTIO_BLK_T_FLUSH, lib.VIRTIO_BLK_T_GET_ID
DISCARD, WRITE_ZEROES = lib.VIRTIO_BLK_T_DISCARD, lib.VIRTIO_BLK_T_WRITE_ZEROES
OK, IOERR, UNSUPP = lib.VIRTIO_BLK_S_OK, lib.VIRTIO_BLK_S_IOERR, lib.VIRTIO_BLK_S_UNSUPP
OWN, SHARED, ZERO, FULL = State
MIXED = [OWN, SHARED, ZERO, OWN, ZERO, SHARED, SHARED, OWN]
SECTORS = CHUNK * len(MIXED)


def make_rig(chunks=MIXED, hidden=(1, 4, 5), features=FEATURES, **options):
    """A rig whose disk has every kind of extent, some of which the table does not mention."""
    return Rig(PatchworkImage(chunks, hidden=hidden), features=features, make_engine=CBlock, **options)


def ranges(*each):
    """The segments of a DISCARD or WRITE_ZEROES."""
    return b"".join(SEGMENT.pack(*one) for one in each)


@pytest.fixture
def rig():
    with make_rig() as rig:
        yield rig
        assert rig.image.is_intact()


# --- what a guest sees --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [0, EVENT_IDX, PACKED, PACKED | EVENT_IDX])
@pytest.mark.parametrize("table", [None, 0x8_0000], ids=["direct", "indirect"])
def test_random_requests_against_a_bytearray(features, table):
    rng = random.Random(features)
    with make_rig(features=FEATURES | features) as rig:
        model = bytearray(rig.image.contents())
        for _ in range(100):
            sector = rng.randrange(SECTORS)
            count = rng.randint(0, min(SECTORS - sector, 20))
            start, end = sector * SECTOR_SIZE, (sector + count) * SECTOR_SIZE
            match rng.choice((IN, OUT, DISCARD, WRITE_ZEROES, FLUSH)):
                case lib.VIRTIO_BLK_T_IN:
                    answer = rig.request(IN, sector, data_in=end - start, table=table)
                    assert answer.data == model[start:end]
                    assert answer.written == end - start + 1
                case lib.VIRTIO_BLK_T_OUT:
                    model[start:end] = rng.randbytes(end - start)
                    answer = rig.request(OUT, sector, data_out=bytes(model[start:end]), table=table)
                case lib.VIRTIO_BLK_T_FLUSH:
                    answer = rig.request(FLUSH, data_out=b"ignored", table=table)
                case type:
                    model[start:end] = bytes(end - start)
                    answer = rig.request(type, data_out=ranges((sector, count, 0)), table=table)
            assert answer.status == OK
        assert rig.image.contents() == model
        assert rig.image.is_intact()


def test_data_is_scattered_over_any_segments(rig):
    """§2.7.4.1: how the driver cuts a request into buffers says nothing; the status is the last byte."""
    cuts = (1, 511, 513, 7, 4096, 1000)
    pieces = [*cuts, 40 * SECTOR_SIZE - sum(cuts) + 1]
    answer = rig.request(IN, 3, data_in=40 * SECTOR_SIZE, readable=(5, 10, 1), writable=pieces)
    assert answer.data == rig.image.contents()[3 * SECTOR_SIZE : 43 * SECTOR_SIZE]
    data = random.Random(1).randbytes(30 * SECTOR_SIZE)
    assert rig.request(OUT, 9, data_out=data, readable=(3, 600, 13, len(data) - 600)).status == OK
    assert rig.image.contents()[9 * SECTOR_SIZE : 39 * SECTOR_SIZE] == data


@pytest.mark.parametrize("size", [0, 1, 19, 20, 21, 4096])
def test_serial_number(size):
    """§5.2.6: 20 bytes, padded with NULs; not more of it than there is room (case 56)."""
    with make_rig(serial=b"disk 7") as rig:
        answer = rig.request(GET_ID, data_in=size)
        assert answer[:2] == (OK, min(size, 20) + 1)
        assert answer.data == b"disk 7".ljust(20, b"\0")[:size] + bytes([NO_STATUS]) * (size - 20)


def test_requests_without_data(rig):
    """Nothing is read, written or discarded, at the very end of the disk too."""
    assert rig.request(IN, SECTORS)[:2] == (OK, 1)
    assert rig.request(OUT, SECTORS)[:2] == (OK, 1)
    assert rig.request(DISCARD, data_out=ranges((SECTORS, 0, 0), (2, 0, 0)))[:2] == (OK, 1)
    assert rig.image.asked == 0


REFUSED = {
    "behind the end": (IN, SECTORS, b"", 512, IOERR),
    "over the end": (OUT, SECTORS - 1, bytes(1024), 0, IOERR),
    "sector 2^64-1": (IN, 2**64 - 1, b"", 512, IOERR),
    "that wraps": (OUT, 2**64 - 1, bytes(1024), 0, IOERR),
    "half a sector": (OUT, 0, bytes(511), 0, IOERR),
    "IN with data": (IN, 0, b"x", 512, IOERR),
    "OUT with room": (OUT, 0, bytes(512), 1, IOERR),
    "FLUSH of a sector": (FLUSH, 1, b"", 0, IOERR),
    "GET_ID with data": (GET_ID, 0, b"x", 20, IOERR),
    "no range": (DISCARD, 0, b"", 0, IOERR),
    "part of a range": (DISCARD, 0, ranges((0, 1, 0))[:15], 0, IOERR),
    "17 ranges": (WRITE_ZEROES, 0, ranges((0, 1, 0)) * 17, 0, IOERR),
    "a range with room": (DISCARD, 0, ranges((0, 1, 0)), 1, IOERR),
    "DISCARD with a flag": (DISCARD, 0, ranges((0, 1, 1)), 0, UNSUPP),
    "WRITE_ZEROES with flag 1": (WRITE_ZEROES, 0, ranges((0, 1, 2)), 0, UNSUPP),
    "range over the end": (DISCARD, 0, ranges((0, 1, 0), (1, SECTORS, 0)), 0, IOERR),
    "range that wraps": (WRITE_ZEROES, 0, ranges((0, 1, 0), (2**64 - 1, 2, 0)), 0, IOERR),
    "long range": (DISCARD, 0, ranges((0, 2**32 - 1, 0)), 0, IOERR),
    "SCSI": (lib.VIRTIO_BLK_T_SCSI_CMD, 0, b"", 0, UNSUPP),
    "BARRIER": (lib.VIRTIO_BLK_T_BARRIER, 0, b"", 512, UNSUPP),
    "a high bit": (1 << 31 | IN, 0, b"", 512, UNSUPP),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_refused_request_changes_its_status_only(rig, case):
    """Cases 50 to 57: completed with written = 1; no sector, and no byte of the data, was touched."""
    type, sector, data_out, data_in, status = case
    before = rig.image.dump()
    answer = rig.request(type, sector, data_out=data_out, data_in=data_in)
    assert answer == (status, 1, bytes([NO_STATUS]) * data_in)
    assert (rig.image.dump(), rig.image.asked) == (before, 0)
    assert rig.engine.counters().errors == 1


@pytest.mark.parametrize("type", [FLUSH, DISCARD, WRITE_ZEROES])
def test_request_without_its_feature_is_unsupported(type):
    with make_rig(features=0) as rig:
        assert rig.request(type, data_out=ranges((0, 1, 0))).status == UNSUPP


def test_header_of_15_bytes_and_no_status(rig):
    """Cases 47 and 48: without a header an error; without a status byte nobody hears of one."""
    short = rig.submit(FLUSH, data_in=1, readable=(15,))
    rig.memory.write(short.data_in, b"\0")  # it would make a whole header
    rig.queue.queue.process()
    assert rig.queue.answer(short)[:2] == (IOERR, 1)
    request = write_request(rig.memory, REQUESTS, OUT, 0, data_out=bytes(512))
    rig.queue.ring.add([*request.buffers[:-1], Buffer(request.status, 0, True)])
    rig.queue.ring.publish()
    rig.queue.queue.process()
    assert [used.written for used in rig.queue.ring.used()] == [0]
    assert rig.memory.read(request.status, 1)[0] == NO_STATUS
    assert rig.image.contents()[:SECTOR_SIZE] == pattern(0)


def test_readonly_disk_is_only_read():
    with Rig(PatchworkImage(MIXED, readonly=True), make_engine=CBlock) as rig:
        before = rig.image.dump()
        assert rig.request(OUT, 0, data_out=bytes(512)).status == IOERR
        assert rig.request(DISCARD, data_out=ranges((0, 1, 0))).status == IOERR
        assert rig.request(FLUSH).status == rig.request(IN, 0, data_in=512).status == OK
        assert (rig.image.dump(), rig.image.asked) == (before, 0)


def test_counters(rig):
    """A queue that was closed still counts, and leaves nothing else behind."""
    queue = rig.open_queue()
    queue.request(OUT, 0, data_out=bytes(1024))
    queue.request(OUT, SECTORS, data_out=bytes(1024))
    queue.queue.close()
    rig.request(IN, 0, data_in=512)
    rig.request(FLUSH)
    rig.request(GET_ID, data_in=20)
    assert rig.engine.counters() == (1, 2, 1, 1, 1, 512, 1024)
    assert len(rig.engine._queues) == 1


def test_cycles_are_added_up_on_demand(rig):
    rig.request(IN, 0, data_in=4096)
    assert rig.engine.cycles() == (0, 0, 0, 0)
    rig.engine.measure()
    rig.request(IN, 0, data_in=4096)
    cycles = rig.engine.cycles()
    assert 0 < cycles.interrupt < cycles.serving
    assert 0 < cycles.file < cycles.serving


# --- the image is asked -------------------------------------------------------------------------------------------


class Asked(PatchworkImage):
    """Remembers what it was asked."""

    def map(self, sector, sectors, *, write):
        self.questions.append((sector, sectors, write))
        return super().map(sector, sectors, write=write)

    def zero(self, sector, sectors):
        self.questions.append((sector, sectors))
        return super().zero(sector, sectors)


@pytest.fixture
def asked():
    with Rig(Asked(MIXED, hidden=[1, 4, 5]), make_engine=CBlock) as rig:
        rig.image.questions = []
        yield rig


def test_image_is_asked_for_each_run_that_is_missing_and_once(asked):
    """Of what is there nothing is asked; what was told is remembered, beyond what was asked too."""
    asked.request(IN, 9, data_in=30 * SECTOR_SIZE)
    assert asked.image.questions == [(9, 7, False), (32, 7, False)]
    asked.request(IN, 0, data_in=SECTORS * SECTOR_SIZE)
    assert asked.image.questions[2:] == [(40, 8, False)]


def test_image_makes_writable_what_is_not(asked):
    """Gaps, zeros and shared sectors are one run; what can be written in place ends it."""
    data = random.Random(1).randbytes(40 * SECTOR_SIZE)
    assert asked.request(OUT, 4, data_out=data).status == OK
    assert asked.image.questions == [(8, 16, True), (32, 12, True)]
    assert asked.image.contents()[4 * SECTOR_SIZE : 44 * SECTOR_SIZE] == data


def test_only_writable_ranges_are_zeroed_in_place(asked):
    """Where any sector of a range is not, the image zeroes all of it, and the others are C's."""
    assert asked.request(DISCARD, data_out=ranges((25, 3, 0), (7, 2, 0), (60, 4, 0), (7, 2, 0))).status == OK
    assert asked.image.questions == [(7, 2), (7, 2)]
    zeroed = [*range(25, 28), 7, 8, *range(16, 24), *range(32, 40), *range(60, 64)]
    expected = [bytes(512) if each in zeroed else pattern(each) for each in range(SECTORS)]
    assert asked.image.contents() == b"".join(expected)


@pytest.mark.parametrize(
    ("type", "flags", "kept"), [(DISCARD, 0, False), (WRITE_ZEROES, 1, False), (WRITE_ZEROES, 0, True)]
)
def test_room_is_given_back_or_kept(tmp_path, type, flags, kept):
    """§5.2.6.2: WRITE_ZEROES without unmap keeps its room; the size of the file stays."""
    path = tmp_path / "disk"
    path.write_bytes(os.urandom(256 * SECTOR_SIZE))
    with Rig(open_raw(os.fspath(path)), features=FEATURES, make_engine=CBlock) as rig:
        assert rig.request(type, data_out=ranges((0, 256, flags))).status == OK
    assert path.read_bytes() == bytes(256 * SECTOR_SIZE)
    assert (path.stat().st_blocks >= 256) == kept


def test_zeros_are_written_where_the_file_system_can_do_no_better():
    """A file in memory has no ZERO_RANGE: EOPNOTSUPP."""
    with make_rig([OWN] * 64, hidden=()) as rig:
        assert rig.request(WRITE_ZEROES, data_out=ranges((1, 300, 0))).status == OK
        expected = [pattern(each) if each < 1 or each > 300 else bytes(512) for each in range(512)]
        assert rig.image.contents() == b"".join(expected)

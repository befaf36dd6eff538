"""What a chain means: every way to cut it, every status, every limit; nothing is done yet."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmpy import MiB
from kvmpy._shim import lib
from kvmpy.devices import virtio_blk_config
from kvmpy.devices.block_request import (
    HEADER,
    IOERR,
    RANGE,
    RANGE_SECTORS_MAX,
    RANGES_MAX,
    UNSUPP,
    BlockRequest,
    Flush,
    GetId,
    Limits,
    Range,
    Read,
    Write,
    Zero,
    gather,
    parse,
    size_of,
    split,
)
from kvmpy.devices.virtqueue import Chain, Segment
from kvmpy.machine.memory import GuestMemory

IN, OUT, FLUSH, GET_ID = lib.VIRTIO_BLK_T_IN, lib.VIRTIO_BLK_T_OUT, lib.VIRTIO_BLK_T_FLUSH, lib.VIRTIO_BLK_T_GET_ID
DISCARD, WRITE_ZEROES = lib.VIRTIO_BLK_T_DISCARD, lib.VIRTIO_BLK_T_WRITE_ZEROES
ALL = sum(1 << bit for bit in (lib.VIRTIO_BLK_F_FLUSH, lib.VIRTIO_BLK_F_DISCARD, lib.VIRTIO_BLK_F_WRITE_ZEROES))
CAPACITY = 1 << 24
LIMITS = Limits(CAPACITY, readonly=False, features=ALL)
READABLE, WRITABLE = 0x1000, 0x9_0000


@pytest.fixture(scope="module")
def memory():
    with GuestMemory(1 * MiB) as memory:
        yield memory


def cut(gpa, size, sizes):
    """Cut ``size`` bytes from ``gpa`` on into segments of ``sizes``, and the rest."""
    segments = []
    for piece in sizes:
        piece = min(piece, size)
        segments.append(Segment(gpa, piece))
        gpa, size = gpa + piece, size - piece
    return (*segments, Segment(gpa, size))


def request(memory, type, sector=0, *, data_out=b"", data_in=0, limits=LIMITS, cuts=((16,), ())):
    """Parse a request whose readable and writable halves are cut as ``cuts`` says; check where its status goes."""
    readable = HEADER.pack(type, 0xFFFFFFFF, sector) + data_out
    memory.write(READABLE, readable)
    chain = Chain(0, cut(READABLE, len(readable), cuts[0]), cut(WRITABLE, data_in + 1, cuts[1]))
    parsed = parse(memory, chain, limits)
    assert isinstance(parsed, BlockRequest)
    assert (parsed.type, parsed.status_gpa) == (type, WRITABLE + data_in)
    return parsed.command


def ranges(*each):
    return b"".join(RANGE.pack(*one) for one in each)


# --- layout -----------------------------------------------------------------------------------------------------


def test_plain_layouts(memory):
    """§5.2.6: header, data, status."""
    assert request(memory, IN, 5, data_in=1024, cuts=((), (1024,))) == Read(5, (Segment(WRITABLE, 1024),))
    assert request(memory, OUT, 5, data_out=bytes(1024)) == Write(5, (Segment(READABLE + 16, 1024),))
    assert request(memory, FLUSH) == Flush()
    assert request(memory, GET_ID, data_in=20) == GetId((Segment(WRITABLE, 20),))


sizes = st.lists(st.sampled_from([0, 0, 1, 3, 8, 15, 16, 17, 511, 512, 513]), max_size=12)


@given(readable=sizes, writable=sizes)
@settings(max_examples=150, deadline=None)
def test_cuts_say_nothing(memory, readable, writable):
    """§2.7.4.1: the device MUST NOT make assumptions about the particular arrangement of descriptors (48, 49)."""
    cuts = (readable, writable)
    read = request(memory, IN, 5, data_in=1024, cuts=cuts)
    assert (read.sector, split(read.data, 1024)[1]) == (5, ())
    assert as_bytes(read.data) == list(range(WRITABLE, WRITABLE + 1024))
    write = request(memory, OUT, 6, data_out=bytes(1024), cuts=cuts)
    assert as_bytes(write.data) == list(range(READABLE + 16, READABLE + 16 + 1024))
    zero = request(memory, DISCARD, data_out=ranges((1, 2, 0), (3, 4, 0)), cuts=cuts)
    assert zero == Zero((Range(1, 2, True), Range(3, 4, True)))


def as_bytes(segments):
    """The gpa of each byte; no segment is empty."""
    assert all(size for _, size in segments)
    return [gpa + i for gpa, size in segments for i in range(size)]


@pytest.mark.parametrize("writable", [(), (Segment(WRITABLE, 0), Segment(2**64 - 1, 0))])
def test_chain_without_a_writable_byte_is_no_request(memory, writable):
    """There is nowhere to put a status (case 47)."""
    assert parse(memory, Chain(0, (Segment(READABLE, 512),), writable), LIMITS) is None


@pytest.mark.parametrize("size", [0, 1, 15])
def test_header_that_is_too_short(memory, size):
    """Case 48."""
    chain = Chain(0, (Segment(READABLE, size),), (Segment(WRITABLE, 100),))
    assert parse(memory, chain, LIMITS) == BlockRequest(None, IOERR, WRITABLE + 99)


def test_status_is_the_last_writable_byte(memory):
    """Case 49: behind it only segments of nothing."""
    chain = Chain(0, (Segment(READABLE, 16),), (Segment(WRITABLE, 7), Segment(0x5000, 3), Segment(2**64 - 1, 0)))
    assert parse(memory, chain, LIMITS).status_gpa == 0x5002


# --- reading and writing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("type", [IN, OUT])
@pytest.mark.parametrize(
    ("sector", "sectors", "accepted"),
    [
        (0, 1, True),
        (CAPACITY - 2, 2, True),
        (CAPACITY, 0, True),
        (0, 0, True),
        (CAPACITY - 1, 2, False),
        (CAPACITY, 1, False),
        (CAPACITY + 1, 0, False),
        (2**64 - 1, 1, False),
        (2**64 - 1, 0, False),
        (2**55, 1, False),
    ],
)
def test_only_what_is_on_the_disk(memory, type, sector, sectors, accepted):
    """§5.2.6.1: a driver MUST NOT submit a request which would cause a read or write beyond capacity (case 50)."""
    size = sectors * 512
    if type == IN:
        command = request(memory, IN, sector, data_in=size)
    else:
        command = request(memory, OUT, sector, data_out=bytes(size))
    assert (command != IOERR) == accepted
    assert not accepted or (command.sector, size_of(command.data)) == (sector, size)


@pytest.mark.parametrize("size", [1, 511, 513, 1023])
def test_only_whole_sectors(memory, size):
    """§5.2.6.1: the length of data MUST be a multiple of 512 (case 51)."""
    assert request(memory, IN, data_in=size) == IOERR
    assert request(memory, OUT, data_out=bytes(size)) == IOERR


def test_data_the_wrong_way_round(memory):
    """Case 52."""
    assert request(memory, IN, data_in=512, data_out=b"x") == IOERR
    assert request(memory, OUT, data_out=bytes(512), data_in=1) == IOERR


def test_read_only_disk_is_not_written(memory):
    """§5.2.6.2: a device MUST set the status to IOERR for a write request if RO was offered (case 53)."""
    limits = LIMITS._replace(readonly=True)
    assert request(memory, OUT, data_out=bytes(512), limits=limits) == IOERR
    assert request(memory, DISCARD, data_out=ranges((0, 1, 0)), limits=limits) == IOERR
    assert request(memory, WRITE_ZEROES, data_out=ranges((0, 1, 0)), limits=limits) == IOERR
    assert isinstance(request(memory, IN, data_in=512, limits=limits), Read)
    assert request(memory, FLUSH, limits=limits) == Flush()


# --- the others -------------------------------------------------------------------------------------------------

KNOWN = {IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES}
ODD = [lib.VIRTIO_BLK_T_SCSI_CMD, lib.VIRTIO_BLK_T_SECURE_ERASE, lib.VIRTIO_BLK_T_BARRIER, 2**31, 2**32 - 1]


@pytest.mark.parametrize("type", sorted({*range(20), *ODD} - KNOWN))
def test_unknown_type(memory, type):
    """§5.2.6: UNSUPP for a request unsupported by the device (case 54)."""
    assert request(memory, type) == UNSUPP
    assert request(memory, type, 2**64 - 1, data_out=b"x", data_in=3) == UNSUPP


@pytest.mark.parametrize(
    ("type", "feature"),
    [
        (FLUSH, lib.VIRTIO_BLK_F_FLUSH),
        (DISCARD, lib.VIRTIO_BLK_F_DISCARD),
        (WRITE_ZEROES, lib.VIRTIO_BLK_F_WRITE_ZEROES),
    ],
)
def test_type_whose_feature_was_not_negotiated(memory, type, feature):
    """Before anything else about it: not even its data is looked at."""
    for readonly in (False, True):
        limits = Limits(CAPACITY, readonly, ALL & ~(1 << feature))
        assert request(memory, type, 1, data_out=b"x", data_in=1, limits=limits) == UNSUPP


def test_flush_of_a_sector(memory):
    """§5.2.6.1: a driver MUST set sector to 0 for a flush (case 55). Its data is ignored."""
    assert request(memory, FLUSH, 1) == IOERR
    assert request(memory, FLUSH, 0, data_out=b"x", data_in=3) == Flush()


@pytest.mark.parametrize("size", [0, 19, 20, 4096])
def test_get_id_of_any_size(memory, size):
    """Case 56: how much is filled is decided later."""
    assert size_of(request(memory, GET_ID, data_in=size).data) == size
    assert request(memory, GET_ID, data_in=size, data_out=b"x") == IOERR


@pytest.mark.parametrize("type", [DISCARD, WRITE_ZEROES])
@pytest.mark.parametrize("data", [b"", bytes(15), bytes(17), bytes(16 * (RANGES_MAX + 1))])
def test_ranges_of_a_wrong_length(memory, type, data):
    """§5.2.6.1: one or more segments, at most max_discard_seg (case 57)."""
    assert request(memory, type, data_out=data) == IOERR


def test_limits_are_those_of_the_configuration_space():
    """§5.2.4: what the device says is what the parser holds the driver to."""
    assert (RANGES_MAX, RANGE_SECTORS_MAX) == (virtio_blk_config.RANGES_MAX, virtio_blk_config.RANGE_SECTORS_MAX)
    assert (16, 4 * MiB) == (RANGES_MAX, RANGE_SECTORS_MAX)


@pytest.mark.parametrize("type", [DISCARD, WRITE_ZEROES])
def test_ranges_and_their_limits(memory, type):
    """§5.2.6.1: at most max_discard_sectors each, none beyond the disk; as many as there may be."""
    each = [(0, 1, 0), (CAPACITY, 0, 0), (CAPACITY - 1, 1, 0), (0, RANGE_SECTORS_MAX, 0)] * (RANGES_MAX // 4)
    unmap = type == DISCARD
    assert request(memory, type, data_out=ranges(*each)) == Zero(tuple(Range(s, n, unmap) for s, n, _ in each))
    wrong = [(CAPACITY, 1), (CAPACITY + 1, 0), (CAPACITY - 1, 2), (0, RANGE_SECTORS_MAX + 1), (2**64 - 1, 2)]
    for sector, sectors in wrong:
        assert request(memory, type, data_out=ranges((0, 1, 0), (sector, sectors, 0))) == IOERR
    assert request(memory, type, data_out=ranges((0, 1, 0)), data_in=1) == IOERR


def test_range_flags(memory):
    """§5.2.6.2: UNSUPP if unmap is set in a discard, or any flag is set that is not defined."""
    assert request(memory, WRITE_ZEROES, data_out=ranges((7, 1, 1))) == Zero((Range(7, 1, unmap=True),))
    assert request(memory, WRITE_ZEROES, data_out=ranges((7, 1, 0))) == Zero((Range(7, 1, unmap=False),))
    assert request(memory, DISCARD, data_out=ranges((7, 1, 1))) == UNSUPP
    for flags in (2, 3, 2**31):
        assert request(memory, WRITE_ZEROES, data_out=ranges((7, 1, flags))) == UNSUPP
        assert request(memory, DISCARD, data_out=ranges((7, 1, flags))) == UNSUPP


def test_first_bad_range_decides(memory):
    """They are checked in order, flags before sectors, and all before anything is done."""
    bad_flag, bad_sector = (0, 1, 2), (CAPACITY, 1, 0)
    assert request(memory, DISCARD, data_out=ranges((0, 1, 0), bad_flag, bad_sector)) == UNSUPP
    assert request(memory, DISCARD, data_out=ranges((0, 1, 0), bad_sector, bad_flag)) == IOERR
    assert request(memory, DISCARD, data_out=ranges((CAPACITY, 1, 2))) == UNSUPP


# --- scattered bytes --------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 20), max_size=8), st.integers(0, 100))
def test_split_loses_no_byte(sizes, at):
    segments = [Segment(1000 * i, size) for i, size in enumerate(sizes)]
    front, back = split(segments, at)
    every = [gpa + i for gpa, size in segments for i in range(size)]
    assert (as_bytes(front), as_bytes(back)) == (every[:at], every[at:])


def test_gather_reads_in_order(memory):
    memory.write(0, b"abcdef")
    assert gather(memory, (Segment(4, 2), Segment(0, 3))) == b"efabc"

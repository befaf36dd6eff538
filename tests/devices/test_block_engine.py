"""Requests, executed: what a guest sees of its disk, what the files hold, and what a failing host does to both."""

import errno
import os
import random

import pytest
from engine_rig import EVENT_IDX, FEATURES, PACKED

from kvmpy import MiB
from kvmpy._shim import lib
from kvmpy.conformance.driver import HEADER, NO_STATUS, SEGMENT
from kvmpy.conformance.image import CHUNK, PatchworkImage, State, pattern
from kvmpy.conformance.layout import Buffer
from kvmpy.devices.block_request import RANGES_MAX
from kvmpy.errors import DiskError
from kvmpy.storage.convert import create
from kvmpy.storage.disk import SECTOR_SIZE, Extent, SyncFailed
from kvmpy.storage.open import open_disk
from kvmpy.storage.raw import open_raw

IN, OUT, FLUSH, GET_ID = lib.VIRTIO_BLK_T_IN, lib.VIRTIO_BLK_T_OUT, lib.VIRTIO_BLK_T_FLUSH, lib.VIRTIO_BLK_T_GET_ID
DISCARD, WRITE_ZEROES = lib.VIRTIO_BLK_T_DISCARD, lib.VIRTIO_BLK_T_WRITE_ZEROES
OK, IOERR, UNSUPP = lib.VIRTIO_BLK_S_OK, lib.VIRTIO_BLK_S_IOERR, lib.VIRTIO_BLK_S_UNSUPP
UNMAP = lib.VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP
MIXED = [State.OWN, State.SHARED, State.ZERO, State.OWN, State.ZERO, State.SHARED, State.SHARED, State.OWN]
SECTORS = CHUNK * len(MIXED)


def mixed(**options):
    """A disk of every kind of extent, some of which the table does not mention."""
    return PatchworkImage(MIXED, hidden=[1, 4, 5], **options)


def sectors_of(*each):
    """The segments of a DISCARD or WRITE_ZEROES."""
    return b"".join(SEGMENT.pack(*one) for one in each)


@pytest.fixture
def rig(make_rig):
    with make_rig(mixed()) as rig:
        yield rig
        assert rig.image.is_intact()


# --- what a guest sees ------------------------------------------------------------------------------------------


def test_whole_disk_is_read(rig):
    """§5.2.6: IN populates data with the contents of sectors, over extents, zeros and gaps."""
    answer = rig.request(IN, data_in=SECTORS * SECTOR_SIZE)
    assert (answer.status, answer.written) == (OK, SECTORS * SECTOR_SIZE + 1)
    assert answer.data == rig.image.contents()
    assert answer.data[:SECTOR_SIZE] == pattern(0)


def test_written_bytes_are_on_the_disk_and_nowhere_else(rig):
    before = rig.image.contents()
    data = random.Random(1).randbytes(50 * SECTOR_SIZE)
    assert rig.request(OUT, 7, data_out=data)[:2] == (OK, 1)
    assert rig.image.contents() == before[: 7 * SECTOR_SIZE] + data + before[57 * SECTOR_SIZE :]


@pytest.mark.parametrize("features", [0, EVENT_IDX, PACKED, PACKED | EVENT_IDX])
@pytest.mark.parametrize("table", [None, 0x8_0000], ids=["direct", "indirect"])
def test_random_requests_against_a_bytearray(make_rig, features, table):
    """The plainest disk there is, and every kind of ring."""
    rng = random.Random(features)
    with make_rig(mixed(), features=FEATURES | features, size=64) as rig:
        model = bytearray(rig.image.contents())
        for _ in range(60):
            sector = rng.randrange(SECTORS)
            count = rng.randint(0, min(SECTORS - sector, 20))
            start, end = sector * SECTOR_SIZE, (sector + count) * SECTOR_SIZE
            type = rng.choice((IN, OUT, DISCARD, WRITE_ZEROES, FLUSH))
            cuts = {"readable": cuts_of(rng, 16 + (end - start if type == OUT else 0))}
            if type == IN:
                cuts = {"writable": cuts_of(rng, end - start + 1)}
                answer = rig.request(IN, sector, data_in=end - start, table=table, **cuts)
                assert answer.data == model[start:end]
            elif type == OUT:
                model[start:end] = rng.randbytes(end - start)
                answer = rig.request(OUT, sector, data_out=bytes(model[start:end]), table=table, **cuts)
            elif type == FLUSH:
                answer = rig.request(FLUSH, table=table, **cuts)
            else:
                flags = UNMAP if type == WRITE_ZEROES and rng.random() < 0.5 else 0
                model[start:end] = bytes(end - start)
                answer = rig.request(type, data_out=sectors_of((sector, count, flags)), table=table)
            assert (answer.status, answer.written) == (OK, len(answer.data) + 1)
        assert rig.image.contents() == model
        assert rig.image.is_intact()


def cuts_of(rng, size):
    """Cut ``size`` bytes at up to ten places."""
    places = sorted(rng.randrange(size + 1) for _ in range(rng.randrange(10)))
    return [b - a for a, b in zip([0, *places], [*places, size], strict=True)]


@pytest.mark.parametrize("serial", [b"", b"disk-0", b"x" * 20])
@pytest.mark.parametrize("size", [0, 1, 19, 20, 21, 4096])
def test_serial_number(make_rig, serial, size):
    """§5.2.6: NUL-padded, up to 20 bytes; of 20 there is no terminator (case 56)."""
    with make_rig(mixed(), serial=serial) as rig:
        answer = rig.request(GET_ID, data_in=size, writable=[size // 3, size - size // 3, 1])
        filled = min(size, 20)
        assert (answer.status, answer.written) == (OK, filled + 1)
        assert answer.data == serial.ljust(20, b"\0")[:filled] + bytes([NO_STATUS]) * (size - filled)


@pytest.mark.parametrize("type", [DISCARD, WRITE_ZEROES])
def test_zeroed_ranges_read_as_zeros(rig, type):
    """§5.2.6.2: after a write zeroes command, reads MUST return zeroes. Ours do after a discard too."""
    before = bytearray(rig.image.contents())
    each = [(0, 1), (5, 6), (15, 20), (40, 0), (SECTORS - 1, 1), (0, 3)]
    for sector, count in each:
        before[sector * SECTOR_SIZE : (sector + count) * SECTOR_SIZE] = bytes(count * SECTOR_SIZE)
    assert rig.request(type, data_out=sectors_of(*[(s, n, 0) for s, n in each])).status == OK
    assert rig.image.contents() == before
    assert rig.request(IN, data_in=SECTORS * SECTOR_SIZE).data == before


@pytest.mark.parametrize(("type", "flags", "kept"), [(DISCARD, 0, 0), (WRITE_ZEROES, UNMAP, 0), (WRITE_ZEROES, 0, 64)])
def test_room_is_given_back_or_kept(make_rig, tmp_path, type, flags, kept):
    """A hole for DISCARD and "unmap"; write zeroes without it keeps what is allocated."""
    path = tmp_path / "disk"
    with open(path, "wb") as file:
        file.write(b"x" * 128 * SECTOR_SIZE)
        file.flush()
        os.fsync(file.fileno())
    with make_rig(open_raw(os.fspath(path))) as rig:
        assert rig.request(type, data_out=sectors_of((32, 64, flags))).status == OK
    assert path.read_bytes() == b"x" * 32 * 512 + bytes(64 * 512) + b"x" * 32 * 512
    assert path.stat().st_blocks == 64 + kept


def test_all_ranges_are_checked_before_any_takes_effect(rig):
    before = rig.image.dump()
    for last, status in (((SECTORS, 1, 0), IOERR), ((0, 1, 2), UNSUPP)):
        ranges = [(0, 1, 0)] * (RANGES_MAX - 1)
        assert rig.request(DISCARD, data_out=sectors_of(*ranges, last))[:2] == (status, 1)
    assert rig.image.dump() == before


def test_longest_chain(make_rig):
    """256 buffers, each of its own."""
    with make_rig(mixed(), size=256) as rig:
        answer = rig.request(IN, data_in=32 * SECTOR_SIZE, writable=[65] * 252 + [4, 1])
        assert answer.data == rig.image.contents()[: 32 * SECTOR_SIZE]


# --- the order of effects ---------------------------------------------------------------------------------------


def chain(rig, *buffers):
    """Serve a chain of these buffers."""
    rig.queue.ring.add(buffers)
    rig.queue.ring.publish()
    assert rig.queue.queue.process() is None
    return rig.queue.ring.used()[0].written


def read_header(rig, sector):
    """Return the header of an IN request, as a buffer."""
    rig.memory.write(0x1F_0000, HEADER.pack(IN, 0, sector))
    return Buffer(0x1F_0000, HEADER.size)


def test_status_on_top_of_data_and_header(rig):
    """Case 21: the status comes last, wherever it lies."""
    header = read_header(rig, 0)
    assert chain(rig, header, Buffer(0x20_0000, 512, True), Buffer(0x20_0010, 1, True)) == 513
    assert rig.memory.read(0x20_0000, 512) == pattern(0)[:16] + bytes([OK]) + pattern(0)[17:]
    assert chain(rig, header, Buffer(0x20_0000, 512, True), Buffer(header.gpa, 1, True)) == 513
    assert rig.memory.read(header.gpa, 1) == bytes([OK])


def test_overlapping_buffers_are_filled_in_order(rig):
    header = read_header(rig, 0)
    chain(rig, header, Buffer(0x20_0000, 512, True), Buffer(0x20_0100, 512, True), Buffer(0x21_0000, 1, True))
    assert rig.memory.read(0x20_0000, 768) == pattern(0)[:256] + pattern(1)


def test_chain_without_a_writable_byte_comes_back(rig):
    """Case 47: nothing is done, nothing is counted, and the head is not lost."""
    before = rig.image.dump()
    rig.memory.write(0x20_0000, HEADER.pack(OUT, 0, 0) + bytes(512))
    assert chain(rig, Buffer(0x20_0000, 528)) == 0
    assert rig.image.dump() == before
    assert sum(rig.engine.counters()) == 0


@pytest.mark.parametrize("type", [IN, OUT, FLUSH, GET_ID, DISCARD, 77])
def test_refused_request_touches_nothing_but_its_status(rig, type):
    """§5.2.6: the status byte, and written = 1."""
    before = rig.image.dump()
    answer = rig.request(type, 2**64 - 1, data_out=b"x", data_in=1024)
    assert answer[:2] == (IOERR if type in (IN, OUT, FLUSH, GET_ID, DISCARD) else UNSUPP, 1)
    assert answer.data == bytes([NO_STATUS]) * 1024
    assert rig.image.dump() == before


# --- a failing host ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), DiskError("damaged")])
def test_image_that_fails_is_an_io_error(rig, error):
    """And the disk lives on (case 59)."""
    before = rig.image.contents()
    rig.image.failing = error
    assert rig.request(IN, CHUNK, data_in=512)[:2] == (IOERR, 1)
    assert rig.request(OUT, 0, data_out=bytes(20 * SECTOR_SIZE)).status == IOERR
    assert rig.request(DISCARD, data_out=sectors_of((0, 20, 0))).status == IOERR
    rig.image.failing = None
    assert rig.image.contents() == before, "not one byte of what could not be written whole"
    assert rig.request(IN, CHUNK, data_in=512).data == pattern(CHUNK)


def test_image_that_fails_to_sync_has_lost_something(make_rig):
    """The kernel tells of an fdatasync that failed only once: a later FLUSH would wrongly succeed."""
    with make_rig(mixed()) as rig:
        for reason in (errno.ENOSPC, errno.EIO):  # a sector that cannot be read, say: nothing is lost by it
            rig.image.failing = OSError(reason, "refused")
            assert rig.request(OUT, CHUNK, data_out=bytes(512)).status == IOERR
            assert rig.request(FLUSH).status == OK
        rig.image.failing = SyncFailed(errno.EDQUOT, "lost")
        assert rig.request(OUT, CHUNK, data_out=bytes(512)).status == IOERR
        rig.image.failing = None
        assert rig.request(FLUSH).status == IOERR
        assert rig.request(IN, CHUNK, data_in=512).data == pattern(CHUNK)


def test_truncated_file_is_an_io_error(make_rig):
    """A short read, at once or in the middle; where there is something it is still read."""
    with make_rig(mixed()) as rig:
        rig.image.truncate(1)
        assert rig.request(IN, 0, data_in=2 * SECTOR_SIZE)[:2] == (IOERR, 1)
        assert rig.request(IN, 2, data_in=SECTOR_SIZE)[:2] == (IOERR, 1)
        assert rig.request(IN, 0, data_in=SECTOR_SIZE).data == pattern(0)


def test_full_disk_is_an_io_error(make_rig):
    """ENOSPC of the file itself: /dev/full takes nothing."""
    with make_rig(PatchworkImage([State.FULL])) as rig:
        assert rig.request(OUT, data_out=bytes(512)).status == IOERR
        assert rig.request(WRITE_ZEROES, data_out=sectors_of((0, 1, 0))).status == IOERR
        assert rig.request(IN, data_in=512)[:2] == (OK, 513)


class Device:
    """An image on a device that takes every write and no hole."""

    size, readonly, alignment = 4096, False, 1

    def __init__(self):
        self.fd = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)

    def table(self):
        return [Extent(0, 8, self.fd, 0, True, self.fd)]

    def close(self):
        os.close(self.fd)


@pytest.mark.parametrize("type", [DISCARD, WRITE_ZEROES])
def test_hole_that_is_refused_is_an_io_error(make_rig, type):
    """Zeros are written only where the file system knows no holes (EOPNOTSUPP), not whenever something is wrong."""
    with make_rig(Device()) as rig:
        assert rig.request(type, data_out=sectors_of((0, 1, 0))).status == IOERR


class Idle:
    """An image that does not do what it is asked."""

    size, readonly, alignment = 4096, False, 1

    def __init__(self):
        self.asked = []

    def table(self):
        return []

    def map(self, sector, sectors, *, write):
        self.asked.append((sector, sectors, write))
        return [Extent(0, 0, 0)]

    def close(self):
        pass


def test_image_that_does_not_map_is_an_io_error(make_rig):
    """Rather than asked for ever."""
    with make_rig(Idle()) as rig:
        assert rig.request(IN, 1, data_in=1024).status == IOERR
        assert rig.request(OUT, 3, data_out=bytes(512)).status == IOERR
        assert rig.image.asked == [(1, 2, False), (3, 1, True)]


# --- alignment --------------------------------------------------------------------------------------------------


class TwoFiles:
    """An image whose aligned and unaligned transfers go to different files, to be told apart."""

    size, readonly, alignment = 16 * 4096, False, 4096

    def __init__(self):
        self.fds = [os.memfd_create(name) for name in ("aligned", "unaligned")]
        for fd, byte in zip(self.fds, b"AU", strict=True):
            os.pwrite(fd, bytes([byte]) * (self.size + 8192), 0)

    def table(self):
        aligned, unaligned = self.fds
        sectors = self.size // SECTOR_SIZE // 2
        return [
            Extent(0, sectors, aligned, 0, True, unaligned),
            Extent(sectors, sectors, aligned, self.size // 2 + 512, True, unaligned),
        ]

    def close(self):
        while self.fds:
            os.close(self.fds.pop())


@pytest.mark.parametrize(
    ("sector", "cuts", "byte"),
    [
        (0, [(0x20_0000, 4096)], b"A"),
        (8, [(0x20_0000, 4096), (0x21_1000, 8192)], b"A"),
        (1, [(0x20_0000, 4096)], b"U"),
        (0, [(0x20_0200, 4096)], b"U"),
        (0, [(0x20_0000, 512)], b"U"),
        (0, [(0x20_0000, 4096), (0x21_0200, 4096)], b"U"),
        (0, [(0x20_0000, 2048), (0x20_0800, 2048)], b"U"),
        (64, [(0x20_0000, 4096)], b"U"),
        (56, [(0x20_0000, 8192)], b"AU"),
    ],
)
def test_only_what_is_aligned_goes_past_the_page_cache(make_rig, sector, cuts, byte):
    """O_DIRECT wants offset, lengths and addresses aligned: the offset in the file, the address on the host.

    Each piece of a transfer is judged by itself, so a buffer may hold the bytes of both.
    """
    with make_rig(TwoFiles()) as rig:
        header = read_header(rig, sector)
        chain(rig, header, *[Buffer(gpa, size, True) for gpa, size in cuts], Buffer(0x30_0000, 1, True))
        assert rig.memory.read(0x30_0000, 1) == bytes([OK])
        for gpa, size in cuts:
            assert rig.memory.read(gpa, size) == b"".join(bytes([each]) * (size // len(byte)) for each in byte)


def test_direct_disk_is_read_and_written(make_rig, tmp_path):
    """On a real file with O_DIRECT: aligned, unaligned, and zeros where nothing is."""
    path = tmp_path / "disk"
    path.write_bytes(random.Random(2).randbytes(1 * MiB))
    model = bytearray(path.read_bytes())
    rng = random.Random(3)
    with make_rig(open_raw(os.fspath(path), direct=True)) as rig:
        assert rig.image.alignment > 1
        for _ in range(40):
            count = rng.choice((1, 8, 16, 64))
            sector = rng.randrange(0, 2048 - count, rng.choice((1, 8)))
            start, end = sector * SECTOR_SIZE, (sector + count) * SECTOR_SIZE
            gpa = 0x10_0000 - 16 if rng.random() < 0.5 else 0x10_0000  # the data is behind the header
            if rng.random() < 0.5:
                model[start:end] = rng.randbytes(end - start)
                assert rig.request(OUT, sector, data_out=bytes(model[start:end]), gpa=gpa).status == OK
            else:
                assert rig.request(IN, sector, data_in=end - start, gpa=gpa).data == model[start:end]
    assert path.read_bytes() == model


@pytest.mark.parametrize("reason", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_flush_is_not_believed_after_a_vhd_failed_to_grow(make_rig, tmp_path, monkeypatch, reason):
    """The sync of the growth hears of what the guest wrote before and did not flush, and nobody hears of it again."""
    path = str(tmp_path / "disk.vhd")
    create(path, 16 * MiB, format="vhd-dynamic")
    with make_rig(open_disk(path, format="vhd")) as rig:
        assert rig.request(OUT, 0, data_out=bytes(512)).status == OK

        def fail(fd):
            raise OSError(reason, os.strerror(reason))

        with monkeypatch.context() as patch:
            patch.setattr(os, "fdatasync", fail)
            assert rig.request(OUT, 8192, data_out=bytes(512)).status == IOERR
        assert rig.request(FLUSH).status == IOERR

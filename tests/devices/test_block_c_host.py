"""The C engine and its host: files that fail, images that fail, what is durable, and O_DIRECT."""

import errno

import pytest
from engine_rig import FEATURES, Rig

from kvmpy._shim import lib
from kvmpy.conformance.driver import NO_STATUS, SEGMENT
from kvmpy.conformance.image import CHUNK, PatchworkImage, State, pattern
from kvmpy.devices.block_c import CBlock
from kvmpy.devices.virtqueue import Fault
from kvmpy.errors import DiskError
from kvmpy.storage.disk import SECTOR_SIZE, SyncFailed

IN, OUT, FLUSH = lib.VIRTIO_BLK_T_IN, lib.VIRTIO_BLK_T_OUT, lib.VIRTIO_BLK_T_FLUSH
DISCARD, WRITE_ZEROES = lib.VIRTIO_BLK_T_DISCARD, lib.VIRTIO_BLK_T_WRITE_ZEROES
OK, IOERR = lib.VIRTIO_BLK_S_OK, lib.VIRTIO_BLK_S_IOERR
OWN, SHARED, ZERO, FULL = State
MIXED = [OWN, SHARED, ZERO, OWN, ZERO, SHARED, SHARED, OWN]
SECTORS = CHUNK * len(MIXED)


def make_rig(chunks=MIXED, hidden=(1, 4, 5)):
    return Rig(PatchworkImage(chunks, hidden=hidden), features=FEATURES, make_engine=CBlock)


def ranges(*each):
    """The segments of a DISCARD or WRITE_ZEROES."""
    return b"".join(SEGMENT.pack(*one) for one in each)


@pytest.fixture
def rig():
    with make_rig() as rig:
        yield rig
        assert rig.image.is_intact()


# --- a failing host -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), DiskError("damaged")])
def test_image_that_fails_is_an_io_error(rig, error):
    """Not one byte of what could not be written whole is; and the disk lives on (case 59)."""
    before = rig.image.contents()
    rig.image.failing = error
    assert rig.request(IN, CHUNK, data_in=512) == (IOERR, 1, bytes([NO_STATUS]) * 512)
    assert rig.request(OUT, 0, data_out=bytes(20 * SECTOR_SIZE))[:2] == (IOERR, 1)
    assert rig.request(DISCARD, data_out=ranges((0, 20, 0)))[:2] == (IOERR, 1)
    assert rig.image.contents() == before
    rig.image.failing = None
    assert rig.request(IN, CHUNK, data_in=512).data == pattern(CHUNK)
    assert rig.request(FLUSH).status == OK


def test_failed_sync_of_the_image_spoils_every_later_flush(rig):
    """The kernel tells of it once, and forgets the pages."""
    rig.image.failing = SyncFailed(errno.ENOSPC, "lost")
    assert rig.request(OUT, CHUNK, data_out=bytes(512)).status == IOERR
    rig.image.failing = None
    assert rig.request(OUT, CHUNK, data_out=bytes(512)).status == OK
    assert rig.request(FLUSH).status == IOERR


def test_disk_that_shrinks_while_a_request_waits(rig):
    """What was on the disk when the request was parsed may not be when it is executed."""

    def shrink():
        rig.engine._disk.capacity = 2 * CHUNK  # as `exclusive` does, before the answer is there

    before = rig.image.contents()[2 * CHUNK * SECTOR_SIZE :]
    rig.image.on_ask = shrink
    assert rig.request(OUT, CHUNK, data_out=bytes(3 * CHUNK * SECTOR_SIZE)).status == IOERR
    rig.engine._disk.capacity = SECTORS
    zeroed = ranges((CHUNK, 1, 0), (SECTORS - 1, 1, 0))
    with rig.engine.exclusive():
        rig.image._states[CHUNK] = State.SHARED
    assert rig.request(DISCARD, data_out=zeroed).status == IOERR
    assert rig.image.contents()[2 * CHUNK * SECTOR_SIZE :] == before


def test_notifications_stay_as_they_are_over_a_question(rig):
    """It is asked in the middle of a batch: nothing is switched off anew behind it."""
    flags = rig.queue.setup.device_area
    rig.image.on_ask = lambda: rig.memory.write(flags, b"\x55")
    rig.submit(OUT, CHUNK, data_out=bytes(512))
    rig.queue.ring.offer(0xFFFF)
    rig.queue.ring.publish()
    assert rig.queue.queue.process() is Fault.HEAD
    assert rig.memory.read(flags, 1) == b"\x55"


class Idle(PatchworkImage):
    """Does not do what it is asked."""

    def map(self, sector, sectors, *, write):
        self.asked += 1
        return []


def test_image_that_does_not_map_is_an_io_error():
    """Rather than asked for ever."""
    with Rig(Idle(MIXED, hidden=[1]), make_engine=CBlock) as rig:
        assert rig.request(IN, 9, data_in=1024).status == IOERR
        assert rig.request(OUT, 9, data_out=bytes(512)).status == IOERR
        assert rig.image.asked == 2


def test_truncated_file_is_an_io_error():
    """A short read, at once or in the middle; where there is something it is still read."""
    with make_rig() as rig:
        rig.image.truncate(2)
        assert rig.request(IN, 0, data_in=4 * SECTOR_SIZE)[:2] == (IOERR, 1)
        assert rig.request(IN, 3, data_in=SECTOR_SIZE)[:2] == (IOERR, 1)
        assert rig.request(IN, 0, data_in=2 * SECTOR_SIZE).data == pattern(0) + pattern(1)


def test_full_disk_is_an_io_error():
    """ENOSPC: /dev/full takes nothing. What it cannot sync, no later flush believes."""
    with make_rig([FULL, OWN], hidden=()) as rig:
        assert rig.request(OUT, 0, data_out=bytes(512)).status == IOERR
        assert rig.request(WRITE_ZEROES, data_out=ranges((0, 1, 0))).status == IOERR
        assert rig.request(OUT, CHUNK, data_out=bytes(512)).status == OK
        assert rig.request(FLUSH).status == IOERR


def test_write_is_durable_or_an_error_when_there_is_no_writeback():
    """§5.2.6.2: in writethrough mode it completes when it is; /dev/full cannot be synced, so that is seen."""
    with make_rig([FULL, OWN], hidden=()) as rig:
        rig.engine.set_writeback(False)
        assert rig.request(OUT, CHUNK, data_out=bytes(512)).status == IOERR
        assert rig.request(DISCARD, data_out=ranges((CHUNK, 1, 0))).status == IOERR
        assert rig.request(IN, CHUNK, data_in=512).status == OK
    with make_rig([OWN]) as rig:
        rig.engine.set_writeback(False)
        assert rig.request(OUT, 0, data_out=bytes(512)).status == OK
        rig.engine._disk.sync_failed = True
        assert rig.request(OUT, 0, data_out=bytes(512)).status == IOERR
        rig.engine.set_writeback(True)
        assert rig.request(OUT, 0, data_out=bytes(512)).status == OK
        assert rig.request(FLUSH).status == IOERR

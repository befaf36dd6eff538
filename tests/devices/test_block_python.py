"""What of the Python engine can be seen from inside only: the order of its effects, and what it makes durable when."""

import errno
import os
import select
import time

import pytest
from engine_rig import TIME_LIMIT, Rig
from watched_memory import WatchedMemory

from kvmpy import MiB
from kvmpy._shim import lib
from kvmpy.conformance.driver import SEGMENT
from kvmpy.conformance.image import CHUNK, PatchworkImage, State, pattern
from kvmpy.devices.block_execute import BlockExecutor
from kvmpy.devices.block_python import PythonBlock
from kvmpy.devices.block_request import Flush, GetId, Range, Read, Refused, Write, Zero
from kvmpy.devices.virtqueue import Segment
from kvmpy.machine.memory import GuestMemory

IN, OUT, FLUSH, DISCARD = lib.VIRTIO_BLK_T_IN, lib.VIRTIO_BLK_T_OUT, lib.VIRTIO_BLK_T_FLUSH, lib.VIRTIO_BLK_T_DISCARD
OK, IOERR = lib.VIRTIO_BLK_S_OK, lib.VIRTIO_BLK_S_IOERR
SECTOR = bytes(512)


def plain(chunks=4):
    """A disk that is written in place."""
    return PatchworkImage([State.OWN] * chunks)


@pytest.fixture
def rig():
    with Rig(plain(), make_engine=PythonBlock) as rig:
        yield rig


def test_data_then_status_then_used_entry():
    """§2.7.8.2: all is written before the used idx is."""
    with Rig(plain(), make_engine=PythonBlock, memory=WatchedMemory(4 * MiB)) as rig:
        request = rig.submit(IN, data_in=512)
        rig.memory.touched.clear()
        rig.queue.queue.process()
        used_idx = rig.queue.setup.device_area + 2
        touched = [gpa for gpa, _ in rig.memory.touched]
        order = [request.data_in, request.status, used_idx]
        assert [gpa for gpa in touched if gpa in order] == order


def test_chain_that_comes_while_notifications_are_off_is_served(rig):
    """§2.7.10: they are turned on again, and then the ring is looked at again."""
    memory_write = rig.memory.write
    late = []

    def write(gpa, data):
        memory_write(gpa, data)
        if gpa == rig.queue.setup.device_area and bytes(data) == b"\0\0" and not late:
            late.append(rig.submit(IN, 1, data_in=512, gpa=0x18_0000))

    rig.memory.write = write
    rig.submit(IN, 0, data_in=512)
    assert rig.queue.queue.process() is None
    assert len(rig.queue.ring.used()) == 2


def test_kick_is_taken_back(rig):
    """Else the thread would never sleep again."""
    rig.queue.kick()
    rig.queue.start()
    deadline = time.monotonic() + TIME_LIMIT
    while select.select([rig.queue.kick_fd], [], [], 0)[0]:
        assert time.monotonic() < deadline


def test_price_of_a_command():
    """One request each; bytes only where data moves; what changes nothing is free."""
    with Rig(plain(), make_engine=PythonBlock, iops=1, bps=1) as rig:
        data = (Segment(0, 512), Segment(0, 1024))
        for command in (Read(0, data), Write(0, data)):
            assert [price for _, price in rig.engine.tolls(command)] == [1, 1536]
        for command in (Read(0, ()), Zero((Range(0, 8, True),))):
            assert [price for _, price in rig.engine.tolls(command)] == [1]
        for command in (Flush(), GetId(data), Refused(IOERR)):
            assert rig.engine.tolls(command) == []


def test_disk_that_shrinks_while_a_request_waits():
    """It was checked against the old capacity when it was parsed: it is checked again."""
    with GuestMemory(1 * MiB) as memory, PatchworkImage([State.OWN, State.SHARED]) as image:
        executor = BlockExecutor(memory, image, b"")
        image.resize(CHUNK)
        executor.reload()
        data = (Segment(0, 512),)
        for command in (Read(CHUNK, data), Write(CHUNK, data), Zero((Range(CHUNK - 1, 2, True),))):
            assert executor.execute(command).status == IOERR
        assert executor.execute(Write(CHUNK - 1, data)).status == OK
        assert image.asked == 0


# --- durability -------------------------------------------------------------------------------------------------


@pytest.fixture
def synced(monkeypatch):
    """Record each fdatasync, and let it fail while there is something in the second list."""
    fds, failures = [], []

    def fdatasync(fd):
        fds.append(fd)
        if failures:
            raise OSError(failures.pop(), "planted")

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    return fds, failures


def test_flush_syncs_all_that_was_ever_writable(synced):
    """§5.2.6.2: writes that were completed before MUST be committed; also those in files that are frozen since."""
    fds, _ = synced
    with Rig(PatchworkImage([State.OWN, State.SHARED]), make_engine=PythonBlock) as rig:
        first, second, shared = (rig.image._fds[i] for i in range(3))
        assert rig.request(FLUSH).status == OK
        assert fds == [first]
        assert rig.request(OUT, CHUNK, data_out=SECTOR).status == OK
        rig.image.readonly = True  # its table has no writable extent any more
        with rig.engine.exclusive():
            pass
        fds.clear()
        assert rig.request(FLUSH).status == OK
        assert fds == [first, second]
        assert shared not in fds


def test_writethrough_syncs_each_write_before_it_is_completed(synced):
    """§5.2.6.2: the device MUST ensure that stable writes are committed before reporting completion."""
    fds, _ = synced
    with Rig(plain(), make_engine=PythonBlock) as rig:
        for type, data in ((OUT, SECTOR), (DISCARD, SEGMENT.pack(0, 1, 0)), (DISCARD, SEGMENT.pack(0, 0, 0))):
            rig.engine.set_writeback(True)
            assert rig.request(type, data_out=data).status == OK
            assert fds == []
            rig.engine.set_writeback(False)
            assert rig.request(type, data_out=data).status == OK
            assert fds
            fds.clear()
        assert rig.request(IN, data_in=512).status == OK
        assert rig.request(OUT, 2**40, data_out=SECTOR).status == IOERR
        assert fds == []


def test_sync_that_failed_once_fails_for_ever(synced):
    """The kernel drops the pages and says that all is well the next time: no later success can be believed."""
    fds, failures = synced
    with Rig(plain(), make_engine=PythonBlock) as rig:
        failures.append(errno.EIO)
        assert rig.request(FLUSH).status == IOERR
        fds.clear()
        assert rig.request(FLUSH).status == IOERR
        assert rig.request(OUT, data_out=SECTOR).status == OK
        rig.engine.set_writeback(False)
        assert rig.request(OUT, data_out=SECTOR).status == IOERR
        assert rig.request(DISCARD, data_out=SEGMENT.pack(0, 1, 0)).status == IOERR
        assert rig.request(IN, 1, data_in=512).data == pattern(1)
        assert fds == []

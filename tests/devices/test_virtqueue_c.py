"""The rings of the C engine: what breaks a queue, what does not, and who is told when. Through whole requests.

That C and Python do the same with whatever a driver writes is for the test of the twins; here each rule has its own.
"""

import struct

import pytest
from engine_rig import EVENT_IDX, FEATURES, PACKED, REQUESTS, Rig

from kvmpy import MiB
from kvmpy._shim import lib
from kvmpy.conformance.driver import HEADER, write_request
from kvmpy.conformance.image import PatchworkImage, State
from kvmpy.conformance.layout import (
    AVAIL,
    INDIRECT,
    NEXT,
    USED,
    WRAP,
    WRITE,
    Buffer,
    Descriptor,
    EventSuppression,
    PackedDescriptor,
    Used,
)
from kvmpy.devices.block_c import CBlock
from kvmpy.devices.interrupt import Interrupt
from kvmpy.devices.virtqueue import Fault, QueueFault, QueueSetup
from kvmpy.machine.memory import GuestMemory

SIZE = 8
TABLE = 0x8_0000
RAM = 4 * MiB
GET_ID, OK = lib.VIRTIO_BLK_T_GET_ID, lib.VIRTIO_BLK_S_OK
INT_VRING = lib.VIRTIO_MMIO_INT_VRING


def make_rig(features=0, size=SIZE, memory=None):
    image = PatchworkImage([State.OWN] * 2)
    return Rig(image, features=FEATURES | features, size=size, make_engine=CBlock, memory=memory)


@pytest.fixture
def split():
    with make_rig() as rig:
        yield rig


@pytest.fixture
def packed():
    with make_rig(PACKED) as rig:
        yield rig


def get_id(rig, count=1, *, direct=False):
    """Make ``count`` requests available that do next to nothing, of one descriptor or (``direct``) of three."""
    tables = [None if direct else TABLE + 64 * i for i in range(count)]
    return [rig.submit(GET_ID, gpa=REQUESTS + 64 * i, data_in=20, table=table) for i, table in enumerate(tables)]


def interrupts(rig, count, *, direct=False):
    """Serve ``count`` requests as one batch; tell whether the driver was interrupted."""
    get_id(rig, count, direct=direct)
    rig.queue.queue.process()
    assert len(rig.queue.ring.used()) == count
    status = rig.queue.interrupt.status
    rig.queue.interrupt.acknowledge(status)
    return bool(status)


# --- what breaks a queue ------------------------------------------------------------------------------------------


def buffer(size=16, flags=0, next=0, gpa=REQUESTS):
    return Descriptor(gpa, size, flags, next)


def refer(size, flags=0, gpa=TABLE):
    return Descriptor(gpa, size, INDIRECT | flags)


SPLIT_FAULTS = {
    "loop of one": ([buffer(1, NEXT, 0)], [], Fault.CHAIN_TOO_LONG),
    "loop of three empty": ([buffer(0, NEXT, (i + 1) % 3) for i in range(3)], [], Fault.CHAIN_TOO_LONG),
    "next": ([buffer(1, NEXT, SIZE)], [], Fault.NEXT),
    "next in a table": ([refer(32)], [buffer(1, NEXT, 2), buffer()], Fault.NEXT),
    "unknown flag": ([buffer(1, 8)], [], Fault.UNKNOWN_FLAGS),
    "unknown flag goes first": ([refer(0, 0x8000 | NEXT)], [], Fault.UNKNOWN_FLAGS),
    "nested": ([refer(16)], [refer(0, NEXT)], Fault.INDIRECT_NESTED),
    "table and next": ([refer(0, NEXT)], [], Fault.INDIRECT_AND_NEXT),
    "no table": ([refer(0, gpa=RAM)], [], Fault.INDIRECT_LENGTH),
    "half an entry": ([refer(24)], [], Fault.INDIRECT_LENGTH),
    "65537 entries": ([refer(16 * 65537, gpa=RAM)], [], Fault.INDIRECT_LENGTH),
    "table behind RAM": ([refer(32, gpa=RAM - 16)], [], Fault.INDIRECT_ADDRESS),
    "table that wraps": ([refer(32, gpa=2**64 - 16)], [], Fault.INDIRECT_ADDRESS),
    "table too long": ([refer(16 * (SIZE + 1))], [buffer(1, NEXT, i + 1) for i in range(SIZE + 1)], 5),
    "buffer behind RAM": ([buffer(2, gpa=RAM - 1)], [], Fault.BUFFER_ADDRESS),
    "buffer that wraps": ([buffer(16, gpa=2**64 - 8)], [], Fault.BUFFER_ADDRESS),
    "all of 32 bits": ([buffer(2**32 - 1, gpa=0)], [], Fault.BUFFER_ADDRESS),
    "readable behind writable": ([buffer(0, WRITE | NEXT, 1), buffer(1, gpa=RAM)], [], Fault.BUFFER_ORDER),
}


@pytest.mark.parametrize("case", SPLIT_FAULTS.values(), ids=SPLIT_FAULTS)
def test_broken_split_chain_breaks_the_queue(split, case):
    """The fault is told each time; behind the notification flag, nothing of guest memory has changed."""
    descriptors, table, fault = case
    ring = split.queue.ring
    for index, each in enumerate(descriptors):
        ring.set_descriptor(index, each)
    split.memory.write(TABLE, b"".join(struct.pack("<QIHH", *each) for each in table))
    ring.offer(0)
    ring.publish()
    before = split.memory.read(0, RAM)
    assert split.queue.queue.process() is split.queue.queue.serve() is Fault(fault)
    split.memory.write(split.queue.setup.device_area, bytes(2))
    assert split.memory.read(0, RAM) == before
    assert split.queue.interrupt.status == 0


@pytest.mark.parametrize("index", [SIZE + 1, 0xFFFF])
def test_available_index_too_far_ahead(split, index):
    """Cases 6 and 7: it jumps, or goes back."""
    split.queue.ring.avail_idx = index
    assert split.queue.queue.process() is Fault.AVAIL_INDEX


def test_head_beyond_the_table(split):
    split.queue.ring.offer(SIZE)
    split.queue.ring.publish()
    assert split.queue.queue.process() is Fault.HEAD


def test_indirect_without_the_feature():
    with Rig(PatchworkImage([State.OWN]), features=0, make_engine=CBlock) as rig:
        rig.queue.ring.set_descriptor(0, refer(0, NEXT))
        rig.queue.ring.offer(0)
        rig.queue.ring.publish()
        assert rig.queue.queue.process() is Fault.INDIRECT_NOT_NEGOTIATED


def test_chain_of_more_than_2_32_bytes():
    """Case 18; and one byte less is a request like any other."""
    with make_rig(size=128, memory=GuestMemory(64 * MiB)) as rig:
        buffers = [Buffer(0, 64 * MiB)] * 63 + [Buffer(0, 64 * MiB - 1)]
        rig.queue.ring.add([*buffers, Buffer(RAM, 1, True)])
        rig.queue.ring.publish()
        assert rig.queue.queue.process() is None
        assert rig.queue.ring.used() == [Used(0, 1)]
        rig.queue.ring.add([*buffers, Buffer(RAM, 2, True)])
        rig.queue.ring.publish()
        assert rig.queue.queue.process() is Fault.CHAIN_LENGTH


def piece(size=16, flags=0, id=0, gpa=REQUESTS):
    return PackedDescriptor(gpa, size, id, AVAIL | flags)


PACKED_FAULTS = {
    "not available": ([piece(1, NEXT)], [], Fault.PACKED_NOT_AVAILABLE),
    "used": ([piece(1, NEXT), piece(1, USED)], [], Fault.PACKED_NOT_AVAILABLE),
    "too long": ([piece(0, NEXT)] * SIZE, [], Fault.CHAIN_TOO_LONG),
    "unknown flag": ([piece(1, 8)], [], Fault.UNKNOWN_FLAGS),
    "id": ([piece(1, NEXT), piece(1, id=SIZE)], [], Fault.BUFFER_ID),
    "table and next": ([piece(0, INDIRECT | NEXT)], [], Fault.INDIRECT_AND_NEXT),
    "no table": ([piece(0, INDIRECT)], [], Fault.INDIRECT_LENGTH),
    "table behind RAM": ([piece(16, INDIRECT, gpa=RAM)], [], Fault.INDIRECT_ADDRESS),
    "nested": ([piece(16, INDIRECT, gpa=TABLE)], [piece(16, INDIRECT)], Fault.INDIRECT_NESTED),
    "table too long": ([piece(16 * SIZE + 16, INDIRECT, gpa=TABLE)], [piece(0)] * (SIZE + 1), Fault.CHAIN_TOO_LONG),
    "buffer behind RAM": ([piece(16, gpa=RAM - 15)], [], Fault.BUFFER_ADDRESS),
    "readable behind writable": ([piece(1, WRITE | NEXT), piece(0)], [], Fault.BUFFER_ORDER),
}


@pytest.mark.parametrize("case", PACKED_FAULTS.values(), ids=PACKED_FAULTS)
def test_broken_packed_chain_breaks_the_queue(packed, case):
    descriptors, table, fault = case
    for slot, each in enumerate(descriptors):
        packed.queue.ring.set_descriptor(slot, each)
    packed.memory.write(TABLE, b"".join(struct.pack("<QIHH", *each) for each in table))
    before = packed.memory.read(0, RAM)
    assert packed.queue.queue.process() is packed.queue.queue.process() is fault
    packed.memory.write(packed.queue.setup.device_area, bytes(4))
    assert packed.memory.read(0, RAM) == before


def test_requests_before_the_broken_one_are_completed_and_told(split):
    """One used entry for every consumed head, and the driver hears of them."""
    request = get_id(split, 2)[0]
    split.queue.ring.offer(SIZE)
    split.queue.ring.publish()
    assert split.queue.queue.process() is Fault.HEAD
    assert [used.written for used in split.queue.ring.used()] == [21, 21]
    assert split.memory.read(request.status, 1)[0] == OK
    assert split.queue.interrupt.status == INT_VRING


@pytest.mark.parametrize("area", range(1, 4))
@pytest.mark.parametrize("gpa", [RAM - 16, 2**64 - 16, 0x1001])
def test_queue_with_bad_rings_is_not_opened(area, gpa):
    """Whoever should have checked them: C writes where they are, whatever is there."""
    with make_rig() as rig, Interrupt() as interrupt:
        areas = [0x1000, 0x2000, 0x3000]
        areas[area - 1] = gpa
        with pytest.raises(QueueFault):
            rig.engine.open_queue(QueueSetup(1, SIZE, *areas, FEATURES), interrupt, rig.queue.kick_fd)


# --- what does not ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [0, PACKED])
def test_longest_chain_is_served(features):
    """As many buffers as the queue has descriptors, in a table that is not aligned; those of no bytes count too."""
    with make_rig(features) as rig:
        rig.memory.write(REQUESTS, HEADER.pack(GET_ID, 0, 0))
        pieces = [Buffer(REQUESTS + i, 1) for i in range(2)] + [Buffer(REQUESTS + 2, 14), Buffer(2**63, 0)]
        buffers = [*pieces, Buffer(REQUESTS + 64, 7, True), Buffer(1, 0, True), Buffer(REQUESTS + 71, 13, True)]
        for table in (None, TABLE + 1):
            rig.queue.ring.add([*buffers, Buffer(REQUESTS + 84, 1, True)], table=table)
            rig.queue.ring.publish()
            assert rig.queue.queue.process() is None
            assert [used.written for used in rig.queue.ring.used()] == [21]


def test_direct_buffers_may_stand_before_a_table(split):
    request = write_request(split.memory, REQUESTS, GET_ID, data_in=20, readable=(7, 9))
    split.queue.ring.add(request.buffers, table=TABLE, direct=1)
    split.queue.ring.publish()
    assert split.queue.queue.process() is None
    assert split.queue.answer(request).status == OK


def test_split_indices_wrap_at_2_16():
    """§2.7.6: they run freely; in the ring their place is modulo the size (case 8)."""
    with make_rig(EVENT_IDX) as rig:
        ring, state = rig.queue.ring, rig.queue.queue._queue.ring
        state.avail = state.used = ring.next_avail = ring.last_used = ring.avail_idx = 0xFFFD
        rig.memory.write(rig.queue.setup.device_area + 2, b"\xfd\xff")
        ring.used_event = 0xFFFF
        assert [interrupts(rig, 2) for _ in range(4)] == [False, True, False, False]
        assert (state.avail, state.used, ring.avail_idx) == (5, 5, 5)
        assert rig.memory.read(rig.queue.setup.device_area + 4 + 8 * SIZE, 2) == b"\5\0"


def test_packed_slots_and_wrap_counters_go_round():
    """A ring of five, in chains of three descriptors and in batches of one to five short ones (case 34)."""
    with make_rig(PACKED, size=5) as rig:
        for count in range(40):
            assert interrupts(rig, 1, direct=True)
            assert interrupts(rig, 1 + count % 5)


# --- who is told --------------------------------------------------------------------------------------------------


def test_split_notifications(split):
    """§2.7.10: without EVENT_IDX a flag; it is off when everything is served."""
    split.memory.write(split.queue.setup.device_area, b"\1\0")
    assert split.queue.queue.process() is None
    assert split.memory.read(split.queue.setup.device_area, 2) == bytes(2)


def test_avail_event_follows_the_available_index():
    with make_rig(EVENT_IDX) as rig:
        get_id(rig, 3)
        rig.queue.queue.process()
        assert rig.memory.read(rig.queue.setup.device_area + 4 + 8 * SIZE, 2) == b"\3\0"
        assert rig.memory.read(rig.queue.setup.device_area, 2) == bytes(2)


def test_packed_notifications(packed):
    get_id(packed)
    packed.queue.queue.process()
    assert packed.queue.ring.device_event.flags == lib.VRING_PACKED_EVENT_FLAG_ENABLE
    with make_rig(PACKED | EVENT_IDX) as rig:
        for slot in (3, 6, 1):
            interrupts(rig, 1, direct=True)
            wrap = 0 if slot == 1 else WRAP
            assert rig.queue.ring.device_event == (slot | wrap, lib.VRING_PACKED_EVENT_FLAG_DESC)


def test_split_interrupt_can_be_switched_off(split):
    assert interrupts(split, 1)
    split.queue.ring.avail_flags = lib.VRING_AVAIL_F_NO_INTERRUPT
    assert not interrupts(split, 2)


def test_used_event_is_met_by_the_entry_that_it_names():
    """§2.7.7.2: the interrupt is for the entry with that index, in whatever batch it comes."""
    with make_rig(EVENT_IDX) as rig:
        rig.queue.ring.used_event = 4
        assert [interrupts(rig, n) for n in (1, 3, 1, 2)] == [False, False, True, False]
        rig.queue.ring.used_event = 0
        assert not interrupts(rig, 3)


def test_packed_interrupt_flags(packed):
    for flags, wanted in ((0, True), (1, False), (2, True), (3, True), (0xFFFF, True)):
        packed.queue.ring.driver_event = EventSuppression(0x7FFF, flags)
        assert interrupts(packed, 1) == wanted


def test_descriptor_event_is_met_by_the_slot_that_it_names():
    """§2.8.10: off_wrap is a slot and a turn. One that the ring has not is rather an interrupt too many."""
    with make_rig(PACKED | EVENT_IDX) as rig:
        flags = lib.VRING_PACKED_EVENT_FLAG_DESC
        rig.queue.ring.driver_event = EventSuppression(5 | WRAP, flags)
        assert [interrupts(rig, n) for n in (2, 3, 2, 3)] == [False, False, True, False]
        rig.queue.ring.driver_event = EventSuppression(3, flags)
        assert [interrupts(rig, n) for n in (1, 1, 4)] == [False, True, False]
        rig.queue.ring.driver_event = EventSuppression(SIZE | WRAP, flags)
        assert interrupts(rig, 1)


def test_slots_inside_a_chain_count():
    """Passing the slot is what counts, be it in the middle of a chain."""
    with make_rig(PACKED | EVENT_IDX) as rig:
        rig.queue.ring.driver_event = EventSuppression(1 | WRAP, lib.VRING_PACKED_EVENT_FLAG_DESC)
        assert interrupts(rig, 1, direct=True)

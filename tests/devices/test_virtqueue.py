"""The split virtqueue: chains that are served, each fault by its name, and where rings may lie."""

import struct

import pytest
from split_pair import DATA, RINGS, SIZE, TABLE, Split, read, write

from kvmpy import GiB, MiB
from kvmpy._shim import lib
from kvmpy.conformance.layout import INDIRECT, NEXT, WRITE, Buffer, Descriptor, place
from kvmpy.devices.virtqueue import Chain, Fault, QueueFault, QueueSetup, Segment, ring_fault
from kvmpy.errors import VirtqueueError
from kvmpy.machine.memory import GuestMemory


@pytest.fixture
def split():
    split = Split()
    yield split
    split.memory.close()


# --- chains that are served -------------------------------------------------------------------------------------


def test_empty_queue_has_nothing(split):
    assert not split.device.available()
    assert split.device.pop() is None


def test_chain_is_what_the_driver_added(split):
    """§2.7.5: descriptors are chained by next, in any order of the table."""
    split.driver.free = [5, 0, 7, 2]
    head = split.driver.add([Buffer(DATA, 16), Buffer(0, 512), Buffer(DATA + 512, 7, True), Buffer(DATA, 1, True)])
    split.driver.publish()
    assert split.device.available()
    expected = Chain(head, (Segment(DATA, 16), Segment(0, 512)), (Segment(DATA + 512, 7), Segment(DATA, 1)))
    assert split.device.pop() == expected
    assert split.device.pop() is None


def test_address_0_is_ram(split):
    split.offer(read(gpa=0))
    assert split.device.pop().readable == (Segment(0, 16),)


def test_buffer_may_end_where_ram_ends(split):
    split.offer(read(gpa=1 * MiB - 16))
    assert split.device.pop().readable == (Segment(1 * MiB - 16, 16),)


def test_buffer_of_no_bytes_may_be_anywhere(split):
    """It has no bytes whose address could be wrong; it counts, and its direction counts."""
    split.offer(read(0, NEXT, 1, gpa=2**64 - 1), write(0, gpa=2 * MiB))
    assert split.device.pop() == Chain(0, (Segment(2**64 - 1, 0),), (Segment(2 * MiB, 0),))


def test_chain_as_long_as_the_queue_is_served(split):
    """§2.7.5: the queue's size is the maximum possible chain length."""
    split.driver.add([Buffer(DATA + i, 1) for i in range(SIZE)])
    split.driver.publish()
    assert len(split.device.pop().readable) == SIZE


def test_chain_of_2_32_bytes_is_served():
    """§2.7.5.2: not longer than 2^32 bytes; so as long as that is allowed."""
    split = Split(size=64, memory_size=64 * MiB)
    split.driver.add([Buffer(0, 64 * MiB)] * 64)
    split.driver.publish()
    assert sum(size for _, size in split.device.pop().readable) == 2**32


def test_indirect_table_is_the_chain(split):
    """§2.7.5.3: the first is at the start of the table; its write flag in the ring is ignored."""
    split.table(read(1, NEXT, 2), write(3), read(2, NEXT, 1, gpa=DATA + 8))
    split.offer(Descriptor(TABLE, 48, INDIRECT | WRITE, 0))
    assert split.device.pop() == Chain(0, (Segment(DATA, 1), Segment(DATA + 8, 2)), (Segment(DATA, 3),))


def test_direct_buffers_may_stand_before_an_indirect_table(split):
    """§2.7.5.3.2: the device MUST handle normal chained descriptors followed by a single indirect one."""
    split.table(write(3))
    split.offer(read(1, NEXT, 3), *[read()] * 2, Descriptor(TABLE, 16, INDIRECT, 0))
    assert split.device.pop() == Chain(0, (Segment(DATA, 1),), (Segment(DATA, 3),))


def test_descriptor_that_refers_to_a_table_does_not_count(split):
    split.driver.add([Buffer(DATA, 1)] * SIZE, table=TABLE)
    split.driver.publish()
    assert len(split.device.pop().readable) == SIZE


def test_indirect_table_may_be_the_descriptor_table_itself(split):
    """Where a table lies says nothing about whether it is an indirect one."""
    split.offer(read(), Descriptor(RINGS, 16, INDIRECT, 0), head=1)
    assert split.device.pop() == Chain(1, (Segment(DATA, 16),), ())


def test_largest_indirect_table_is_served(split):
    """§2.7.5.3: 16 bits of next reach 65536 descriptors."""
    memory_size = 2 * MiB
    split = Split(memory_size=memory_size)
    split.table(read(1, NEXT, 65535))
    split.memory.write(TABLE + 16 * 65535, struct.pack("<QIHH", DATA, 2, 0, 0))
    split.offer(Descriptor(TABLE, 16 * 65536, INDIRECT, 0))
    assert [size for _, size in split.device.pop().readable] == [1, 2]


def test_each_descriptor_is_read_once(split):
    """What was checked is what is used: a driver that changes a descriptor in between changes nothing (case 10)."""
    split.table(read(1, NEXT, 1), write(1))
    split.offer(read(1, NEXT, 1), Descriptor(TABLE, 32, INDIRECT, 0))
    split.memory.touched.clear()
    split.device.pop()
    assert split.memory.touched_in(RINGS, 16 * SIZE) == [RINGS, RINGS + 16]
    assert split.memory.touched_in(TABLE, 32) == [TABLE, TABLE + 16]
    assert split.memory.touched_in(DATA, 64) == []


def test_same_head_twice_is_served_twice(split):
    """Case 9: the driver harms itself only."""
    split.offer(read())
    split.driver.offer(0)
    split.driver.publish()
    assert split.device.pop() == split.device.pop() == Chain(0, (Segment(DATA, 16),), ())


# --- faults -----------------------------------------------------------------------------------------------------


def test_available_index_too_far_ahead(split):
    """§2.7.13: there are never more chains than the queue has descriptors (case 6)."""
    split.driver.avail_idx = SIZE + 1
    assert split.fault() is Fault.AVAIL_INDEX


def test_available_index_that_goes_back(split):
    """§2.7.6.1: a driver MUST NOT decrement the available idx (case 7)."""
    split.offer(read())
    split.device.pop()
    split.driver.avail_idx = 0
    assert split.fault() is Fault.AVAIL_INDEX


@pytest.mark.parametrize("head", [SIZE, 0xFFFF])
def test_head_beyond_the_table(split, head):
    split.offer(read(), head=head)
    assert split.fault() is Fault.HEAD


@pytest.mark.parametrize("next", [SIZE, 0xFFFF])
def test_next_beyond_the_table(split, next):
    split.offer(read(16, NEXT, next))
    assert split.fault() is Fault.NEXT


def test_next_beyond_the_indirect_table(split):
    """It has its own length, which may be less than the queue's size."""
    split.table(read(1, NEXT, 2), read(), read())
    split.offer(Descriptor(TABLE, 32, INDIRECT, 0))
    assert split.fault() is Fault.NEXT


@pytest.mark.parametrize("length", [1, 2, SIZE])
def test_loop_is_refused(split, length):
    """§2.7.5.2: loops in the descriptor chain are forbidden (cases 1 and 2)."""
    split.offer(*[read(1, NEXT, (i + 1) % length) for i in range(length)])
    split.memory.touched.clear()
    assert split.fault() is Fault.CHAIN_TOO_LONG
    assert len(split.memory.touched_in(RINGS, 16 * SIZE)) == 2 * SIZE


@pytest.mark.parametrize("buffer", [read, write])
def test_loop_of_empty_buffers_is_refused(split, buffer):
    """Which would never be longer than 2^32 bytes."""
    split.offer(buffer(0, NEXT, 0))
    assert split.fault() is Fault.CHAIN_TOO_LONG


def test_readable_and_writable_buffers_count_together(split):
    split.table(*[read(0, NEXT, i + 1) for i in range(SIZE - 1)], write(0, NEXT, SIZE), write(0))
    split.offer(Descriptor(TABLE, 16 * (SIZE + 1), INDIRECT, 0))
    assert split.fault() is Fault.CHAIN_TOO_LONG


def test_loop_in_an_indirect_table_is_refused(split):
    """Case 29."""
    split.table(read(1, NEXT, 0))
    split.offer(Descriptor(TABLE, 16, INDIRECT, 0))
    assert split.fault() is Fault.CHAIN_TOO_LONG


def test_indirect_chain_longer_than_the_queue(split):
    """§2.7.5.3.1: a driver MUST NOT create a descriptor chain longer than the queue size (case 31)."""
    split.driver.add([Buffer(DATA, 1)] * (SIZE + 1), table=TABLE)
    split.driver.publish()
    assert split.fault() is Fault.CHAIN_TOO_LONG


def test_direct_and_indirect_buffers_count_together(split):
    split.table(*[read(1, NEXT, i + 1) for i in range(SIZE - 1)], read())
    split.offer(read(1, NEXT, 1), Descriptor(TABLE, 16 * SIZE, INDIRECT, 0))
    assert split.fault() is Fault.CHAIN_TOO_LONG


@pytest.mark.parametrize("flag", [1 << bit for bit in range(3, 16)])
def test_unknown_flag(split, flag):
    split.offer(read(16, flag))
    assert split.fault() is Fault.UNKNOWN_FLAGS


def test_unknown_flag_in_an_indirect_table(split):
    split.table(read(16, 8 | INDIRECT))
    split.offer(Descriptor(TABLE, 16, INDIRECT, 0))
    assert split.fault() is Fault.UNKNOWN_FLAGS


def test_indirect_without_the_feature():
    """§2.7.5.3.1: MUST NOT set INDIRECT unless INDIRECT_DESC was negotiated (case 24)."""
    split = Split(features=0)
    split.offer(Descriptor(TABLE, 0, INDIRECT | NEXT, 0))
    assert split.fault() is Fault.INDIRECT_NOT_NEGOTIATED


def test_nested_indirect_table(split):
    """§2.7.5.3.1: only one table per descriptor (case 25)."""
    split.table(Descriptor(TABLE, 16, INDIRECT, 0))
    split.offer(Descriptor(TABLE, 16, INDIRECT, 0))
    assert split.fault() is Fault.INDIRECT_NESTED


def test_indirect_and_next(split):
    """§2.7.5.3.1: MUST NOT set both (case 26)."""
    split.offer(Descriptor(TABLE, 0, INDIRECT | NEXT, 0))
    assert split.fault() is Fault.INDIRECT_AND_NEXT


@pytest.mark.parametrize("length", [0, 1, 15, 17, 16 * 65537, 2**32 - 16, 2**32 - 1])
def test_indirect_table_of_a_wrong_length(split, length):
    """Case 27."""
    split.offer(Descriptor(2**64 - 16, length, INDIRECT, 0))
    assert split.fault() is Fault.INDIRECT_LENGTH


@pytest.mark.parametrize("gpa", [1 * MiB, 1 * MiB - 16, 0xD000_0000, 2**64 - 32, 2**64 - 16])
def test_indirect_table_outside_ram(split, gpa):
    """Case 28."""
    split.offer(Descriptor(gpa, 32, INDIRECT, 0))
    assert split.fault() is Fault.INDIRECT_ADDRESS


@pytest.mark.parametrize(
    ("gpa", "size"),
    [(1 * MiB, 1), (1 * MiB - 1, 2), (0xD000_0000, 4), (2**64 - 1, 1), (2**64 - 8, 16), (0, 2**32 - 1)],
    ids=["behind", "across the end", "registers", "last byte", "wraps", "len 0xffffffff"],
)
def test_buffer_outside_ram(split, gpa, size):
    """Cases 13 to 15, 17, 20."""
    split.offer(read(size, gpa=gpa))
    assert split.fault() is Fault.BUFFER_ADDRESS


def test_buffer_across_the_hole_below_4_gib():
    """Case 19: both ends are RAM, what lies between is not."""
    split = Split(memory_size=4 * GiB)
    split.offer(read(1 * GiB + 4096, gpa=3 * GiB - 4096))
    assert split.fault() is Fault.BUFFER_ADDRESS


def test_buffer_outside_ram_in_an_indirect_table(split):
    split.table(read(gpa=1 * MiB))
    split.offer(Descriptor(TABLE, 16, INDIRECT, 0))
    assert split.fault() is Fault.BUFFER_ADDRESS


@pytest.mark.parametrize("size", [0, 16])
def test_readable_behind_writable(split, size):
    """§2.7.4.2: device-writable elements MUST come after device-readable ones (case 23)."""
    split.offer(write(0, NEXT, 1), read(size, gpa=2 * MiB))
    assert split.fault() is Fault.BUFFER_ORDER


def test_chain_of_more_than_2_32_bytes():
    """§2.7.5.2: Drivers MUST NOT add a descriptor chain longer than 2^32 bytes in total (case 18)."""
    split = Split(size=128, memory_size=64 * MiB)
    split.driver.add([Buffer(0, 64 * MiB)] * 64 + [Buffer(0, 1, True)])
    split.driver.publish()
    assert split.fault() is Fault.CHAIN_LENGTH


def test_every_fault_has_one_line_with_its_section():
    assert sorted(Fault) == list(range(1, lib.KVMPY_NR_FAULTS))
    for fault in Fault:
        assert fault.message.endswith(")")
        assert "(virtio 1.2 §2." in fault.message
        assert "\n" not in fault.message
    assert Fault.CHAIN_TOO_LONG.message == "the chain is longer than the queue (virtio 1.2 §2.7.5.2)"
    assert isinstance(QueueFault(Fault.HEAD), VirtqueueError)
    assert str(QueueFault(Fault.HEAD)) == Fault.HEAD.message


# --- where the rings may lie ------------------------------------------------------------------------------------

PACKED = 1 << lib.VIRTIO_F_RING_PACKED
PARTS = [
    ("descriptor_area", 0, 16, 128),
    ("driver_area", 0, 2, 22),
    ("device_area", 0, 4, 70),
    ("descriptor_area", PACKED, 16, 128),
    ("driver_area", PACKED, 4, 4),
    ("device_area", PACKED, 4, 4),
]
"""Which, features, alignment, and bytes of a queue of 8."""


@pytest.mark.parametrize(("area", "features", "alignment", "length"), PARTS)
def test_rings_are_aligned_and_inside_ram(area, features, alignment, length):
    """§2.7 and §2.8.10.1: alignment and size of each part (case 38)."""
    with GuestMemory(1 * MiB) as memory:
        setup = place(0, SIZE, RINGS, features)
        last = (1 * MiB - length) // alignment * alignment
        for gpa in (0, RINGS, last):
            assert ring_fault(memory, setup._replace(**{area: gpa})) is None
        wrong = (alignment // 2, RINGS + 1, last + alignment, 1 * MiB, 2**32, 2**64 - alignment, 2**64 - 1)
        for gpa in wrong:
            assert ring_fault(memory, setup._replace(**{area: gpa})) is Fault.RING_ADDRESS


def test_rings_lie_in_one_region():
    with GuestMemory(4 * GiB) as memory:
        for gpa, fault in ((3 * GiB - 128, None), (3 * GiB - 112, Fault.RING_ADDRESS), (4 * GiB, None)):
            assert ring_fault(memory, place(0, SIZE, RINGS, 0)._replace(descriptor_area=gpa)) is fault


def test_rings_may_overlap():
    with GuestMemory(1 * MiB) as memory:
        assert ring_fault(memory, QueueSetup(0, SIZE, RINGS, RINGS, RINGS, 0)) is None

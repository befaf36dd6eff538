"""The packed virtqueue: chains that are served, around the end of the ring, and each fault by its name."""

import pytest
from packed_pair import DATA, PACKED, RINGS, SIZE, TABLE, Packed, chained

from kvmpy import MiB
from kvmpy.conformance.layout import AVAIL, INDIRECT, NEXT, USED, WRITE, Buffer, PackedDescriptor, Used
from kvmpy.devices.virtqueue import Chain, Fault, Segment


@pytest.fixture
def packed():
    packed = Packed()
    yield packed
    packed.memory.close()


# --- chains that are served -------------------------------------------------------------------------------------


def test_zeroed_ring_has_nothing(packed):
    """§2.8.13: the ring is zero-initialized; the wrap counters are 1."""
    assert not packed.device.available()
    assert packed.device.pop() is None


@pytest.mark.parametrize("flags", [0, USED, AVAIL | USED], ids=["neither", "used only", "both"])
def test_only_avail_without_used_is_available_at_first(packed, flags):
    """§2.8.1: AVAIL matches the wrap counter, USED does not (case 32)."""
    packed.driver.set_descriptor(0, PackedDescriptor(DATA, 16, 0, flags))
    assert not packed.device.available()
    assert packed.device.pop() is None


def test_chain_is_what_the_driver_added(packed):
    """§2.8.6: the buffer id is that of the last descriptor in the list."""
    packed.offer(*chained((DATA, 16, 77, 0), (0, 512, 78, WRITE), (DATA, 1, 3, WRITE)))
    assert packed.device.available()
    assert packed.device.pop() == Chain(3, (Segment(DATA, 16),), (Segment(0, 512), Segment(DATA, 1)), slots=3)
    assert packed.device.pop() is None


def test_chain_as_long_as_the_queue_is_served(packed):
    packed.driver.add([Buffer(DATA, 1)] * SIZE)
    packed.driver.publish()
    assert packed.device.pop().slots == SIZE


def test_indirect_table_is_the_chain(packed):
    """§2.8.7: entries come immediately after each other; flags but WRITE, ids, and WRITE in the ring are ignored."""
    packed.table((DATA, 1, 99, NEXT | AVAIL | 8), (DATA, 2, 0, 0), (DATA, 3, 0, WRITE | USED))
    packed.offer((TABLE, 48, 4, INDIRECT | WRITE))
    assert packed.device.pop() == Chain(4, (Segment(DATA, 1), Segment(DATA, 2)), (Segment(DATA, 3),), slots=1)


def test_direct_buffers_may_stand_before_an_indirect_table(packed):
    packed.table((DATA, 3, 0, WRITE))
    packed.offer((DATA, 1, 9, NEXT), (TABLE, 16, 2, INDIRECT))
    assert packed.device.pop() == Chain(2, (Segment(DATA, 1),), (Segment(DATA, 3),), slots=2)


def test_descriptor_that_refers_to_a_table_does_not_count(packed):
    packed.driver.add([Buffer(DATA, 1)] * SIZE, table=TABLE)
    packed.driver.publish()
    assert len(packed.device.pop().readable) == SIZE


def test_each_descriptor_is_read_once_behind_its_flags(packed):
    """Case 10: a driver that changes a descriptor in between changes nothing."""
    packed.table((DATA, 1, 0, 0), (DATA, 1, 0, 0))
    packed.offer((DATA, 1, 0, NEXT), (TABLE, 32, 0, INDIRECT))
    packed.memory.touched.clear()
    packed.device.pop()
    assert packed.memory.touched_in(RINGS, 16 * SIZE) == [RINGS + 14, RINGS, RINGS + 30, RINGS + 16]
    assert packed.memory.touched_in(TABLE, 32) == [TABLE, TABLE + 16]


def test_flags_that_were_read_first_are_what_counts(packed):
    """The rest is read behind them, so it is as new as they are; a later change of them is not seen."""
    packed.offer((DATA, 1, 0, 0))
    flags_gpa = RINGS + 14
    view = packed.memory.view

    def change_behind_the_first_look(gpa, size):
        seen = bytes(view(gpa, size))
        if gpa == flags_gpa:
            view(gpa, size)[:] = (AVAIL | 8).to_bytes(2, "little")
        return memoryview(seen)

    packed.memory.view = change_behind_the_first_look
    assert packed.device.pop().readable == (Segment(DATA, 1),)


# --- giving back, and the end of the ring -----------------------------------------------------------------------


def test_used_descriptor_is_written_where_the_chain_began(packed):
    """§2.8.6: a single used descriptor for the whole list. The address stays."""
    packed.offer(*chained((DATA, 16, 0, 0), (DATA, 9, 0, WRITE), (DATA, 1, 4, WRITE)))
    packed.device.push(packed.device.pop(), 10)
    assert packed.driver.descriptor(0) == PackedDescriptor(DATA, 10, 4, AVAIL | USED | WRITE)
    assert packed.driver.descriptor(1) == PackedDescriptor(DATA, 9, 0, AVAIL | WRITE | NEXT)


def test_write_flag_is_clear_when_nothing_was_written(packed):
    """§2.8.3: whether any data has been written by the device."""
    packed.offer((DATA, 16, 4, 0))
    packed.device.push(packed.device.pop(), 0)
    assert packed.driver.descriptor(0) == PackedDescriptor(DATA, 0, 4, AVAIL | USED)


def test_used_flags_in_the_second_lap(packed):
    """§2.8.1: both match the wrap counter, which is 0 then."""
    packed.turn(SIZE)
    for written, flags in ((0, 0), (1, WRITE)):
        packed.offer((DATA, 16, 2, WRITE))
        slot = packed.device._used.slot
        packed.device.push(packed.device.pop(), written)
        assert packed.driver.descriptor(slot) == PackedDescriptor(DATA, written, 2, flags)


def test_flags_are_written_last(packed):
    """§2.8.15: MUST NOT change a descriptor after changing its USED bit."""
    packed.offer((DATA, 16, 4, 0))
    chain = packed.device.pop()
    packed.memory.touched.clear()
    packed.device.push(chain, 3)
    assert packed.memory.touched[-1] == (RINGS + 14, 2)
    assert packed.memory.touched_in(RINGS, 16).count(RINGS + 14) == 1


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5])
def test_chains_go_round_the_ring(packed, length):
    """§2.8.1: both wrap counters flip at the last descriptor, in the middle of a chain too (case 34)."""
    for turn in range(4 * SIZE):
        identity = packed.driver.add([Buffer(DATA + i, 1, i == length - 1) for i in range(length)])
        packed.driver.publish()
        chain = packed.device.pop()
        assert (chain.head, chain.slots) == (identity, length)
        assert packed.device.pop() is None
        packed.device.push(chain, turn)
        assert packed.driver.used() == [Used(identity, turn)]


def test_old_descriptors_are_not_available_in_the_next_lap(packed):
    """A driver's descriptor from the lap before has the wrong AVAIL bit."""
    for _ in range(SIZE):
        packed.offer((DATA, 1, 0, 0))
        assert packed.device.pop() is not None  # nothing pushed: the ring still looks as it did
    assert packed.device.pop() is None


# --- faults -----------------------------------------------------------------------------------------------------


def test_chain_runs_into_a_descriptor_that_is_not_available(packed):
    """§2.8.17: MUST NOT make the first descriptor available before all subsequent ones."""
    packed.offer((DATA, 1, 0, NEXT))
    assert packed.fault() is Fault.PACKED_NOT_AVAILABLE


def test_chain_over_the_end_with_the_wrong_wrap_counter(packed):
    """Case 34: the flags of the second half are those of the lap before."""
    packed.turn(SIZE - 1)
    packed.driver.set_descriptor(SIZE - 1, PackedDescriptor(DATA, 1, 0, NEXT | AVAIL))
    packed.driver.set_descriptor(0, PackedDescriptor(DATA, 1, 0, AVAIL))
    assert packed.fault() is Fault.PACKED_NOT_AVAILABLE


def test_chain_longer_than_the_queue(packed):
    """§2.8.17: MUST NOT create a descriptor list longer than the queue size, whatever follows."""
    packed.offer(*[(DATA, 0, 0, NEXT)] * SIZE)
    packed.memory.touched.clear()
    assert packed.fault() is Fault.CHAIN_TOO_LONG
    assert len(packed.memory.touched_in(RINGS, 16 * SIZE)) == 2 * 2 * SIZE


def test_indirect_chain_longer_than_the_queue(packed):
    packed.driver.add([Buffer(DATA, 1)] * (SIZE + 1), table=TABLE)
    packed.driver.publish()
    assert packed.fault() is Fault.CHAIN_TOO_LONG


def test_indirect_table_behind_as_many_buffers_as_the_queue_has(packed):
    packed.table((DATA, 1, 0, 0))
    packed.offer(*[(DATA, 1, 0, NEXT)] * (SIZE - 1), (TABLE, 32, 0, INDIRECT))
    assert packed.fault() is Fault.CHAIN_TOO_LONG


@pytest.mark.parametrize("flag", [1 << bit for bit in range(3, 15) if bit != 7])
def test_unknown_flag(packed, flag):
    packed.offer((DATA, 1, 0, flag))
    assert packed.fault() is Fault.UNKNOWN_FLAGS


def test_descriptor_that_is_not_available_is_not_looked_at(packed):
    """Its other flags may say anything."""
    packed.offer((DATA, 1, 0, NEXT))
    packed.driver.set_descriptor(1, PackedDescriptor(0, 0, 0, 0x7F78))
    assert packed.fault() is Fault.PACKED_NOT_AVAILABLE


@pytest.mark.parametrize("buffer_id", [SIZE, 0xFFFF])
def test_buffer_id_beyond_the_queue(packed, buffer_id):
    """Case 33."""
    packed.offer(*chained((DATA, 1, 0, 0), (DATA, 1, buffer_id, 0)))
    assert packed.fault() is Fault.BUFFER_ID


def test_buffer_id_is_looked_at_when_the_chain_is_complete(packed):
    packed.offer((2 * MiB, 1, SIZE, 0))
    assert packed.fault() is Fault.BUFFER_ADDRESS


def test_indirect_without_the_feature():
    """§2.8.19 (case 24)."""
    packed = Packed(features=PACKED)
    packed.offer((TABLE, 0, 0, INDIRECT | NEXT))
    assert packed.fault() is Fault.INDIRECT_NOT_NEGOTIATED


def test_indirect_and_next(packed):
    """§2.8.19 (case 26)."""
    packed.offer((TABLE, 0, 0, INDIRECT | NEXT))
    assert packed.fault() is Fault.INDIRECT_AND_NEXT


def test_nested_indirect_table(packed):
    """§2.8.19 (case 25)."""
    packed.table((DATA, 1, 0, 0), (TABLE, 16, 0, INDIRECT))
    packed.offer((TABLE, 32, 0, INDIRECT))
    assert packed.fault() is Fault.INDIRECT_NESTED


@pytest.mark.parametrize("length", [0, 1, 17, 16 * 65537])
def test_indirect_table_of_a_wrong_length(packed, length):
    packed.offer((2**64 - 16, length, 0, INDIRECT))
    assert packed.fault() is Fault.INDIRECT_LENGTH


@pytest.mark.parametrize("gpa", [1 * MiB - 16, 2**64 - 16])
def test_indirect_table_outside_ram(packed, gpa):
    packed.offer((gpa, 32, 0, INDIRECT))
    assert packed.fault() is Fault.INDIRECT_ADDRESS


def test_readable_behind_writable(packed):
    """§2.8.17."""
    packed.offer(*chained((DATA, 1, 0, WRITE), (DATA, 1, 0, 0)))
    assert packed.fault() is Fault.BUFFER_ORDER


def test_readable_behind_writable_in_an_indirect_table(packed):
    packed.table((DATA, 1, 0, WRITE), (DATA, 0, 0, 0))
    packed.offer((TABLE, 32, 0, INDIRECT))
    assert packed.fault() is Fault.BUFFER_ORDER


@pytest.mark.parametrize(("gpa", "size"), [(1 * MiB, 1), (1 * MiB - 1, 2), (2**64 - 8, 16)])
def test_buffer_outside_ram(packed, gpa, size):
    packed.offer((gpa, size, 0, 0))
    assert packed.fault() is Fault.BUFFER_ADDRESS


def test_chain_of_more_than_2_32_bytes():
    packed = Packed(size=65, memory_size=64 * MiB)
    packed.offer(*chained(*[(0, 64 * MiB, 0, 0)] * 64, (0, 1, 0, WRITE)))
    assert packed.fault() is Fault.CHAIN_LENGTH

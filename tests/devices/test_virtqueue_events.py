"""Who is told what: used entries, notifications, interrupts, and indices that wrap at 2^16."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_pair import Packed
from split_pair import DATA, EVENT_IDX, SIZE, Split

from kvmpy._shim import lib
from kvmpy.conformance.layout import WRAP, Buffer, EventSuppression, Used

ENABLE, DISABLE = lib.VRING_PACKED_EVENT_FLAG_ENABLE, lib.VRING_PACKED_EVENT_FLAG_DISABLE
DESC = lib.VRING_PACKED_EVENT_FLAG_DESC


def serve(pair, count=1):
    """Serve ``count`` chains of one buffer each."""
    for _ in range(count):
        pair.driver.add([Buffer(DATA, 1, True)])
        pair.driver.publish()
        pair.device.push(pair.device.pop(), 1)
        assert len(pair.driver.used()) == 1


# --- split ------------------------------------------------------------------------------------------------------


def test_used_element_is_there_before_the_index():
    """§2.7.8.2: the device MUST set len prior to updating the used idx."""
    split = Split()
    head = split.driver.add([Buffer(DATA, 16, True)])
    split.driver.publish()
    chain = split.device.pop()
    split.memory.touched.clear()
    split.device.push(chain, 16)
    used = split.setup.device_area
    assert split.memory.touched == [(used + 4, 8), (used + 2, 2)]
    assert split.driver.used() == [Used(head, 16)]


def test_split_indices_wrap_at_2_16():
    """§2.7.6 and §2.7.8: idx runs freely and wraps at 65536 (case 8); avail_event follows."""
    split = Split(features=EVENT_IDX)
    fast_forward(split, 2**16 - 3)
    serve(split, 6)
    assert (split.driver.used_idx, split.driver.avail_idx) == (3, 3)
    split.device.enable_notifications()
    assert split.driver.avail_event == 3


def test_65536_chains_are_served():
    """No index is special: the whole way round, in batches as large as the queue."""
    split = Split(size=256)
    for _ in range(2**16 // 256 + 1):
        for head in range(256):
            split.driver.offer(head)
        split.driver.publish()
        while (chain := split.device.pop()) is not None:
            split.device.push(chain, 0)
    assert split.driver.used_idx == split.driver.next_avail == 256


def fast_forward(split, chains):
    """Be where the queue is after so many chains."""
    split.device._last_avail = split.device._used_idx = chains % 2**16
    split.driver.next_avail = split.driver.last_used = split.driver.avail_idx = chains % 2**16
    split.memory.write(split.setup.device_area + 2, (chains % 2**16).to_bytes(2, "little"))


def test_split_notifications_by_flags():
    """§2.7.10.2: without EVENT_IDX flags is 0 or 1, and avail_event is nobody's."""
    split = Split()
    serve(split)
    split.device.disable_notifications()
    assert split.driver.used_flags == lib.VRING_USED_F_NO_NOTIFY
    split.device.enable_notifications()
    assert split.driver.used_flags == 0
    assert split.driver.avail_event == 0


def test_split_notifications_by_avail_event():
    """§2.7.10.2: with EVENT_IDX the device MUST set flags to 0."""
    split = Split(features=EVENT_IDX)
    serve(split, 3)
    split.device.disable_notifications()
    assert (split.driver.used_flags, split.driver.avail_event) == (0, 0)
    split.device.enable_notifications()
    assert (split.driver.used_flags, split.driver.avail_event) == (0, 3)


@pytest.mark.parametrize(("flags", "wanted"), [(0, True), (1, False), (2, True), (0xFFFF, False)])
def test_split_interrupt_by_flags(flags, wanted):
    """§2.7.7.2: flags 1: SHOULD NOT, flags 0: MUST. Other bits are junk (case 46)."""
    split = Split()
    serve(split)
    split.driver.avail_flags = flags
    split.driver.used_event = 1
    assert split.device.wants_interrupt() is wanted


def test_split_interrupt_by_used_event_ignores_flags():
    """§2.7.7.2: with EVENT_IDX the device MUST ignore the lower bit of flags."""
    split = Split(features=EVENT_IDX)
    split.driver.avail_flags = 1
    serve(split)
    assert split.device.wants_interrupt()


def test_nothing_pushed_wants_no_interrupt():
    for pair in (Split(), Packed()):
        assert not pair.device.wants_interrupt()
        serve(pair)
        assert pair.device.wants_interrupt()
        assert not pair.device.wants_interrupt()


@given(start=st.integers(0, 2**16 - 1), pushed=st.integers(0, 3 * SIZE), event=st.integers(-SIZE, 4 * SIZE))
@settings(max_examples=300, deadline=None)
def test_used_event_is_met_by_the_entry_that_it_names(start, pushed, event):
    """§2.7.7.2: if idx was equal to used_event when the entry was written, MUST notify; also across 65535 -> 0."""
    split = Split(features=EVENT_IDX)
    fast_forward(split, start)
    used_event = (start + event) % 2**16
    serve(split, pushed)
    split.driver.used_event = used_event
    assert split.device.wants_interrupt() == (used_event in [(start + i) % 2**16 for i in range(pushed)])
    split.memory.close()


def test_used_event_is_not_lost_when_2_16_entries_pass_it():
    """A driver that lets us push as many without a look gets its interrupt still (case 45)."""
    split = Split(features=EVENT_IDX)
    split.device._pushed = 2**16
    assert split.device.wants_interrupt()


# --- packed -----------------------------------------------------------------------------------------------------


def test_packed_notifications_by_flags():
    """§2.8.14: the device event suppression structure; without EVENT_IDX never DESC."""
    packed = Packed()
    packed.device.disable_notifications()
    assert packed.driver.device_event == EventSuppression(0, DISABLE)
    serve(packed, 2)
    packed.device.enable_notifications()
    assert packed.driver.device_event == EventSuppression(0, ENABLE)


def test_packed_notifications_by_descriptor():
    """§2.8.10: the event triggers when this descriptor is made available, in this lap."""
    packed = Packed(size=3, features=EVENT_IDX)
    events = []
    for _ in range(7):
        packed.device.disable_notifications()
        assert packed.driver.device_event.flags == DISABLE
        packed.device.enable_notifications()
        assert packed.driver.device_event.flags == DESC
        events.append(packed.driver.device_event.off_wrap)
        serve(packed)
    assert events == [WRAP, WRAP | 1, WRAP | 2, 0, 1, 2, WRAP]


def test_offset_is_there_before_the_flags():
    """The driver looks at the offset when the flags say so."""
    packed = Packed(features=EVENT_IDX)
    packed.memory.touched.clear()
    packed.device.enable_notifications()
    area = packed.setup.device_area
    assert packed.memory.touched == [(area, 2), (area + 2, 2)]


@pytest.mark.parametrize("features", [0, EVENT_IDX])
@pytest.mark.parametrize(("flags", "wanted"), [(ENABLE, True), (DISABLE, False), (3, True), (0x8001, True)])
def test_packed_interrupt_by_flags(features, flags, wanted):
    """§2.8.10: what is reserved does not silence us."""
    packed = Packed(features=features)
    packed.driver.driver_event = EventSuppression(4, flags)
    serve(packed)
    assert packed.device.wants_interrupt() is wanted


def test_descriptor_event_without_the_feature_is_an_interrupt():
    """§2.8.10: DESC is only valid if EVENT_IDX has been negotiated."""
    packed = Packed()
    packed.driver.driver_event = EventSuppression(4, DESC)
    serve(packed)
    assert packed.device.wants_interrupt()


@pytest.mark.parametrize("off_wrap", [3, 0x7FFF, WRAP | 3, 0xFFFF])
def test_offset_beyond_the_ring_is_an_interrupt(off_wrap):
    """Case 35: no such descriptor; a lost interrupt would be worse than one too many."""
    packed = Packed(size=3, features=EVENT_IDX)
    packed.driver.driver_event = EventSuppression(off_wrap, DESC)
    serve(packed)
    assert packed.device.wants_interrupt()


@given(
    size=st.integers(1, 6),
    before=st.integers(0, 20),
    pushed=st.integers(0, 14),
    slot=st.integers(0, 5),
    wrap=st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_descriptor_event_is_met_by_the_slot_that_it_names(size, before, pushed, slot, wrap):
    """§2.8.10: the event triggers when the descriptor is used and the wrap counter matches."""
    slot %= size
    packed = Packed(size=size, features=EVENT_IDX)
    serve(packed, before)
    packed.device.wants_interrupt()
    passed = [(at % size, at // size % 2 == 0) for at in range(before, before + pushed)]
    serve(packed, pushed)
    packed.driver.driver_event = EventSuppression(slot | (WRAP if wrap else 0), DESC)
    assert packed.device.wants_interrupt() == ((slot, wrap) in passed)
    packed.memory.close()


def test_slots_inside_a_chain_count():
    """A chain of three slots passes the two behind its first."""
    packed = Packed(features=EVENT_IDX)
    packed.driver.driver_event = EventSuppression(WRAP | 2, DESC)
    packed.turn(3)
    assert packed.device.wants_interrupt()

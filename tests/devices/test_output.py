"""SerialOutput: the ring between vCPU threads and their reader."""

import os
import select
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmpy.devices.output import SerialOutput

PRODUCERS = 4
BYTES_EACH = 10_000


@pytest.fixture
def output():
    with SerialOutput(capacity=64) as output:
        yield output


def readable(output):
    return bool(select.select([output.event_fd], [], [], 0)[0])


def test_bytes_come_out_as_they_went_in(output):
    """A ring keeps order and content."""
    assert output.push(b"hello ")
    assert output.push(b"world")
    assert output.drain() == b"hello world"
    assert output.drain() == b""


def test_what_does_not_fit_is_refused_whole(output):
    """push appends all of its bytes or none."""
    assert output.push(b"x" * 60)
    assert not output.push(b"12345")
    assert output.push(b"1234")
    assert not output.push(b"5")
    assert output.drain() == b"x" * 60 + b"1234"


def test_more_than_the_ring_never_fits(output):
    """A push of more than the capacity is refused even when the ring is empty."""
    assert not output.push(b"x" * 65)
    assert output.push(b"x" * 64)


@pytest.mark.parametrize("capacity", [0, -1, 3, 100, 1 << 32])
def test_capacity_must_be_a_power_of_two(capacity):
    """Head and tail run freely modulo 2**32, so the capacity must divide that."""
    with pytest.raises(ValueError, match="power of two"):
        SerialOutput(capacity)


def test_event_tells_of_bytes_and_is_quiet_without(output):
    """event_fd is readable when there is something to drain, and not after drain took it."""
    assert not readable(output)
    output.push(b"a")
    assert readable(output)
    output.drain()
    assert not readable(output)


def test_room_is_announced_after_bytes_were_taken(output):
    """on_room is called by drain when it made room, and only then; what it pushes is not part of that drain."""
    calls = []

    def refill():
        calls.append(output.push(b"next"))

    output.on_room = refill
    assert output.drain() == b""
    assert calls == []
    output.push(b"x" * 64)
    assert output.drain() == b"x" * 64
    assert calls == [True]
    assert readable(output)


def test_bytes_left_behind_wake_the_reader_again(output):
    """A byte pushed while drain copies wakes nobody by itself, so drain leaves the event set for it."""
    output.push(b"12345678")
    output.capacity = 4  # drain stops early, as if the rest had come meanwhile
    assert output.drain() == b"1234"
    assert readable(output)
    assert output.drain() == b"5678"
    assert not readable(output)


def test_push_after_close_touches_no_descriptor():
    """The number of the event descriptor may belong to somebody else by then."""
    output = SerialOutput(16)
    descriptor = output.event_fd
    output.close()
    other = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        assert other == descriptor
        output.push(b"late")
        with pytest.raises(BlockingIOError):
            os.eventfd_read(other)
    finally:
        os.close(other)


def test_close_is_idempotent_and_leaves_the_bytes():
    """The last bytes of a guest can be read after its machine was closed; no descriptor stays."""
    output = SerialOutput(16)
    descriptor = output.event_fd
    output.push(b"last words")
    output.close()
    output.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
    assert output.drain() == b"last words"
    assert output.push(b"more")


@settings(deadline=None, max_examples=150)
@given(st.lists(st.one_of(st.binary(max_size=20), st.none()), max_size=60))
def test_ring_is_a_bounded_bytearray(steps):
    """Any sequence of pushes and drains gives what a bytearray with a limit gives."""
    twin = bytearray()
    with SerialOutput(16) as output:
        for step in steps:
            if step is None:
                assert output.drain() == bytes(twin)
                twin.clear()
            else:
                fits = len(twin) + len(step) <= 16
                assert output.push(step) is fits
                twin += step if fits else b""
            if twin:
                assert readable(output)
        assert output.drain() == bytes(twin)


def test_many_producers_and_a_sleeping_reader_lose_nothing():
    """Each producer's bytes arrive complete and in order, while the reader sleeps in poll between drains."""
    output = SerialOutput(256)

    def produce(identity):
        for n in range(BYTES_EACH // 2):
            while not output.push(bytes([identity, n % 251])):
                pass

    threads = [threading.Thread(target=produce, args=(i,)) for i in range(PRODUCERS)]
    for thread in threads:
        thread.start()
    received = bytearray()
    poll = select.poll()
    poll.register(output.event_fd, select.POLLIN)
    while len(received) < PRODUCERS * BYTES_EACH:
        assert poll.poll(20_000), f"nobody woke the reader after {len(received)} bytes"
        received += output.drain()
    for thread in threads:
        thread.join()
    pairs = [(received[i], received[i + 1]) for i in range(0, len(received), 2)]
    for identity in range(PRODUCERS):
        assert [n for who, n in pairs if who == identity] == [n % 251 for n in range(BYTES_EACH // 2)]
    assert output.drain() == b""
    output.close()

"""The interrupt of a virtio device: a word and an eventfd."""

import os
import threading

import pytest
from mmio_driver import in_thread, joined

from kvmpy._shim import lib
from kvmpy.devices.interrupt import Interrupt

VRING, CONFIG = lib.VIRTIO_MMIO_INT_VRING, lib.VIRTIO_MMIO_INT_CONFIG


@pytest.fixture
def interrupt():
    with Interrupt() as interrupt:
        yield interrupt


def events(interrupt):
    """Return how many events wait on the eventfd."""
    try:
        return os.eventfd_read(interrupt.fd)
    except BlockingIOError:
        return 0


def test_raising_sets_the_bit_and_the_event(interrupt):
    assert (interrupt.status, events(interrupt)) == (0, 0)
    interrupt.raise_(VRING)
    assert (interrupt.status, events(interrupt)) == (VRING, 1)


def test_each_raise_is_an_event_of_its_own(interrupt):
    """The GSI is an edge, which a masked pin drops: a bit that is set already must not swallow the next interrupt."""
    for _ in range(3):
        interrupt.raise_(VRING)
    assert (interrupt.status, events(interrupt)) == (VRING, 3)


def test_only_the_bits_that_are_acknowledged_go(interrupt):
    interrupt.raise_(VRING | CONFIG)
    interrupt.acknowledge(VRING)
    assert interrupt.status == CONFIG
    interrupt.acknowledge(1 << 31)
    assert interrupt.status == CONFIG


def test_acknowledging_makes_no_event(interrupt):
    interrupt.raise_(VRING)
    events(interrupt)
    interrupt.acknowledge(VRING)
    assert events(interrupt) == 0


def test_word_is_the_status(interrupt):
    """What the run loop reads and clears is what Python sees."""
    interrupt.raise_(CONFIG)
    assert interrupt.word[0] == CONFIG
    interrupt.word[0] = VRING
    assert interrupt.status == VRING


def test_bits_of_other_threads_are_not_lost(interrupt):
    """Raising and acknowledging from many threads: each bit ends as its own thread left it."""
    start = threading.Barrier(4)

    def raise_(bit):
        start.wait()
        for _ in range(2000):
            interrupt.acknowledge(1 << bit)
            interrupt.raise_(1 << bit)

    threads = [in_thread(lambda bit=bit: raise_(bit)) for bit in range(4)]
    assert all(joined(thread) for thread in threads)
    assert interrupt.status == 0xF


def test_guest_that_never_acknowledges_blocks_nobody(interrupt):
    """The eventfd does not block: a full counter is an interrupt that is pending anyway."""
    os.eventfd_write(interrupt.fd, 2**64 - 2)
    interrupt.raise_(VRING)
    assert interrupt.status == VRING


def test_closed_interrupt_touches_no_descriptor():
    """The number of a closed eventfd soon belongs to somebody else."""
    interrupt = Interrupt()
    fd = interrupt.fd
    interrupt.close()
    interrupt.close()
    other = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        assert other == fd
        interrupt.raise_(VRING)
        with pytest.raises(BlockingIOError):
            os.eventfd_read(other)
    finally:
        os.close(other)

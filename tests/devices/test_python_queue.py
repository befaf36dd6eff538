"""The loop around a ring: what it leaves on it, where it waits, and that it always comes to an end."""

import os

import pytest
from mmio_driver import in_thread, joined
from virtio_bench import DATA

from kvmpy import MiB
from kvmpy._shim import lib
from kvmpy.conformance.driver import open_ring
from kvmpy.conformance.layout import Buffer, place
from kvmpy.devices.interrupt import Interrupt
from kvmpy.devices.python_queue import PythonQueue
from kvmpy.devices.virtqueue import Fault
from kvmpy.machine.memory import GuestMemory

SIZE = 8
PACKED = 1 << lib.VIRTIO_F_RING_PACKED


class Served:
    """A queue whose chains are executed by ``execute``: by default each has one byte written."""

    def __init__(self, features, **options):
        self.memory = GuestMemory(2 * MiB)
        setup = place(0, SIZE, 0x1_0000, features)
        self.ring = open_ring(self.memory, setup)
        self.interrupt = Interrupt()
        self.kick_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.executed = 0
        self.execute = lambda chain, queue: 1
        self.queue = PythonQueue(self.memory, setup, self.interrupt, self.kick_fd, self._execute, **options)

    def _execute(self, chain, queue):
        self.executed += 1
        return self.execute(chain, queue)

    def offer(self, count=1):
        for _ in range(count):
            self.ring.add([Buffer(DATA, 16, True)])
        self.ring.publish()

    def close(self):
        self.queue.close()
        self.interrupt.close()
        os.close(self.kick_fd)
        self.memory.close()


@pytest.fixture(params=[0, PACKED], ids=["split", "packed"])
def make(request):
    made = []

    def make(**options):
        made.append(Served(request.param, **options))
        return made[-1]

    yield make
    for served in made:
        served.close()


def test_chains_stay_on_the_ring_while_the_device_is_not_ready(make):
    """And each is looked at anew: what makes the device ready may suffice for one."""
    left = [2]
    served = make(ready=lambda: left[0] > 0)

    def execute(chain, queue):
        left[0] -= 1
        return 1

    served.execute = execute
    served.offer(4)
    assert served.queue.process() is None
    assert len(served.ring.used()) == 2
    left[0] = 1
    served.queue.process()
    assert len(served.ring.used()) == 1


def test_stopped_queue_leaves_what_is_available(make):
    """A disk's requests are not begun any more: the driver was not told that they are done."""
    served = make()
    served.offer(3)
    served.queue.stop()
    assert served.queue.serve() is None
    assert (served.executed, served.ring.used()) == (0, [])


def test_stopped_queue_serves_the_rest_where_it_shall(make):
    served = make(serve_rest=True)
    served.offer(3)
    served.queue.stop()
    assert served.queue.serve() is None
    assert len(served.ring.used()) == 3
    assert served.interrupt.status == lib.VIRTIO_MMIO_INT_VRING


def test_rest_is_a_ring_full_at_most(make):
    """A driver that goes on making buffers available does not keep the reset of its device from being done."""
    served = make(serve_rest=True)

    def execute(chain, queue):
        served.ring.used()
        served.offer()
        return 1

    served.execute = execute
    served.offer()
    served.queue.stop()
    serving = in_thread(served.queue.serve)
    assert joined(serving)
    assert served.executed == SIZE


def test_rest_does_not_skip_a_chain(make):
    """What is cut off stays so: nothing is done behind it that the guest meant to come later."""
    served = make(serve_rest=True)

    def execute(chain, queue):
        queue.stop()
        return None if served.executed == 1 else 1

    served.execute = execute
    served.offer(3)
    assert served.queue.serve() is None
    assert (served.executed, served.ring.used()) == (1, [])


def test_rest_that_is_broken_breaks_the_queue(make):
    served = make(serve_rest=True)
    served.ring.add([Buffer(1 << 40, 16, True)])
    served.ring.publish()
    served.queue.stop()
    assert served.queue.serve() is Fault.BUFFER_ADDRESS


def test_waiting_ends_by_descriptor_time_or_stop(make):
    served = make()
    ready = os.eventfd(1)
    assert served.queue.wait(ready)
    assert served.queue.wait(timeout_ns=1)
    served.queue.stop()
    assert not served.queue.wait(ready)
    assert not served.queue.wait(timeout_ns=10**18)
    os.close(ready)


def test_what_is_done_is_told_before_waiting(make):
    """Within a chain too: the driver may want the ones before it back first."""
    served = make()
    seen = []

    def execute(chain, queue):
        if served.executed == 2:
            queue.wait(timeout_ns=1)
            seen.append(served.interrupt.status)
        return 1

    served.execute = execute
    served.offer(2)
    served.queue.process()
    assert seen == [lib.VIRTIO_MMIO_INT_VRING]

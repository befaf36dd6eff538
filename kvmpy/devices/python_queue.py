"""A virtqueue served in readable Python: the loop around a ring, whatever its device does with a chain.

::

    kick eventfd --> serve(): poll --+
                     process(): <----+   ring: pop --> execute(chain) --> ring: push --> interrupt

Chains are executed one at a time, in their order, and each goes back with the number of bytes written into it. A chain
taken off the ring always comes back, unless the queue is stopped first.

Source: virtio 1.2 §2.7, §2.8. Floor: devices.
"""

import os
import select
from collections.abc import Callable
from contextlib import suppress

from kvmpy._shim import lib
from kvmpy.devices.interrupt import Interrupt
from kvmpy.devices.virtqueue import Chain, Fault, QueueFault, QueueSetup, SplitQueue
from kvmpy.devices.virtqueue_packed import PackedQueue
from kvmpy.machine.memory import GuestMemory

NANOSECONDS_IN_A_MILLISECOND = 10**6
LONGEST_POLL_MS = 60_000
"""A wait may be for years; poll counts its milliseconds in 31 bits."""

Execute = Callable[[Chain, "PythonQueue"], int | None]
"""Do what a chain asks for; return how many bytes were written into it, or None: the queue was stopped before."""


def always() -> bool:
    """A device that can use each chain as soon as it is there."""
    return True


class PythonQueue:
    """One virtqueue being served: a `kvmpy.devices.block.BlockQueue`.

    Chains stay on the ring while ``ready`` says no; who makes it say yes writes to ``kick_fd``. With ``serve_rest`` a
    `serve` that is stopped between two chains executes what is available then, up to the first that would have to wait,
    and at most a ring full.
    """

    def __init__(
        self,
        memory: GuestMemory,
        setup: QueueSetup,
        interrupt: Interrupt,
        kick_fd: int,
        execute: Execute,
        *,
        ready: Callable[[], bool] = always,
        serve_rest: bool = False,
    ) -> None:
        self._ring = (PackedQueue if setup.has(lib.VIRTIO_F_RING_PACKED) else SplitQueue)(memory, setup)
        self._size = setup.size
        self._interrupt = interrupt
        self._kick_fd = kick_fd
        self._execute, self._ready, self._serve_rest = execute, ready, serve_rest
        self._stop_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._fault: Fault | None = None
        self._broken_off = False  # in the middle of a chain
        self.stopped = False

    def serve(self) -> Fault | None:
        """As `process`, then wait for the kick eventfd, and again, until `stop`: then return None."""
        while (fault := self.process()) is None and self.wait(self._kick_fd):
            # Before the ring is looked at: a kick that comes later is seen by the next poll.
            with suppress(BlockingIOError):
                os.eventfd_read(self._kick_fd)
        return self._rest() if fault is None and self._serve_rest else fault

    def process(self) -> Fault | None:
        """Serve all that is available now and return. A Fault broke the queue, for ever."""
        try:
            while self._fault is None and not self.stopped:
                if self._wanted():
                    self._ring.disable_notifications()
                    self._serve_available()
                    if self.stopped:
                        break
                self._ring.enable_notifications()
                # The driver may have looked at the ring just before and not notified: look again.
                if not self._wanted():
                    break
        except QueueFault as error:
            self._fault = error.fault
        return self._fault

    def _wanted(self) -> bool:
        return self._ready() and self._ring.available()

    def _serve_available(self) -> None:
        try:
            while not self.stopped and self._ready() and self._serve_one():
                pass
        finally:
            self._interrupt_driver()

    def _serve_one(self) -> bool:
        chain = self._ring.pop()
        if chain is None:
            return False
        written = self._execute(chain, self)
        if written is None:
            self._broken_off = True
            return False
        self._ring.push(chain, written)
        return True

    def _rest(self) -> Fault | None:
        try:
            served = 0
            while served < self._size and not self._broken_off and self._serve_one():
                served += 1
        except QueueFault as error:
            self._fault = error.fault
        self._interrupt_driver()
        return self._fault

    def _interrupt_driver(self) -> None:
        if self._ring.wants_interrupt():
            self._interrupt.raise_(lib.VIRTIO_MMIO_INT_VRING)

    def wait(self, fd: int | None = None, *, timeout_ns: int | None = None) -> bool:
        """Wait until ``fd`` is readable or the time is over; False: the queue was stopped. Also within ``execute``."""
        self._interrupt_driver()  # for what is done: it shall not wait too
        poll = select.poll()
        poll.register(self._stop_fd, select.POLLIN)
        if fd is not None:
            poll.register(fd, select.POLLIN)
        milliseconds = None if timeout_ns is None else min(timeout_ns / NANOSECONDS_IN_A_MILLISECOND, LONGEST_POLL_MS)
        return all(ready != self._stop_fd for ready, _ in poll.poll(milliseconds))

    def stop(self) -> None:
        """Make `serve` or `process` return soon, from any thread; the queue stays stopped until it is closed."""
        self.stopped = True
        os.eventfd_write(self._stop_fd, 1)

    def close(self) -> None:
        """Free what the queue holds; nobody serves it any more. Closing twice is harmless."""
        if self._stop_fd >= 0:
            os.close(self._stop_fd)
            self._stop_fd = -1

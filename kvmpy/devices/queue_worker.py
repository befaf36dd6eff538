"""Who serves a virtqueue: a thread of its own, or whoever kicks it.

::

    guest writes QueueNotify --> ioeventfd --> kick eventfd --> QueueWorker's thread: queue.serve()
                            (or) QueueNotify in Python ------> InlineWorker: queue.process(), there and then

A worker begins when it is made, and looks at the ring at once: what a driver made available before the device lived
needs no kick. It ends when the queue breaks (`on_fault`), when serving it raises (`on_error`), or when it is stopped.
`stop` only asks and never waits, so a worker that has just found a fault may stop its neighbours, and itself; `join`
waits, and closes the queue. Both callbacks run without any lock of the worker.
"""

import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from kvmpy.devices.block import BlockQueue
    from kvmpy.devices.virtqueue import Fault


class Worker(Protocol):
    """One queue being served."""

    def kick(self) -> None:
        """Have the queue looked at: the driver has made something available."""

    def stop(self) -> None:
        """Ask for the end, from any thread; does not wait."""

    def join(self) -> None:
        """After `stop`: wait until nothing of the queue is served any more, then close it. Twice is harmless."""


class MakeWorker(Protocol):
    """A worker's class, or any function that makes one."""

    def __call__(
        self,
        queue: "BlockQueue",
        *,
        name: str,
        kick_fd: int,
        on_fault: "Callable[[Fault], None]",
        on_error: Callable[[BaseException], None],
    ) -> Worker: ...


class _Stoppable:
    """A queue that may be stopped while, and after, another thread closes it: a fault elsewhere stops them all."""

    def __init__(self, queue: "BlockQueue") -> None:
        self._queue = queue
        self._lock = threading.Lock()
        self._closed = False

    def stop(self) -> None:
        with self._lock:
            if not self._closed:
                self._queue.stop()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._queue.close()


class QueueWorker:
    """Serves ``queue`` in a thread called ``name``. ``kick_fd`` is the eventfd that the queue waits for."""

    def __init__(
        self,
        queue: "BlockQueue",
        *,
        name: str,
        kick_fd: int,
        on_fault: "Callable[[Fault], None]",
        on_error: Callable[[BaseException], None],
    ) -> None:
        self._queue = queue
        self._end = _Stoppable(queue)
        self._kick_fd = kick_fd
        self._on_fault, self._on_error = on_fault, on_error
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._thread.start()

    def kick(self) -> None:
        """Have the queue looked at."""
        os.eventfd_write(self._kick_fd, 1)

    def stop(self) -> None:
        """Ask for the end, from any thread; does not wait."""
        self._end.stop()

    def join(self) -> None:
        """Wait for the thread and close the queue. The thread itself, in a callback, neither waits nor closes."""
        if threading.current_thread() is not self._thread:
            self._thread.join()
            self._end.close()

    def _main(self) -> None:
        try:
            fault = self._queue.serve()
            if fault is not None:
                self._on_fault(fault)
        except BaseException as error:  # nothing above this frame would see it
            self._on_error(error)


class InlineWorker:
    """Serves ``queue`` in the thread that kicks it, before `kick` returns: for tests, which then need not wait."""

    def __init__(
        self,
        queue: "BlockQueue",
        *,
        name: str,
        kick_fd: int,
        on_fault: "Callable[[Fault], None]",
        on_error: Callable[[BaseException], None],
    ) -> None:
        self._queue = queue
        self._end = _Stoppable(queue)
        self._on_fault, self._on_error = on_fault, on_error
        self._serving = threading.Lock()
        self._ended = False
        self.kick()

    def kick(self) -> None:
        """Serve what is available."""
        try:
            fault = self._process()
            if fault is not None:
                self._on_fault(fault)
        except Exception as error:  # as in a thread: a guest's write raises nothing
            self._on_error(error)

    def _process(self) -> "Fault | None":
        with self._serving:
            if self._ended:
                return None
            self._ended = True  # unless it returns, and without a fault
            fault = self._queue.process()
            self._ended = fault is not None
            return fault

    def stop(self) -> None:
        """Ask a `kick` that is under way to return."""
        self._end.stop()

    def join(self) -> None:
        """Wait for a `kick` that is under way, and close the queue."""
        with self._serving:
            self._ended = True
            self._end.close()

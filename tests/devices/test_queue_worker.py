"""Who serves a queue: a thread, or the caller. A queue here is an eventfd and a list of what it shall do."""

import os
import select
import threading

import pytest
from mmio_driver import LIMIT, in_thread, joined

from kvmpy.devices.queue_worker import InlineWorker, QueueWorker
from kvmpy.devices.virtqueue import Fault


class ListedQueue:
    """Does the next thing of ``steps`` at each look: None, a Fault, or an exception; then nothing more."""

    def __init__(self, steps=()):
        self.steps = list(steps)
        self.looks = 0
        self.kick_fd = os.eventfd(0, os.EFD_NONBLOCK)
        self.looked, self.gate = threading.Condition(), threading.Event()
        self.gate.set()
        self.threads = []
        self._stop_fd = os.eventfd(0, os.EFD_NONBLOCK)
        self.closed = self.stopped = False

    def process(self):
        assert not self.closed
        assert self.gate.wait(LIMIT)
        step = self.steps.pop(0) if self.steps else None
        with self.looked:
            self.looks += 1
            self.threads.append(threading.current_thread())
            self.looked.notify_all()
        if isinstance(step, Exception):
            raise step
        return step

    def serve(self):
        poll = select.poll()
        poll.register(self.kick_fd, select.POLLIN)
        poll.register(self._stop_fd, select.POLLIN)
        while not self.stopped:
            fault = self.process()
            if fault is not None:
                return fault
            if any(fd == self.kick_fd for fd, _ in poll.poll(LIMIT * 1000)):
                os.eventfd_read(self.kick_fd)
        return None

    def stop(self):
        assert not self.closed
        self.stopped = True
        os.eventfd_write(self._stop_fd, 1)

    def close(self):
        self.closed = True

    def wait_for_looks(self, looks):
        with self.looked:
            assert self.looked.wait_for(lambda: self.looks >= looks, LIMIT)

    def free(self):
        os.close(self.kick_fd)
        os.close(self._stop_fd)


class Office:
    """Workers of one kind, and what they report."""

    def __init__(self, make_worker):
        self._make_worker = make_worker
        self._started = []
        self.faults, self.errors = [], []
        self.reported = threading.Event()
        self.then = lambda: None

    def start(self, *steps, gate_open=True):
        queue = ListedQueue(steps)
        if not gate_open:
            queue.gate.clear()
        worker = self._make_worker(
            queue, name="disk0-queue1", kick_fd=queue.kick_fd, on_fault=self._on_fault, on_error=self._on_error
        )
        self._started.append((worker, queue))
        return worker, queue

    def _on_fault(self, fault):
        self.faults.append(fault)
        self.then()
        self.reported.set()

    def _on_error(self, error):
        self.errors.append(error)
        self.then()
        self.reported.set()

    def close(self):
        for worker, queue in self._started:
            queue.gate.set()
            worker.stop()
            worker.join()
            queue.free()


@pytest.fixture(params=[QueueWorker, InlineWorker], ids=["thread", "inline"])
def office(request):
    office = Office(request.param)
    yield office
    office.close()


@pytest.fixture
def threads():
    office = Office(QueueWorker)
    yield office
    office.close()


def test_worker_looks_before_any_kick(office):
    """What was made available before DRIVER_OK needs no notification."""
    _, queue = office.start()
    queue.wait_for_looks(1)


def test_each_kick_is_a_look(office):
    worker, queue = office.start()
    queue.wait_for_looks(1)
    worker.kick()
    queue.wait_for_looks(2)


def test_fault_is_reported_once_and_ends_the_worker(office):
    worker, queue = office.start(Fault.HEAD, Fault.NEXT)
    assert office.reported.wait(LIMIT)
    worker.kick()
    worker.stop()
    worker.join()
    assert office.faults == [Fault.HEAD]
    assert (queue.looks, queue.closed) == (1, True)


def test_exception_is_reported_and_ends_the_worker(office):
    """It is a defect of ours: whoever owns the VM hears of it, with the traceback."""
    error = RuntimeError("a defect")
    worker, queue = office.start(error)
    assert office.reported.wait(LIMIT)
    worker.kick()
    worker.stop()
    worker.join()
    assert office.errors == [error]
    assert error.__traceback__ is not None
    assert queue.looks == 1


def test_exception_in_a_callback_is_reported_too(office):
    error = RuntimeError("in the callback")

    def fail_once():
        office.then = lambda: None
        raise error

    office.then = fail_once
    office.start(Fault.HEAD)
    assert office.reported.wait(LIMIT)
    assert (office.faults, office.errors) == ([Fault.HEAD], [error])


def test_nothing_is_served_after_join(office):
    worker, queue = office.start()
    queue.wait_for_looks(1)
    worker.stop()
    worker.join()
    looks = queue.looks
    worker.kick()
    assert queue.looks == looks
    assert queue.closed


def test_joining_and_stopping_twice_is_harmless(office):
    """A fault elsewhere may stop a queue that has just been closed; the queue never hears of it."""
    worker, queue = office.start()
    for _ in range(2):
        worker.stop()
        worker.join()
    worker.stop()
    assert queue.closed


def test_join_waits_for_what_is_under_way(threads):
    worker, queue = threads.start(gate_open=False)
    worker.stop()
    ended = threading.Event()
    joiner = in_thread(lambda: (worker.join(), ended.set()))
    assert not queue.closed
    assert not ended.is_set()
    queue.gate.set()
    assert joined(joiner)
    assert queue.closed


def test_stop_does_not_wait(threads):
    worker, queue = threads.start(gate_open=False)
    worker.stop()
    assert queue.looks == 0


def test_worker_that_reports_a_fault_may_stop_and_join_all(threads):
    """Also itself: it does not wait for its own end, and leaves closing its queue to the next who joins."""
    other, other_queue = threads.start()
    other_queue.wait_for_looks(1)
    everyone = [other]

    def stop_all():
        for worker in everyone:
            worker.stop()
        for worker in everyone:
            worker.join()

    threads.then = stop_all
    faulty, faulty_queue = threads.start(None, Fault.HEAD)
    everyone.append(faulty)
    faulty.kick()
    assert threads.reported.wait(LIMIT)
    assert other_queue.closed
    faulty.join()
    assert faulty_queue.closed


def test_workers_are_daemon_threads_with_names(threads):
    """A hung disk does not keep the process alive, and a stack dump says whose thread it is."""
    _, queue = threads.start()
    queue.wait_for_looks(1)
    assert (queue.threads[0].name, queue.threads[0].daemon) == ("disk0-queue1", True)


def test_inline_worker_serves_in_the_callers_thread():
    office = Office(InlineWorker)
    worker, queue = office.start()
    worker.kick()
    assert queue.threads == [threading.current_thread()] * 2
    office.close()


def test_stopping_races_with_closing(office):
    """Threads that stop while others join: no queue is stopped after it was closed."""
    for _ in range(50):
        worker, queue = office.start()
        start = threading.Barrier(4)

        def end(start=start, worker=worker):
            start.wait()
            worker.stop()
            worker.join()
            worker.stop()

        racing = [in_thread(end) for _ in range(3)]
        start.wait()
        assert all(joined(thread) for thread in racing)
        assert queue.closed

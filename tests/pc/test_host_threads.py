"""Threads that a vCPU's thread starts run where the host wants them, and the vCPU where it is."""

import os
import threading

import pytest

from kvmpy.pc.host_threads import HostThreads


@pytest.fixture
def cpus() -> list[int]:
    """The host CPUs that this process may use."""
    return sorted(os.sched_getaffinity(0))


def in_pinned_thread(cpu: int, threads: HostThreads) -> tuple[set[int], set[int]]:
    """Return where a thread runs that was started from one on ``cpu``, and where that one is then."""
    found: list[set[int]] = []

    def start() -> None:
        os.sched_setaffinity(0, {cpu})
        started = threading.Thread(target=lambda: found.append(os.sched_getaffinity(0)))
        threads.start(started.start)
        started.join()
        found.append(os.sched_getaffinity(0))

    starter = threading.Thread(target=start)
    starter.start()
    starter.join()
    return found[0], found[1]


def test_thread_begins_on_the_host_cpus(cpus: list[int]) -> None:
    assert in_pinned_thread(cpus[-1], HostThreads(cpus)) == (set(cpus), {cpus[-1]})
    assert in_pinned_thread(cpus[-1], HostThreads(cpus[:1])) == ({cpus[0]}, {cpus[-1]})


def test_starter_is_put_back_when_nothing_could_be_started(cpus: list[int]) -> None:
    """The host has no thread left, say."""

    def fail() -> None:
        raise RuntimeError("no thread")

    before = os.sched_getaffinity(0)
    with pytest.raises(RuntimeError, match="no thread"):
        HostThreads(cpus[:1]).start(fail)
    assert os.sched_getaffinity(0) == before

"""Threads of a PC that are not its vCPUs': where on the host they run.

A thread begins on the host CPUs of the thread that starts it. Those of queues and timers are started when a guest asks
for what they do, by a vCPU's thread, which may be pinned; they shall not take its CPU.
"""

import os
from collections.abc import Callable, Iterable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class HostThreads:
    """Has threads begin on the host CPUs ``cpus``."""

    def __init__(self, cpus: Iterable[int]) -> None:
        self._cpus = frozenset(cpus)

    def start(self, function: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
        """Return what ``function`` returns, which starts a thread."""
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, self._cpus)
        try:
            return function(*arguments, **options)
        finally:
            os.sched_setaffinity(0, before)

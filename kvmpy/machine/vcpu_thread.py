"""One host thread for each vCPU: it runs the guest, serves its exits, and does what other threads ask between exits.

KVM wants a vCPU's ioctls from the thread that created it, so the thread creates it, and whoever wants its state sends
a function (`call`). The order of things between two entries: the exit is handled, then, if somebody waits, it is
completed (KVM API §5: only re-entering KVM_RUN finishes a PIO or MMIO), and only then is state touched.
"""

import os
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from kvmpy.kvm import Exit, Vcpu, Vm

T = TypeVar("T")


class _Request(Generic[T]):
    """A function on its way to a vCPU thread, and its answer on the way back."""

    def __init__(self, function: Callable[[Vcpu], T]) -> None:
        self.function = function
        self.done = threading.Event()
        self.error: BaseException | None = None
        self.result: T

    def serve(self, vcpu: Vcpu) -> None:
        try:
            self.result = self.function(vcpu)
        except BaseException as error:  # it is raised in the thread that asked
            self.error = error
        self.done.set()

    def refuse(self) -> None:
        self.error = RuntimeError("the vCPU thread has ended")
        self.done.set()


class VcpuThread:
    """The thread of vCPU ``vcpu_id``: created paused; `resume` lets the guest run.

    ``prepare`` runs once on the new vCPU, in its thread. ``handle`` gets each exit and says whether to go on;
    what it raises ends the thread and goes to ``on_error``.
    """

    def __init__(
        self,
        vm: Vm,
        vcpu_id: int,
        *,
        prepare: Callable[[Vcpu], None],
        handle: Callable[[Vcpu, Exit], bool],
        on_error: Callable[[int, BaseException], None],
        host_cpu: int | None = None,
    ) -> None:
        self.vcpu_id = vcpu_id
        self.vcpu: Vcpu | None = None
        self._vm = vm
        self._prepare, self._handle, self._on_error = prepare, handle, on_error
        self._host_cpu = host_cpu
        # Guards the fields below. The thread looks at `_wanted` after each exit, and at the rest when that is set.
        self._changed = threading.Condition()
        self._wanted = True
        self._requests: deque[_Request[Any]] = deque()
        self._paused = True
        self._stopping = False
        self._thread = threading.Thread(target=self._main, name=f"kvmpy-vcpu{vcpu_id}", daemon=True)
        self._thread.start()

    def call(self, function: Callable[[Vcpu], T]) -> T:
        """Run ``function`` in the vCPU's thread, between two exits, and return its result or raise its error.

        Raises:
            RuntimeError: the thread has ended.
        """
        if threading.current_thread() is self._thread and self.vcpu is not None:
            return function(self.vcpu)
        request = _Request(function)
        with self._changed:
            if self._stopping:
                raise RuntimeError("the vCPU thread has ended")
            self._requests.append(request)
            self._wanted = True
            self._changed.notify_all()
        self._kick()
        request.done.wait()
        if request.error is not None:
            raise request.error
        return request.result

    def pause(self) -> None:
        """Take the vCPU out of the guest; it is out, and its last exit complete, on return."""
        with self._changed:
            self._paused = self._wanted = True
        self.call(lambda vcpu: None)

    def resume(self) -> None:
        """Let the vCPU run."""
        with self._changed:
            self._paused = False
            self._changed.notify_all()

    def stop(self) -> None:
        """Ask the thread to end; does not wait."""
        with self._changed:
            self._stopping = self._wanted = True
            self._changed.notify_all()
        self._kick()

    def join(self) -> None:
        """Wait until the thread has ended."""
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _kick(self) -> None:
        if self.vcpu is not None:
            self.vcpu.kick()

    def _main(self) -> None:
        try:
            if self._host_cpu is not None:
                os.sched_setaffinity(0, {self._host_cpu})
            vcpu = self._vm.create_vcpu(self.vcpu_id)
            self._prepare(vcpu)
            self.vcpu = vcpu
            self._run(vcpu)
        except BaseException as error:  # nothing above this frame would see it
            self._on_error(self.vcpu_id, error)
            if self.vcpu is not None:
                self._serve_until_stopped(self.vcpu)
        finally:
            with self._changed:
                self._stopping = True
                for request in self._requests:
                    request.refuse()
                self._requests.clear()

    def _run(self, vcpu: Vcpu) -> None:
        """Alternate between the guest and those who wait, until stopped."""
        next_exit, handle = vcpu.next_exit, self._handle
        while self._serve(vcpu):
            going = True
            while going and not self._wanted:
                going = handle(vcpu, next_exit())
            while vcpu.complete():
                # The instruction goes on: a wide or repeated access. Kicked, it is let no further than to its end.
                vcpu.kick()
                going = self._handle(vcpu, vcpu.next_exit()) and going
            if not going:
                with self._changed:
                    self._paused = True

    def _serve(self, vcpu: Vcpu) -> bool:
        """Do what was asked and wait while paused; False when stopping."""
        while True:
            with self._changed:
                while self._paused and not self._requests and not self._stopping:
                    self._changed.wait()
                request = self._requests.popleft() if self._requests else None
                if request is None:
                    self._wanted = False
                    return not self._stopping
            request.serve(vcpu)

    def _serve_until_stopped(self, vcpu: Vcpu) -> None:
        """Answer questions about a vCPU that will run no more."""
        with self._changed:
            self._paused = True
        while self._serve(vcpu):
            with self._changed:
                self._paused = True

"""A PC from a `MachineSpec`: board, devices, firmware tables and a booted image, and the run that comes of it.

The thread that calls `Pc.run` waits; vCPUs have threads of their own. What the guest prints goes from them through
a ring to the waiting thread, which hands it to a sink; input comes the other way.
"""

import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Self

from kvmpy._shim import lib
from kvmpy.devices.line import Line
from kvmpy.devices.serial import Uart16550
from kvmpy.errors import KvmError
from kvmpy.kvm import Kvm, Vcpu
from kvmpy.machine import params
from kvmpy.machine.boot.plan import Entry
from kvmpy.machine.machine import End, EndReason, Machine, Tracer
from kvmpy.machine.memory import GuestMemory
from kvmpy.pc.capture import Capture, Sink
from kvmpy.pc.dedicated import dedicate, restore_affinity
from kvmpy.pc.halt import HaltWatch
from kvmpy.pc.host_threads import HostThreads
from kvmpy.pc.load import load_image, start, write_tables
from kvmpy.pc.loop import Deadline, EventLoop, Watch
from kvmpy.pc.panic import HungPanic, PanicWatch
from kvmpy.pc.ports import Ports
from kvmpy.pc.report import result_of
from kvmpy.pc.result import REBOOTS, RunResult
from kvmpy.pc.spec import MachineSpec, OnReboot

if TYPE_CHECKING:
    from kvmpy.devices.virtio_console import VirtioConsole
    from kvmpy.pc.disks import AttachedDisk
    from kvmpy.pc.virtio import VirtioPlace

LONGEST_WAIT = 3600.0  # seconds
GATHER_MS = 1


class Pc:
    """A PC with ``spec.cores`` vCPUs, loaded and ready: nothing of the guest has run yet.

    ``serial``, ``debugcon`` and ``virtio_console`` get what the guest prints, as it prints it; the last MiB of each is
    kept anyway.
    ``tracer`` is called in the vCPU's thread after each exit that came to Python was handled: with
    ``spec.trace_exits``, after each exit. ``disks`` are those of ``spec.disks``, in their order.
    ``on_restart`` gets the result of a boot that ended in a reboot, in the thread of `run`, before the next begins.

    Raises:
        KvmError, KvmUnavailable: the host refused.
        DiskError: a disk cannot be opened, is damaged, or somebody else writes it.
        ImageError: the image or a module is not what it claims, or does not fit.
        ValueError: the spec asks for what this host cannot give.
    """

    def __init__(
        self,
        spec: MachineSpec,
        *,
        serial: Sink | None = None,
        debugcon: Sink | None = None,
        virtio_console: Sink | None = None,
        tracer: Tracer | None = None,
        on_restart: Callable[[RunResult], object] = lambda result: None,
    ) -> None:
        self.spec = spec
        self.id = spec.id or params.random_id()
        self.loop = EventLoop()
        self.started_at = self.ended_at = 0.0
        self.restarts = 0
        self._on_restart = on_restart
        self._stopped: EndReason | None = None
        self._paused = self._asked_to_stop = False
        self._spent = [0] * spec.cores  # exits of each vCPU in earlier boots
        self._close_lock = threading.Lock()
        self._running = threading.Lock()
        self._renewing = threading.Lock()  # held while one board takes the place of another
        self._ports: Ports | None = None
        self._virtio_console: VirtioConsole | None = None
        self._closers: list[Callable[[], None]] = [self.loop.close]
        try:
            self._build(spec, serial, debugcon, virtio_console, tracer)
        except BaseException:
            self._release()
            raise

    def _build(
        self,
        spec: MachineSpec,
        serial: Sink | None,
        debugcon: Sink | None,
        virtio_console: Sink | None,
        tracer: Tracer | None,
    ) -> None:
        self.kvm = Kvm()
        self._closers.append(self.kvm.close)
        allowed = self.kvm.check_extension(lib.KVM_CAP_MAX_VCPUS)
        if not 1 <= spec.cores <= allowed:
            raise ValueError(f"{spec.cores} cores: allowed is 1 to {allowed} (KVM_CAP_MAX_VCPUS of this host)")
        self.dedication = dedicate(self.kvm, spec.cores) if spec.dedicated else None
        if self.dedication:
            self._closers.append(restore_affinity())
            os.sched_setaffinity(0, self.dedication.host_cpus)
        self.memory = GuestMemory(spec.memory, hugepages=spec.hugepages)
        self._closers.append(self.memory.close)
        self.serial_capture = Capture(self.loop, serial, panic=PanicWatch())
        self.debugcon_capture = Capture(self.loop, debugcon)
        self.captures = [self.serial_capture, self.debugcon_capture]
        self._closers += [capture.close for capture in self.captures]
        self._threads = HostThreads(os.sched_getaffinity(0))
        self.disks = self._open_disks()
        rng, line = self._open_rng(), self._open_console(virtio_console)
        self._virtio: tuple[AttachedDisk | VirtioPlace, ...] = (*self.disks, *rng, *line)
        self.machine = self._make_machine()
        self._closers.append(self._close_board)
        self.machine.tracer = tracer
        self._power_on()

    @property
    def panics(self) -> list[PanicWatch]:
        """Who looks at the guest's consoles for a kernel panic."""
        return [capture.panic for capture in self.captures if capture.panic is not None]

    @property
    def entry(self) -> Entry:
        """How the first vCPU starts."""
        return self.loaded.entry

    def _make_machine(self) -> Machine:
        return Machine(
            self.kvm,
            self.memory,
            cores=self.spec.cores,
            on_end=self._ended,
            host_cpus=self.dedication.vcpu_cpus if self.dedication else self.spec.pin,
            disable_exits=self.dedication.disable_exits if self.dedication else 0,
        )

    def _power_on(self) -> None:
        """Put devices on the new board, load the image, and create the vCPUs, paused."""
        serial, debugcon = self.serial_capture.output, self.debugcon_capture.output
        self._ports = Ports(self.machine, self.spec, serial=serial, debugcon=debugcon, threads=self._threads)
        for device in self._virtio:
            device.attach(self.machine, self.spec.device_modes)
        write_tables(self.spec, self.memory, self.id)
        self.parameter_page = params.ParameterPage(self.memory)
        self.loaded = load_image(self.spec, self.memory)
        self.machine.completer.finish_strings = self.loaded.slow_linux
        if self.dedication:
            self._lock_memory()
        self.machine.power_on(lambda vcpu: start(vcpu, self.loaded.entry))
        for thread in self.machine.threads:
            thread.call(self._configure)

    def _open_disks(self) -> "tuple[AttachedDisk, ...]":
        if not self.spec.disks:
            return ()
        from kvmpy.pc.disks import open_disks  # with virtio and storage, of which other PCs need nothing

        disks = open_disks(self.spec, self.memory, threads=self._threads, on_error=self._on_worker_error)
        # Closed behind the machine, when no vCPU can kick a queue, and before the memory that the queues work on.
        self._closers += [disk.close for disk in disks]
        return disks

    def _open_rng(self) -> "tuple[VirtioPlace, ...]":
        window = self.spec.rng_window
        if window is None:
            return ()
        from kvmpy.pc.virtio import open_rng

        place = open_rng(window, self.memory, threads=self._threads, on_error=self._on_worker_error)
        self._closers.append(place.close)
        return (place,)

    def _open_console(self, sink: Sink | None) -> "tuple[VirtioPlace, ...]":
        window = self.spec.console_window
        if window is None:
            return ()
        from kvmpy.pc.virtio import open_console

        capture = Capture(self.loop, sink, panic=PanicWatch())
        self.captures.append(capture)
        self._closers.append(capture.close)
        place, self._virtio_console = open_console(
            window, self.memory, capture.output, threads=self._threads, on_error=self._on_worker_error
        )
        self._closers.append(place.close)
        return (place,)

    @property
    def serial(self) -> Uart16550:
        """COM1 of the board that is there now."""
        assert self._ports is not None
        return self._ports.serial

    @property
    def console(self) -> Line:
        """What the user types goes here: the device that ``spec.console`` names."""
        return self._virtio_console or self.serial

    def resize_console(self, columns: int, rows: int) -> None:
        """Tell the guest the size of its user's terminal, where its console can hear of it: the virtio console."""
        if self._virtio_console is not None:
            self._virtio_console.resize(columns, rows)

    def _lock_memory(self) -> None:
        try:
            self.memory.populate()
            self.memory.lock()
        except OSError as error:
            raise ValueError(
                f"--dedicated cannot lock {self.spec.memory >> 20} MiB of memory ({error.strerror}): "
                "raise the limit with ulimit -l, or give the guest less"
            ) from error

    def _configure(self, vcpu: Vcpu) -> None:
        budget = self.spec.max_exits
        vcpu.set_budget(max_exits=None if budget is None else budget - self._spent[vcpu.vcpu_id])
        vcpu.measure_time(self.spec.measure_time)
        vcpu.trace_exits(self.spec.trace_exits)

    # --- running ------------------------------------------------------------------------------------------------

    def run(self, *, timeout: float | None = None, watch_halt: bool = True) -> RunResult:
        """Run the guest to its end, or for ``timeout`` seconds, and say how it ended.

        A reboot is an end, or the begin of another boot, as the spec's ``on_reboot`` says; the result is the last's.
        ``watch_halt`` ends a run whose vCPUs all halted with interrupts off, so that nothing could wake them, or
        whose kernel has panicked and hangs.
        A Ctrl-C (KeyboardInterrupt) passes through; the guest is then paused. Other threads may call `pause`,
        `resume`, `stop` and `close` meanwhile.

        Raises:
            ValueError: it ran already, or is closed.
            Exception: what a Python device raised.
        """
        if self.started_at:
            raise ValueError("this PC ran already: make another")
        with self._running:
            if not self._closers:
                raise ValueError("this PC is closed")
            deadline, self._paused = Deadline(timeout), False
            self._boot(deadline, watch_halt)
            while self._reboots():
                self._on_restart(result_of(self))
                self.loop.wait(0)  # a guest that reboots at once, for ever, shall not keep a signal from being heard
                self._restart()
                self._boot(deadline, watch_halt)
            end = self.machine.end
            assert end is not None
            if end.error is not None and not isinstance(end.error, KvmError):
                raise end.error
            return result_of(self)

    def _boot(self, deadline: Deadline, watch_halt: bool) -> None:
        """Let the guest run to its end."""
        watching = watch_halt and not self.spec.dedicated  # whose vCPUs nobody disturbs, and whose HLT nobody sees
        watches = (HaltWatch(self.machine), HungPanic(self.machine, self.panics)) if watching else ()
        self.started_at = self.ended_at = time.monotonic()
        with self._renewing:
            if not self._paused:
                self.machine.run()
        try:
            self._wait(deadline, watches)
        finally:  # a Ctrl-C only pauses
            self.ended_at = time.monotonic()
            self.machine.pause_ended()
            if self.machine.end is not None:
                for device in self._virtio:
                    (device.reset if self._reboots() else device.stop)()
            for capture in self.captures:
                capture.drain()
            for panic in self.panics:
                panic.finish()

    def _wait(self, deadline: Deadline, watches: Sequence[Watch]) -> None:
        while self.machine.end is None:
            self.loop.wait(deadline.remaining(min((watch.interval for watch in watches), default=LONGEST_WAIT)))
            if deadline.passed:
                self.machine.finish(End(EndReason.TIMEOUT))
                return
            for watch in watches:
                watch.look()
            # A guest prints byte by byte, and each byte that wakes this thread takes time from the vCPU.
            self.loop.rest(GATHER_MS)

    def _reboots(self) -> bool:
        """Tell whether another boot follows. A guest that was asked to stop, and resets, has stopped."""
        end = self.machine.end
        resets = end is not None and end.reason in REBOOTS
        return resets and self.spec.on_reboot is OnReboot.RESTART and not self._asked_to_stop

    def _restart(self) -> None:
        """Put a new board around what outlives a reset: memory, disks, and the lines to the host."""
        with self._renewing:
            last, serial = self.machine, self.serial
            for vcpu in last.vcpus():
                self._spent[vcpu.vcpu_id] += vcpu.exits_total
            self._close_board()
            for panic in self.panics:
                panic.reset()
            self.memory.clear()
            self.machine = self._make_machine()
            self.machine.tracer = last.tracer
            self._power_on()
            self.serial.take_over(serial)
            self.restarts += 1
            if self._stopped is not None:  # while there was no board to stop
                self.machine.finish(End(self._stopped))

    def stop(self, reason: EndReason = EndReason.INTERRUPTED) -> None:
        """End the run from outside; from any thread or signal handler."""
        self._stopped = reason
        self.machine.finish(End(reason))

    def pause(self) -> None:
        """Take all vCPUs out of the guest; they are out on return. From any thread but a vCPU's.

        Requests that the guest made of its disks before are executed meanwhile; see `AttachedDisk.exclusive`.
        """
        with self._renewing:
            self._paused = True
            self.machine.pause()

    def resume(self) -> None:
        """Let the vCPUs run on."""
        with self._renewing:
            self._paused = False
            self.machine.run()

    def request_stop(self) -> None:
        """Ask the guest to stop: mailbox and GSI of the parameter page (guests/abi.h), to ACPI the power button.

        The guest may ignore that, and a kernel that does not listen yet misses it.
        """
        self._asked_to_stop = True
        with self._renewing:
            self.parameter_page.request(lib.KVMPY_REQUEST_STOP)
            self.machine.vm.irq_line(lib.KVMPY_STOP_GSI, True)
            self.machine.vm.irq_line(lib.KVMPY_STOP_GSI, False)

    def _ended(self, end: End) -> None:
        self.loop.wake()

    def _on_worker_error(self, error: BaseException) -> None:
        self.machine.finish(End(EndReason.ERROR, error=error))

    # --- lifetime -----------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Stop and free everything, from any thread; a `run` under way in another returns first. Idempotent.

        Not from a sink, device or tracer of its own, which are inside that run: they call `stop`.

        Raises:
            OSError, DiskError: what the guest wrote to a disk could not be made durable. All is closed even so.
        """
        self.stop()
        with self._running, self._close_lock:
            self._release()

    def _close_board(self) -> None:
        if self._ports is not None:
            self._ports.close()
        self.machine.close()

    def _release(self) -> None:
        with ExitStack() as last_first:  # all of them, also when one raises
            for close in self._closers:
                last_first.callback(close)
            self._closers.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

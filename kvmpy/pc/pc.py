"""A PC from a `MachineSpec`: board, devices, firmware tables and a booted image, and the run that comes of it.

The thread that calls `Pc.run` waits; vCPUs have threads of their own. What the guest prints goes from them through
a ring to the waiting thread, which hands it to a sink; input comes the other way.
"""

import os
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Self

from kvmpy._shim import lib
from kvmpy.devices import debug, power, reset
from kvmpy.devices.rtc import CMOS_PORT, CMOS_SIZE, Cmos
from kvmpy.devices.serial import SERIAL_SIZE, Uart16550
from kvmpy.errors import KvmError
from kvmpy.kvm import Kvm, Vcpu
from kvmpy.machine import acpi, layout, mptable, params, x86
from kvmpy.machine.boot.detect import boot
from kvmpy.machine.boot.plan import CpuMode, Entry
from kvmpy.machine.bus import Device, InterruptLine, Mode
from kvmpy.machine.machine import End, EndReason, Machine, Tracer
from kvmpy.machine.memory import GuestMemory
from kvmpy.pc.capture import Capture, Sink
from kvmpy.pc.dedicated import Dedication, dedicate, restore_affinity
from kvmpy.pc.halt import HaltWatch
from kvmpy.pc.loop import Deadline, EventLoop
from kvmpy.pc.report import result_of
from kvmpy.pc.result import RunResult
from kvmpy.pc.spec import Announcement, MachineSpec

if TYPE_CHECKING:
    from kvmpy.pc.disks import AttachedDisk

LONGEST_WAIT = 3600.0  # seconds
GATHER_MS = 1


class Pc:
    """A PC with ``spec.cores`` vCPUs, loaded and ready: nothing of the guest has run yet.

    ``serial`` and ``debugcon`` get what the guest prints, as it prints it; the last MiB of each is kept anyway.
    ``tracer`` is called in the vCPU's thread after each exit that came to Python was handled: with
    ``spec.trace_exits``, after each exit. ``disks`` are those of ``spec.disks``, in their order.

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
        tracer: Tracer | None = None,
    ) -> None:
        self.spec = spec
        self.loop = EventLoop()
        self.started_at = self.ended_at = 0.0
        self._close_lock = threading.Lock()
        self._running = threading.Lock()
        self._closers: list[Callable[[], None]] = [self.loop.close]
        try:
            self._build(spec, serial, debugcon, tracer)
        except BaseException:
            self._release()
            raise

    def _build(self, spec: MachineSpec, serial: Sink | None, debugcon: Sink | None, tracer: Tracer | None) -> None:
        self.kvm = Kvm()
        self._closers.append(self.kvm.close)
        allowed = self.kvm.check_extension(lib.KVM_CAP_MAX_VCPUS)
        if not 1 <= spec.cores <= allowed:
            raise ValueError(f"{spec.cores} cores: allowed is 1 to {allowed} (KVM_CAP_MAX_VCPUS of this host)")
        self.dedication = dedicate(self.kvm, spec.cores) if spec.dedicated else None
        self.memory = GuestMemory(spec.memory, hugepages=spec.hugepages)
        self._closers.append(self.memory.close)
        self.serial_capture = Capture(self.loop, serial)
        self.debugcon_capture = Capture(self.loop, debugcon)
        self._closers += [self.serial_capture.close, self.debugcon_capture.close]
        self.disks = self._open_disks()
        self.machine = Machine(
            self.kvm,
            self.memory,
            cores=spec.cores,
            on_end=self._ended,
            host_cpus=self.dedication.vcpu_cpus if self.dedication else spec.pin,
            disable_exits=self.dedication.disable_exits if self.dedication else 0,
        )
        self._closers.append(self.machine.close)
        self.machine.tracer = tracer
        self._attach_devices()
        self.entry = self._load()
        if self.dedication:
            self._dedicate_memory(self.dedication)
        self.machine.power_on(self._start)
        for thread in self.machine.threads:
            thread.call(self._configure)

    def _open_disks(self) -> "tuple[AttachedDisk, ...]":
        if not self.spec.disks:
            return ()
        from kvmpy.pc.disks import open_disks  # with virtio and storage, of which other PCs need nothing

        host_cpus = self.dedication.host_cpus if self.dedication else os.sched_getaffinity(0)
        disks = open_disks(self.spec, self.memory, host_cpus=host_cpus, on_error=self._on_worker_error)
        # Closed behind the machine, when no vCPU can kick a queue, and before the memory that the queues work on.
        self._closers += [disk.close for disk in disks]
        return disks

    def _attach_devices(self) -> None:
        self.serial = Uart16550(self.serial_capture.output, self._interrupt(lib.KVMPY_IRQ_SERIAL))
        self.power = power.AcpiPm1(self._on_power_off, self._interrupt(lib.KVMPY_IRQ_ACPI))
        on_reset, exit_port = self._on_reset, debug.ExitPort(self._on_exit)
        keyboard = reset.KeyboardController(on_reset)
        self._attach(lib.KVMPY_PORT_SERIAL, SERIAL_SIZE, self.serial, "serial")
        self._attach(lib.KVMPY_PORT_CONSOLE, 1, debug.DebugConsole(self.debugcon_capture.output), "debugcon")
        self._attach(lib.KVMPY_PORT_EXIT, debug.EXIT_PORT_SIZE, exit_port, "exit")
        self._attach(CMOS_PORT, CMOS_SIZE, Cmos(self.spec.memory), "cmos")
        self._attach(reset.KEYBOARD_DATA_PORT, 1, keyboard.data, "keyboard")
        self._attach(reset.KEYBOARD_COMMAND_PORT, 1, keyboard.command, "keyboard")
        self._attach(reset.SYSTEM_CONTROL_A_PORT, 1, reset.SystemControlA(on_reset), "port92")
        self._attach(reset.RESET_CONTROL_BASE, reset.RESET_CONTROL_SIZE, reset.ResetControl(on_reset), "reset")
        self._attach(lib.KVMPY_PORT_ACPI_EVENT, power.EVENT_SIZE, self.power.event, "acpi")
        self._attach(lib.KVMPY_PORT_ACPI_CONTROL, power.CONTROL_SIZE, self.power.control, "acpi")
        for disk in self.disks:
            disk.attach(self.machine, self.spec.device_modes.get("disk", Mode.C))

    def _attach(self, port: int, size: int, device: Device, name: str) -> None:
        self.machine.pio.attach(port, size, device, name=name, mode=self.spec.device_modes.get(name, Mode.C))

    def _interrupt(self, gsi: int) -> InterruptLine:
        vm = self.machine.vm
        return lambda level: vm.irq_line(gsi, level)

    def _load(self) -> Entry:
        """Write firmware tables, parameter page and image; return how the first vCPU starts."""
        spec, memory, windows = self.spec, self.memory, self.spec.virtio_windows
        by_acpi = spec.virtio is Announcement.ACPI
        mptable.write(memory, spec.cores)
        acpi.write(memory, spec.cores, windows if by_acpi else ())
        identity = params.Parameters(spec.name, spec.id or params.random_id(), dict(spec.parameters))
        params.write(memory, spec.cores, identity, windows)
        self.parameter_page = params.ParameterPage(memory)
        words = () if by_acpi else layout.virtio_cmdline(windows)
        entry = boot(os.fspath(spec.boot), memory, spec.boot_options._replace(devices=words))
        x86.write_boot_tables(memory, long=entry.mode is CpuMode.LONG)
        return entry

    def _dedicate_memory(self, dedication: Dedication) -> None:
        self._closers.append(restore_affinity())
        os.sched_setaffinity(0, dedication.host_cpus)
        try:
            self.memory.populate()
            self.memory.lock()
        except OSError as error:
            raise ValueError(
                f"--dedicated cannot lock {self.spec.memory >> 20} MiB of memory ({error.strerror}): "
                "raise the limit with ulimit -l, or give the guest less"
            ) from error

    def _start(self, vcpu: Vcpu) -> None:
        """Set the first vCPU's registers as the boot protocol says."""
        entry = self.entry
        if entry.mode is CpuMode.REAL:
            x86.real_mode(vcpu, entry.rip)
        elif entry.mode is CpuMode.PROTECTED:
            x86.protected_mode(vcpu, entry.rip)
        else:
            x86.long_mode(vcpu, entry.rip)
        with vcpu.edit_regs() as regs:
            for name, value in entry.registers.items():
                setattr(regs, name, value)

    def _configure(self, vcpu: Vcpu) -> None:
        vcpu.set_budget(max_exits=self.spec.max_exits)
        vcpu.measure_time(self.spec.measure_time)
        vcpu.trace_exits(self.spec.trace_exits)

    # --- running ------------------------------------------------------------------------------------------------

    def run(self, *, timeout: float | None = None, watch_halt: bool = True) -> RunResult:
        """Run the guest to its end, or for ``timeout`` seconds, and say how it ended.

        ``watch_halt`` ends a run whose vCPUs all halted with interrupts off: nothing could wake them.
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
            deadline = Deadline(timeout)
            halt = HaltWatch(self.machine) if watch_halt and not self.spec.dedicated else None
            self.started_at = self.ended_at = time.monotonic()
            self.machine.run()
            try:
                self._wait(deadline, halt)
            finally:
                self.ended_at = time.monotonic()
                self.machine.pause_ended()
                if self.machine.end is not None:  # a Ctrl-C only pauses
                    for disk in self.disks:
                        disk.stop()
                self.serial_capture.drain()
                self.debugcon_capture.drain()
            end = self.machine.end
            assert end is not None
            if end.error is not None and not isinstance(end.error, KvmError):
                raise end.error
            return result_of(self)

    def _wait(self, deadline: Deadline, halt: HaltWatch | None) -> None:
        while self.machine.end is None:
            self.loop.wait(deadline.remaining(halt.interval if halt else LONGEST_WAIT))
            if deadline.passed:
                self.machine.finish(End(EndReason.TIMEOUT))
            elif halt:
                halt.look()
            # A guest prints byte by byte, and each byte that wakes this thread takes time from the vCPU.
            self.loop.rest(GATHER_MS)

    def stop(self, reason: EndReason = EndReason.INTERRUPTED) -> None:
        """End the run from outside; from any thread or signal handler."""
        self.machine.finish(End(reason))

    def pause(self) -> None:
        """Take all vCPUs out of the guest; they are out on return. From any thread but a vCPU's.

        Requests that the guest made of its disks before are executed meanwhile; see `AttachedDisk.exclusive`.
        """
        self.machine.pause()

    def resume(self) -> None:
        """Let the vCPUs run on."""
        self.machine.run()

    def request_stop(self) -> None:
        """Ask the guest to stop: mailbox and GSI of the parameter page (guests/abi.h). It may ignore that."""
        self.parameter_page.request(lib.KVMPY_REQUEST_STOP)
        self.machine.vm.irq_line(lib.KVMPY_STOP_GSI, True)
        self.machine.vm.irq_line(lib.KVMPY_STOP_GSI, False)

    def _ended(self, end: End) -> None:
        self.loop.wake()

    def _on_worker_error(self, error: BaseException) -> None:
        self.machine.finish(End(EndReason.ERROR, error=error))

    def _on_exit(self, value: int) -> None:
        self.machine.finish(End(EndReason.EXIT_PORT, value=value))

    def _on_reset(self) -> None:
        self.machine.finish(End(EndReason.RESET))

    def _on_power_off(self) -> None:
        self.machine.finish(End(EndReason.POWER_OFF))

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

    def _release(self) -> None:
        with ExitStack() as last_first:  # all of them, also when one raises
            for close in self._closers:
                last_first.callback(close)
            self._closers.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

"""The devices at the I/O ports of a PC: those that every board has, made anew with it."""

import threading

from kvmpy._shim import lib
from kvmpy.devices import debug, power, reset
from kvmpy.devices.host_timer import HostTimer
from kvmpy.devices.output import SerialOutput
from kvmpy.devices.rtc import CMOS_SIZE, Cmos
from kvmpy.devices.serial import SERIAL_SIZE, Uart16550
from kvmpy.machine import layout
from kvmpy.machine.bus import Device, InterruptLine, Mode
from kvmpy.machine.machine import End, EndReason, Machine
from kvmpy.pc.host_threads import HostThreads
from kvmpy.pc.spec import MachineSpec


class Ports:
    """Attaches them to ``machine``; ``serial`` is COM1. What the guest prints goes to the two outputs.

    The clock's timer has a thread, now and then, which runs where ``threads`` says. Close it before the machine.
    """

    def __init__(
        self,
        machine: Machine,
        spec: MachineSpec,
        *,
        serial: SerialOutput,
        debugcon: SerialOutput,
        threads: HostThreads,
    ) -> None:
        self._machine, self._spec, self._threads = machine, spec, threads
        self.serial = Uart16550(serial, self._interrupt(lib.KVMPY_IRQ_SERIAL))
        self._timer = HostTimer("rtc", on_error=self._on_error, start=self._start_thread)
        rtc = Cmos(spec.memory, self._interrupt(layout.RTC_IRQ), self._timer)
        keyboard = reset.KeyboardController(self._on_reset)
        for port, size, device, name in (
            (lib.KVMPY_PORT_SERIAL, SERIAL_SIZE, self.serial, "serial"),
            (lib.KVMPY_PORT_CONSOLE, 1, debug.DebugConsole(debugcon), "debugcon"),
            (lib.KVMPY_PORT_EXIT, debug.EXIT_PORT_SIZE, debug.ExitPort(self._on_exit), "exit"),
            (layout.CMOS_PORT, CMOS_SIZE, rtc, "cmos"),
            (reset.KEYBOARD_DATA_PORT, 1, keyboard.data, "keyboard"),
            (reset.KEYBOARD_COMMAND_PORT, 1, keyboard.command, "keyboard"),
            (reset.SYSTEM_CONTROL_A_PORT, 1, reset.SystemControlA(self._on_reset), "port92"),
            (reset.RESET_CONTROL_BASE, reset.RESET_CONTROL_SIZE, reset.ResetControl(self._on_reset), "reset"),
            (lib.KVMPY_PORT_ACPI_EVENT, power.EVENT_SIZE, power.EventBlock(), "acpi"),
            (lib.KVMPY_PORT_ACPI_CONTROL, power.CONTROL_SIZE, power.ControlBlock(self._on_power_off), "acpi"),
        ):
            self._attach(port, size, device, name)

    def _attach(self, port: int, size: int, device: Device, name: str) -> None:
        self._machine.pio.attach(port, size, device, name=name, mode=self._spec.device_modes.get(name, Mode.C))

    def _interrupt(self, gsi: int) -> InterruptLine:
        vm = self._machine.vm
        return lambda level: vm.irq_line(gsi, level)

    def _start_thread(self, thread: threading.Thread) -> None:
        self._threads.start(thread.start)

    def _on_error(self, error: BaseException) -> None:
        self._machine.finish(End(EndReason.ERROR, error=error))

    def _on_exit(self, value: int) -> None:
        self._machine.finish(End(EndReason.EXIT_PORT, value=value))

    def _on_reset(self) -> None:
        self._machine.finish(End(EndReason.RESET))

    def _on_power_off(self) -> None:
        self._machine.finish(End(EndReason.POWER_OFF))

    def close(self) -> None:
        """Have the clock interrupt nobody any more. Closing twice is harmless."""
        self._timer.close()

"""One run from the command line: a PC tied to standard input and output, signals and the terminal, and its report."""

import os
from argparse import Namespace
from contextlib import ExitStack
from typing import TYPE_CHECKING

from kvmpy.cli.interruption import Interruption
from kvmpy.cli.messages import STDERR, DeviceFault, say, show
from kvmpy.cli.output import Output, open_output
from kvmpy.cli.serial_input import SerialInput
from kvmpy.errors import KvmpyError
from kvmpy.machine.bus import Mode
from kvmpy.machine.machine import EndReason
from kvmpy.pc import MachineSpec, Pc, RunResult
from kvmpy.pc.loop import Deadline
from kvmpy.pc.spec import Console

if TYPE_CHECKING:
    from kvmpy.cli.json_file import JsonFile

STDIN, STDOUT = 0, 1
KEYS_AHEAD = 1 << 16
"""Typed bytes that may wait for the guest; what is typed beyond is dropped, as terminals do."""


def run(arguments: Namespace, spec: MachineSpec) -> int:
    """Run the PC of ``spec`` as ``arguments`` of ``kvmpy run`` say, report, and return the exit status."""
    with ExitStack() as stack:
        record = _json_file(arguments.json, stack)
        try:
            session = Session(arguments, spec, stack)
            result = session.run()
            status = session.report(result)
            if record is not None:
                record.write_result(session.pc, result)
            return status
        except Exception as error:
            if record is not None:
                record.write_failure(error)
            raise


def _json_file(path: str | None, stack: ExitStack) -> "JsonFile | None":
    if path is None:
        return None
    from kvmpy.cli.json_file import JsonFile

    return JsonFile(path, stack)


class Session:
    """One run. What needs an end is on ``stack``: signals first, so that they are caught until the end."""

    def __init__(self, arguments: Namespace, spec: MachineSpec, stack: ExitStack) -> None:
        self._arguments = arguments
        self._stack = stack
        self._deadline = Deadline(None)
        self._interruption = stack.enter_context(Interruption())
        self._outputs: list[Output] = []
        if arguments.dump_core is not None:
            from kvmpy.pc.core_dump import check_path

            check_path(arguments.dump_core)
        serial, debugcon = self._port("--serial", arguments.serial), self._port("--debugcon", arguments.debugcon)
        console = self._port("--console", "stdio" if spec.console is Console.VIRTIO else "none")
        host_cpus = len(os.sched_getaffinity(0))
        self.pc = stack.enter_context(
            Pc(
                spec,
                serial=serial.write if serial else None,
                debugcon=debugcon.write if debugcon else None,
                virtio_console=console.write if console else None,
                on_restart=self._on_restart,
            )
        )
        if spec.cores > host_cpus:
            say(f"warning: {spec.cores} cores take turns on {host_cpus} host CPUs")
        self._warn_of_untold()
        self._interruption.attach(self.pc.loop, self.pc.stop)
        if arguments.grace:
            grace = self._interruption.grace(arguments.grace, ask=self.pc.request_stop, stop=self.pc.stop)
            stack.enter_context(grace)
        self._watch_exits()

    def _warn_of_untold(self) -> None:
        """Warn of devices that the guest cannot find, because the user's command line is left as it is."""
        if not self.pc.spec.append_exact:
            return
        from kvmpy.pc.linux import untold_devices

        devices = untold_devices(self.pc.spec, self.pc.loaded.title, self.pc.loaded.cmdline)
        if devices:
            who = " and ".join(filter(None, (", ".join(devices[:-1]), devices[-1])))
            say(f"warning: --append-exact: the guest is not told of its {who}; --virtio acpi tells it")

    # --- what the guest is tied to ------------------------------------------------------------------------------

    def _open(self, path: str) -> int:
        fd = open_output(path)
        self._stack.callback(os.close, fd)
        return fd

    def _port(self, option: str, where: str) -> Output | None:
        """Return where the bytes of a port go, as ``option`` says."""
        if where == "none":
            return None
        if where == "stdio":
            return self._output(STDOUT, "standard output")
        return self._output(self._open(where.removeprefix("file:")), f"{option} {where}")

    def _output(self, fd: int, name: str) -> Output:
        output = Output(fd, name=name, abandoned=self._is_abandoned, on_error=self._stop)
        self._outputs.append(output)
        return output

    def _stop(self) -> None:
        self.pc.stop()

    def _is_abandoned(self) -> bool:
        return bool(self._interruption.received) or self._deadline.passed

    def _watch_exits(self) -> None:
        traced = any(mode is Mode.TRACE for mode in self.pc.spec.device_modes.values())
        if traced or self._arguments.trace:
            from kvmpy.cli.trace import Tracer

            output = self._output(STDERR, "standard error")
            self.pc.machine.tracer = Tracer(self.pc, output, all_exits=self._arguments.trace)

    def _tie_input(self, block: ExitStack) -> None:
        """Let the guest's console hear standard input, within ``block``."""
        if self._arguments.interactive:
            self._tie_terminal(block)
        elif self._hears_keys() and not os.isatty(STDIN):
            block.callback(SerialInput(STDIN, lambda: self.pc.console, self.pc.loop).close)

    def _hears_keys(self) -> bool:
        return self.pc.spec.console is Console.VIRTIO or self._arguments.serial != "none"

    def _tie_terminal(self, block: ExitStack) -> None:
        from kvmpy.cli.monitor import Monitor
        from kvmpy.cli.terminal import KEYS, Keyboard, RawTerminal

        keyboard = Keyboard(STDIN, guest=self._type, monitor=Monitor(self.pc), stop=self.pc.stop)
        block.enter_context(RawTerminal(STDIN))
        self.pc.resize_console(*os.get_terminal_size(STDIN))
        say(KEYS)
        self.pc.loop.watch(STDIN, keyboard.read)
        block.callback(self.pc.loop.unwatch, STDIN)

    def _type(self, keys: bytes) -> None:
        room = max(0, KEYS_AHEAD - self.pc.console.pending)
        self.pc.console.feed(keys[:room])

    # --- the run ------------------------------------------------------------------------------------------------

    def run(self) -> RunResult:
        """Run the guest to its end, and write the core when one was asked for."""
        arguments = self._arguments
        if arguments.verbose:
            from kvmpy.cli.report import loaded_text

            show(loaded_text(self.pc))
        try:
            with ExitStack() as block:
                self._tie_input(block)
                self._deadline = Deadline(arguments.timeout)
                return self.pc.run(timeout=arguments.timeout, watch_halt=not arguments.interactive)
        except (KvmpyError, OSError):
            raise
        except Exception as error:
            raise DeviceFault from error
        finally:
            if arguments.dump_core is not None and self.pc.machine.end is not None:
                from kvmpy.pc.core_dump import write_core

                write_core(self.pc, arguments.dump_core)

    def _on_restart(self, result: RunResult) -> None:
        """Say that the guest boots again: of a crash always, of a reboot that it wanted when that is asked for."""
        if self._arguments.verbose or result.reason is not EndReason.RESET:
            self._end_line()
            say(f"{result.message}: restart {result.restarts + 1}")

    def report(self, result: RunResult) -> int:
        """Say how the run ended and write what was asked for; return the exit status. Raises OSError."""
        arguments = self._arguments
        # A signal explains them all: a terminal that hangs up sends one, and takes no more output.
        interrupted = self._interruption.received
        errors = [output.error for output in self._outputs if output.error is not None and not interrupted]
        self._end_line(speaks=bool(result.message or result.panic or errors or arguments.verbose or arguments.stats))
        if result.message and not errors:
            say(result.message)
        if result.panic is not None:
            self._report_panic(result)
        if arguments.verbose or arguments.stats:
            from kvmpy.cli.report import ended_text, stats_text

            show(ended_text(self.pc, result) if arguments.verbose else "")
            show(stats_text(self.pc, result) if arguments.stats else "")
        for error in errors:
            if not isinstance(error, BrokenPipeError):  # that reader has seen enough: the run was interrupted
                raise error
        return result.status

    def _report_panic(self, result: RunResult) -> None:
        if result.reason is not EndReason.PANIC:
            say(f"the guest's kernel panicked: {result.panic}")
        above = self._arguments.serial == "stdio" and _on_terminal()
        if not above:
            show("".join(f"  {line}\n" for line in result.last_words))

    def _end_line(self, *, speaks: bool = True) -> None:
        """Begin a new line where the guest left one unfinished: ours shall not be behind it, nor a shell's prompt.

        In a file or pipe that takes both there is no prompt: a run that ``speaks`` no word adds no byte to it.
        """
        unfinished = any(output.fd == STDOUT and not output.at_line_start for output in self._outputs)
        if unfinished and (_on_terminal() or (speaks and _is_one_file())):
            show("\n")


def _on_terminal() -> bool:
    return os.isatty(STDOUT) and os.isatty(STDERR)


def _is_one_file() -> bool:
    """Tell whether standard output and standard error are the same file or pipe. A closed one is none."""
    try:
        return os.path.sameopenfile(STDOUT, STDERR)
    except OSError:
        return False

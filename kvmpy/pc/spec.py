"""What a PC shall be: the typed description from which `Pc` builds one. Says, never does."""

import os
from collections.abc import Mapping, Sequence
from enum import StrEnum
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from kvmpy.machine import layout
from kvmpy.machine.boot.plan import BootOptions
from kvmpy.machine.bus import Mode
from kvmpy.units import PAGE_SIZE, MiB, format_size

if TYPE_CHECKING:
    from kvmpy.pc.disk import Disk

DEVICES = ("serial", "debugcon", "exit", "cmos", "keyboard", "port92", "reset", "acpi", "disk", "rng", "console")
"""The names under which the devices of a PC stand in traces, counts and ``device_modes``."""

NO_OPTIONS = BootOptions()
NOTHING: Mapping[str, Any] = MappingProxyType({})


class DebugExit(StrEnum):
    """What a write of v to the exit port makes of the exit status."""

    KVMPY = "kvmpy"
    """v & 0x7f"""
    QEMU = "qemu"
    """(v << 1) | 1, as QEMU's isa-debug-exit"""


class Announcement(StrEnum):
    """How Linux learns of virtio-mmio devices: by one, never by both. The parameter page names them in any case."""

    CMDLINE = "cmdline"
    """``virtio_mmio.device=`` for each, behind what the user says"""
    ACPI = "acpi"
    """a device of the DSDT for each"""


class Console(StrEnum):
    """By which device a guest and its user talk."""

    SERIAL = "serial"
    """COM1, which is there in any case"""
    VIRTIO = "virtio"
    """a virtio console beside it"""


class OnReboot(StrEnum):
    """What follows when a guest resets the machine, or makes it reset by a triple fault."""

    EXIT = "exit"
    """the end of the run"""
    RESTART = "restart"
    """another boot of the same machine"""


class MachineSpec:
    """A PC with ``cores`` vCPUs and ``memory`` bytes of RAM that boots the file ``boot``.

    ``boot_options``: format, command line, modules and the rest of what a boot protocol takes.
    ``name``, ``id`` (16 bytes; random when None) and ``parameters`` go to the guest's parameter page.
    ``disks`` are virtio-blk devices; ``rng`` adds an entropy device, and ``console`` may add a virtio console: up to
    16 in all. ``virtio`` says how Linux learns of them.
    ``pin`` gives each vCPU its host CPU. ``dedicated`` is the type-1 style of `kvmpy.pc.dedicated`.
    ``device_modes`` turns a device (see DEVICES) to Python or to traced. ``trace_exits`` brings every exit to Python.
    ``measure_time`` accounts the time inside KVM_RUN. ``max_exits`` is a budget for each vCPU, over all boots.
    Linux is told more than the user says, where it must be (`kvmpy.pc.linux`); not with ``append_exact``.
    ``on_reboot`` says whether a guest that resets the machine boots again.

    How many cores are allowed only KVM knows: `Pc` asks it.

    Raises:
        ValueError: a figure is outside what this host allows; the message says the range.
    """

    def __init__(
        self,
        boot: str | os.PathLike[str],
        *,
        cores: int = 1,
        memory: int = 128 * MiB,
        boot_options: BootOptions = NO_OPTIONS,
        name: str = "kvmpy",
        id: bytes | None = None,
        parameters: Mapping[str, str] = NOTHING,
        disks: Sequence["Disk"] = (),
        rng: bool = False,
        console: Console = Console.SERIAL,
        virtio: Announcement = Announcement.CMDLINE,
        append_exact: bool = False,
        hugepages: bool = False,
        dedicated: bool = False,
        pin: Sequence[int] = (),
        debug_exit: DebugExit = DebugExit.KVMPY,
        device_modes: Mapping[str, Mode] = NOTHING,
        trace_exits: bool = False,
        measure_time: bool = False,
        max_exits: int | None = None,
        on_reboot: OnReboot = OnReboot.EXIT,
    ) -> None:
        self.boot, self.boot_options = boot, boot_options
        self.cores, self.memory = cores, memory
        self.name, self.id, self.parameters = name, id, parameters
        self.disks, self.rng, self.console = tuple(disks), rng, Console(console)
        self.virtio = Announcement(virtio)
        self.hugepages, self.dedicated, self.pin = hugepages, dedicated, tuple(pin)
        self.debug_exit, self.device_modes = debug_exit, device_modes
        self.trace_exits, self.measure_time, self.max_exits = trace_exits, measure_time, max_exits
        self.append_exact, self.on_reboot = append_exact, OnReboot(on_reboot)
        self._check()

    def replace(self, **changes: Any) -> "MachineSpec":
        """Return a copy with some fields changed. Raises ValueError and TypeError as the constructor does."""
        return MachineSpec(**vars(self) | changes)

    @property
    def virtio_windows(self) -> tuple[layout.VirtioWindow, ...]:
        """Where the guest finds its virtio devices: the disks, the rng, the console. Raises ValueError: too many."""
        return layout.virtio_windows(len(self.disks) + self.rng + (self.console is Console.VIRTIO))

    @property
    def disk_windows(self) -> tuple[layout.VirtioWindow, ...]:
        """Where the guest finds its disks."""
        return self.virtio_windows[: len(self.disks)]

    @property
    def rng_window(self) -> layout.VirtioWindow | None:
        """Where the guest finds its entropy device, if it has one."""
        return self.virtio_windows[len(self.disks)] if self.rng else None

    @property
    def console_window(self) -> layout.VirtioWindow | None:
        """Where the guest finds its virtio console, if it has one."""
        return self.virtio_windows[-1] if self.console is Console.VIRTIO else None

    def _check(self) -> None:
        host = host_memory()
        if not MiB <= self.memory <= host or self.memory % PAGE_SIZE:
            raise ValueError(
                f"memory of {format_size(self.memory)}: allowed is 1 MiB to {format_size(host)} (this host's), "
                "in multiples of 4 KiB"
            )
        if self.pin and len(self.pin) != self.cores:
            raise ValueError(f"{len(self.pin)} host CPUs to pin to for {self.cores} cores: give one for each")
        forbidden = sorted(set(self.pin) - os.sched_getaffinity(0))
        if forbidden:
            allowed = ", ".join(map(str, sorted(os.sched_getaffinity(0))))
            raise ValueError(f"host CPU {forbidden[0]} to pin to: this process may use {allowed}")
        if self.pin and self.dedicated:
            raise ValueError("dedicated chooses the host CPUs itself: it excludes pin")
        if self.max_exits is not None and self.max_exits < 0:
            raise ValueError(f"max_exits of {self.max_exits}: 0 or more is wanted")
        _ = self.virtio_windows
        unknown = set(self.device_modes) - set(DEVICES)
        if unknown:
            raise ValueError(f"no device {sorted(unknown)[0]!r}: there are {', '.join(DEVICES)}")


def host_memory() -> int:
    """Return the physical memory of this host in bytes, a multiple of the page size."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

"""``kvmpy run FILE``: boot an image, show what it prints, and end as it ends."""

import os
from argparse import Namespace
from typing import TYPE_CHECKING

from kvmpy._shim import lib
from kvmpy.cli import parser as types
from kvmpy.cli.messages import UsageError
from kvmpy.cli.parser import Parser
from kvmpy.cli.session import STDIN, run
from kvmpy.errors import ImageError
from kvmpy.machine.boot.detect import PROTOCOLS
from kvmpy.machine.boot.plan import BootOptions, CpuMode, Module
from kvmpy.machine.bus import Mode
from kvmpy.pc import Announcement, DebugExit, MachineSpec, OnReboot
from kvmpy.pc.spec import DEVICES, Console
from kvmpy.units import MiB

if TYPE_CHECKING:
    from kvmpy.pc.disk import Disk

LESSON = "lesson:"
DISK_HELP = (
    "a virtio-blk device; may be repeated. Keys: format=raw|vhd|blob, readonly, "
    "cache=writeback|writethrough|direct, queues=N, iops=N, bps=SIZE, serial=TEXT, engine=c|python; ,, is a comma"
)


def configure(parser: Parser) -> None:
    """Say what the command line may hold."""
    add = parser.add_argument
    add("file", metavar="FILE", type=types.path, help="the image, or lesson:NAME")
    machine = parser.add_argument_group("the machine")
    add = machine.add_argument
    add("--cores", metavar="N", type=types.whole, default=1, help="vCPUs (1)")
    add("--mem", metavar="SIZE", type=types.size, default=128 * MiB, help="memory: 512M, 3.5G, ... (128M)")
    add("--hugepages", action="store_true", help="back memory with 2 MiB pages")
    add("--dedicated", action="store_true", help="type-1 style: a host CPU for each vCPU, memory locked")
    add("--pin", metavar="LIST", type=types.cpu_list, default=(), help="host CPU of each vCPU: 0,1")
    add("--rng", action="store_true", help="a virtio entropy device")
    add("--name", metavar="NAME", help="the machine's name on its parameter page (FILE's)")
    add("--param", metavar="KEY=VALUE", type=types.pair, action="append", default=[], help="a pair on that page")
    add(
        "--device-mode",
        metavar="NAME=MODE",
        type=device_mode,
        action="append",
        default=[],
        help=f"who answers a device, and whether each access is shown: c, python or trace; {', '.join(DEVICES)}",
    )
    disks = parser.add_argument_group("disks")
    add = disks.add_argument
    add("--disk", metavar="PATH[,KEY=VALUE]", type=disk, action="append", default=[], help=DISK_HELP)
    add(
        "--virtio",
        choices=[str(way) for way in Announcement],
        default="cmdline",
        help="how Linux learns of them (cmdline)",
    )
    boot = parser.add_argument_group("booting")
    add = boot.add_argument
    add("--format", metavar="FORMAT", choices=PROTOCOLS, help=f"{', '.join(PROTOCOLS)} (found out)")
    add("--append", metavar="TEXT", action="append", default=[], help="the kernel's command line; may be repeated")
    add("--append-exact", action="store_true", help="add no word to it: see -v for those")
    add("--initrd", metavar="FILE", help="a ramdisk")
    add("--module", metavar="FILE[,TEXT]", type=module, action="append", default=[], help="a module, its command line")
    add("--address", metavar="GPA", type=types.address, help="flat: where to load")
    add("--mode", choices=[str(mode) for mode in CpuMode], help="flat, ELF: the mode to start in")
    add("--entry", metavar="GPA", type=types.address, help="flat, ELF: where to start")
    ports = parser.add_argument_group("input and output")
    add = ports.add_argument
    add("-i", "--interactive", action="store_true", help="keys go to the guest; Ctrl-A x ends, Ctrl-A c: monitor")
    add(
        "--console",
        choices=[str(device) for device in Console],
        default="serial",
        help="where standard input goes: COM1, or a virtio console beside it (serial)",
    )
    add("--serial", metavar="WHERE", type=place, default="stdio", help="stdio, file:PATH or none (stdio)")
    add("--debugcon", metavar="WHERE", type=place, default="stdio", help="the same for port 0xe9")
    run = parser.add_argument_group("the run")
    add = run.add_argument
    add("--timeout", metavar="SECONDS", type=types.seconds, help="end the run after that time")
    add("--max-exits", metavar="N", type=types.budget, help="end the run after N exits of a vCPU")
    add(
        "--on-reboot",
        choices=[str(what) for what in OnReboot],
        default="exit",
        help="what follows when the guest resets the machine (exit)",
    )
    add(
        "--grace",
        metavar="SECONDS",
        type=types.grace,
        default=0.0,
        help="at SIGTERM or SIGHUP, ask the guest to stop, and give it that time (0)",
    )
    add("--debug-exit", choices=[str(kind) for kind in DebugExit], default="kvmpy", help="whose exit statuses (kvmpy)")
    add("--trace", action="store_true", help="show each exit")
    add("--stats", action="store_true", help="show exits and times at the end")
    add("--json", metavar="FILE", help="write status, why it ended, exits and times (-: standard output)")
    add("--dump-core", metavar="FILE", help="write the guest's memory and registers, for gdb")
    add("-v", "--verbose", action="store_true", help="show what was loaded how")


@types.reads
def place(text: str) -> str:
    """Read where output goes."""
    if text not in ("stdio", "none") and not (text.startswith("file:") and len(text) > 5):
        raise ValueError(f"{text!r} is neither stdio nor file:PATH nor none")
    return text


@types.reads
def module(text: str) -> Module:
    """Read FILE[,COMMAND LINE]."""
    path, _, cmdline = text.partition(",")
    if not path:
        raise ValueError(f"{text!r} is not FILE[,TEXT]")
    return Module(path, cmdline)


@types.reads
def disk(text: str) -> "Disk":
    """Read PATH[,KEY=VALUE]..."""
    from kvmpy.cli.disk_option import parse_disk

    return parse_disk(text)


@types.reads
def device_mode(text: str) -> tuple[str, Mode]:
    """Read NAME=c|python|trace."""
    name, _, mode = text.partition("=")
    if name not in DEVICES or mode not in list(Mode):
        raise ValueError(f"{text!r} is not NAME=c|python|trace with a NAME of {', '.join(DEVICES)}")
    return name, Mode(mode)


def execute(arguments: Namespace) -> int:
    """Run the guest to its end and return its exit status, or kvmpy's own."""
    if arguments.file.startswith(LESSON):
        arguments = with_lesson(arguments)
    if arguments.interactive and not os.isatty(STDIN):
        raise UsageError("-i needs a terminal on standard input", "kvmpy run")
    if arguments.interactive and arguments.serial == "none" and arguments.console == Console.SERIAL:
        raise UsageError("-i needs a serial port, or --console virtio: not --serial none", "kvmpy run")
    return run(arguments, spec_of(arguments))


def with_lesson(arguments: Namespace) -> Namespace:
    """Return ``arguments`` with the image of ``lesson:NAME``, and what its header asks for where nothing was said."""
    from kvmpy.lessons import find

    try:
        lesson = find(arguments.file.removeprefix(LESSON))
    except LookupError as error:
        raise UsageError(str(error), "kvmpy lessons") from error
    if not lesson.image.is_file():
        raise ImageError(f"lesson {lesson.name} is not built: make guests does it", path=str(lesson.image))
    defaults = arguments.parser.parse_args([*lesson.options, arguments.file])
    chosen: Namespace = arguments.parser.parse_args(arguments.argv, namespace=defaults)
    chosen.file = str(lesson.image)
    if arguments.append:  # in place of the lesson's, not behind it
        chosen.append = arguments.append
    if lesson.disk and not chosen.disk:
        example = f"kvmpy blob create disk.blob --size {lesson.disk}"
        raise UsageError(f"lesson {lesson.name} needs a disk: {example}, then --disk disk.blob", "kvmpy run")
    return chosen


def spec_of(arguments: Namespace) -> MachineSpec:
    """Return the machine that the command line describes. Raises ValueError."""
    return MachineSpec(
        arguments.file,
        cores=arguments.cores,
        memory=arguments.mem,
        boot_options=BootOptions(
            append=" ".join(arguments.append),
            modules=tuple(arguments.module),
            initrd=arguments.initrd,
            format=arguments.format,
            address=arguments.address,
            mode=CpuMode(arguments.mode) if arguments.mode else None,
            entry=arguments.entry,
        ),
        name=default_name(arguments.file) if arguments.name is None else arguments.name,
        parameters=dict(arguments.param),
        disks=arguments.disk,
        virtio=Announcement(arguments.virtio),
        rng=arguments.rng,
        console=Console(arguments.console),
        append_exact=arguments.append_exact,
        hugepages=arguments.hugepages,
        dedicated=arguments.dedicated,
        pin=arguments.pin,
        debug_exit=DebugExit(arguments.debug_exit),
        device_modes=dict(arguments.device_mode),
        trace_exits=arguments.trace,
        measure_time=arguments.stats or arguments.json is not None,
        max_exits=arguments.max_exits,
        on_reboot=OnReboot(arguments.on_reboot),
    )


def default_name(path: str) -> str:
    """Return the name of a machine that was given none: its image's, as far as it fits into the parameter page."""
    stem = os.path.splitext(os.path.basename(path))[0]
    longest = lib.KVMPY_PARAMS_NAME_SIZE - 1
    return stem.encode(errors="replace")[:longest].decode(errors="ignore") or "kvmpy"

"""``kvmpy COMMAND``: finds the command, and turns whatever ends it into one line and an exit status.

Exit statuses are those of `kvmpy.pc.ExitStatus`; a guest's own status passes through. Only a fault of kvmpy's own, or
a Python device that raises, shows a traceback.
"""

import os
import sys
from importlib import import_module
from io import TextIOWrapper
from typing import Protocol, cast

from kvmpy.cli.messages import UsageError, fail
from kvmpy.cli.parser import Parser

COMMANDS = {
    "run": ("kvmpy.cli.run", "boot an image and show what it prints"),
    "inspect": ("kvmpy.cli.inspect", "say what an image is, how it would boot, and why it would not"),
    "lessons": ("kvmpy.cli.lessons", "list the lesson guests, or show one"),
    "doctor": ("kvmpy.cli.doctor", "say whether KVM works here, and how"),
    "blob": ("kvmpy.cli.blob", "make, look at, copy and convert disks"),
    "conformance": ("kvmpy.cli.conformance", "let hostile drivers at the disks, and judge what comes of it"),
}
"""Each command: its module and what it does."""


class Command(Protocol):
    """What a command's module has."""

    def configure(self, parser: Parser) -> None: ...

    def execute(self, arguments: object) -> int: ...


def main(argv: list[str] | None = None) -> int:
    """Run the command in ``argv`` (without the program's name) and return the exit status."""
    _keep_standard_descriptors()
    try:
        try:
            return _dispatch(sys.argv[1:] if argv is None else argv)
        finally:
            for stream in (sys.stdout, sys.stderr):
                if stream is not None:
                    stream.flush()
    except BrokenPipeError:
        # Whoever read our output has gone. Python flushes again at its end: let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 130
    except KeyboardInterrupt:
        return 130
    except SystemExit as end:  # --help
        return end.code if isinstance(end.code, int) else 0
    except Exception as error:
        return fail(error)


def _dispatch(argv: list[str]) -> int:
    name, *rest = argv or ["--help"]
    if name in ("-h", "--help"):
        print(_help())
        return 0
    if name == "--version":
        print(_version())
        return 0
    if name not in COMMANDS:
        kind = "option" if name.startswith("-") else "command"
        raise UsageError(f"no {kind} {name!r}: there are {', '.join(COMMANDS)}")
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # names of files are bytes
    module, summary = COMMANDS[name]
    command = cast(Command, import_module(module))
    parser = Parser(prog=f"kvmpy {name}", description=f"{summary[0].upper()}{summary[1:]}.")
    command.configure(parser)
    parser.set_defaults(parser=parser, argv=rest)
    return command.execute(parser.parse_args(rest))


def _help() -> str:
    commands = "\n".join(f"  {name:11}  {summary}" for name, (_, summary) in COMMANDS.items())
    return (
        "usage: kvmpy COMMAND ...\n\n"
        f"A hypervisor controller on Linux KVM.\n\ncommands:\n{commands}\n\n"
        "kvmpy COMMAND --help explains one; kvmpy --version tells the version."
    )


def _version() -> str:
    from kvmpy import __version__

    system = os.uname()
    return f"kvmpy {__version__} (Python {sys.version.split()[0]}, {system.sysname} {system.release})"


def _keep_standard_descriptors() -> None:
    """Open what the caller has closed of 0, 1 and 2, lest a VM's descriptor takes that number and gets our output."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number: fd

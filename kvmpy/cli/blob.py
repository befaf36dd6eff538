"""``kvmpy blob COMMAND``: make, look at, copy and convert disks.

Here: the commands with what their help says, and how an error of the host becomes one that names the disk. Their
arguments: `kvmpy.cli.blob_arguments`; what they do: `kvmpy.cli.blob_change` and `kvmpy.cli.blob_look`.
"""

from argparse import SUPPRESS, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable
from typing import NamedTuple

from kvmpy.cli import blob_arguments, blob_change, blob_look
from kvmpy.cli.parser import Parser
from kvmpy.errors import DiskError

WIDTH = 79
EPILOG = """\
A disk is a page blob, which is a folder, or a plain file: raw or VHD. Of a
plain file it must be said which (--format): its bytes are the guest's.

kvmpy blob COMMAND --help explains one."""


class Command(NamedTuple):
    """One of the commands: what it does, in a line and in a few more; its arguments; and the function that does it.

    That function returns the exit status and what is to be printed.
    """

    summary: str
    details: str
    declare: Callable[[Parser], None]
    act: Callable[[Namespace], tuple[int, str]]


COMMANDS = {
    "create": Command(
        "make an empty disk",
        """\
It reads as zeros, and takes room only as it is written.

  kvmpy blob create data.blob --size 64M
  kvmpy run kernel.elf --disk data.blob""",
        blob_arguments.create,
        blob_change.create,
    ),
    "info": Command(
        "tell what a disk is",
        """\
  kvmpy blob info data.blob
  kvmpy blob info disk.vhd --format vhd""",
        blob_arguments.info,
        blob_look.info,
    ),
    "copy": Command(
        "make a thin copy of a page blob",
        """\
Both share what neither has written since, and nothing that happens to one is
seen in the other. Onto another file system the copy is a whole one.""",
        blob_arguments.copy,
        blob_change.copy,
    ),
    "snapshot": Command(
        "keep what a page blob holds now",
        """\
Prints the snapshot's ID, by which it can be copied, exported, deleted and
compared with.""",
        blob_arguments.snapshot,
        blob_change.snapshot,
    ),
    "ranges": Command(
        "list where a page blob holds anything but zeros",
        """\
Or where it differs from a snapshot: what was not zeros then and is now, is
marked as cleared.""",
        blob_arguments.ranges,
        blob_look.ranges,
    ),
    "resize": Command(
        "make a page blob larger or smaller",
        """\
What lies behind a smaller size is lost; snapshots keep theirs.""",
        blob_arguments.resize,
        blob_change.resize,
    ),
    "import": Command(
        "make a page blob of a raw or VHD file",
        """\
  kvmpy blob import debian.raw debian.blob --format raw""",
        blob_arguments.import_,
        blob_change.import_,
    ),
    "export": Command(
        "write what a page blob holds into a new disk",
        """\
  kvmpy blob export debian.blob debian.vhd --format vhd-fixed""",
        blob_arguments.export,
        blob_change.export,
    ),
    "check": Command(
        "look for damage",
        """\
Prints clean; or a line for each problem, and the exit status is 194.""",
        blob_arguments.check,
        blob_look.check,
    ),
    "lease": Command(
        "tell who may write a page blob, or hold that right",
        """\
--hold keeps everybody else from writing, for SECONDS or until Ctrl-C. The
right ends with the process that holds it, however that ends.""",
        blob_arguments.lease,
        blob_change.lease,
    ),
    "delete": Command(
        "delete a page blob with its snapshots",
        """\
Its copies stay as they are.""",
        blob_arguments.delete,
        blob_change.delete,
    ),
}


def configure(parser: Parser) -> None:
    """Say what the command line may hold."""
    lines = "\n".join(f"  {name:9} {command.summary}" for name, command in COMMANDS.items())
    parser.description = f"{parser.description}\n\ncommands:\n{lines}"
    parser.epilog = EPILOG
    parser.usage = "kvmpy blob COMMAND ..."
    parser.formatter_class = _formatter
    choices = parser.add_subparsers(metavar="COMMAND", required=True, prog=parser.prog, help=SUPPRESS)
    for name, command in COMMANDS.items():
        description = f"{command.summary[0].upper()}{command.summary[1:]}.\n\n{command.details}"
        chosen = choices.add_parser(name, description=description)
        chosen.formatter_class = _formatter
        command.declare(chosen)
        chosen.set_defaults(act=command.act)


def _formatter(prog: str) -> RawDescriptionHelpFormatter:
    return RawDescriptionHelpFormatter(prog, width=WIDTH, max_help_position=26)


def execute(arguments: Namespace) -> int:
    """Do it, print what came of it, and return the exit status.

    Raises:
        DiskError: the disk, or what the host said when it was used.
    """
    try:
        status, text = arguments.act(arguments)
    except OSError as error:
        raise DiskError(error.strerror or str(error), path=_blamed(arguments, error)) from error
    if text:
        print(text)
    return int(status)


def _blamed(arguments: Namespace, error: OSError) -> str:
    """Return the disk that ``error`` is about: what was written, unless the error names what was read.

    Other names are those of temporary files and of files in a blob, which tell nobody anything.
    """
    given = vars(arguments)
    if isinstance(error.filename, str) and error.filename == given.get("source"):
        return error.filename
    return str(given.get("target") or given.get("path"))

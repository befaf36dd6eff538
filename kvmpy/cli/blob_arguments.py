"""The arguments of each ``kvmpy blob`` command: a function for each, which declares them to a parser."""

from kvmpy.cli import parser as types
from kvmpy.cli.blob_change import FOR_EVER
from kvmpy.cli.parser import Parser
from kvmpy.storage.convert import FORMATS
from kvmpy.storage.disk import SECTOR_SIZE
from kvmpy.storage.open import ALL_FORMATS
from kvmpy.units import parse_size

FILE_FORMATS = [name for name in ALL_FORMATS if name != "blob"]


def create(parser: Parser) -> None:
    """Declare ``create PATH --size SIZE [--format FORMAT]``."""
    add = parser.add_argument
    add("path", metavar="PATH", type=types.path, help="the new disk; nothing may be there yet")
    add("--size", metavar="SIZE", type=_disk_size, required=True, help="64M, 3.5G, ...: a multiple of 512 bytes")
    add("--format", metavar="FORMAT", choices=FORMATS, default="blob", help=f"{_either(FORMATS)} (blob)")


def info(parser: Parser) -> None:
    """Declare ``info PATH [--format FORMAT] [--json]``."""
    parser.add_argument("path", metavar="PATH", type=types.path, help="the disk")
    _file_format(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")


def copy(parser: Parser) -> None:
    """Declare ``copy SRC DST [--snapshot ID]``."""
    parser.add_argument("source", metavar="SRC", type=types.path, help="the page blob")
    parser.add_argument("target", metavar="DST", type=types.path, help="the new one; nothing may be there yet")
    parser.add_argument("--snapshot", metavar="ID", help="copy what the blob held at this snapshot")


def snapshot(parser: Parser) -> None:
    """Declare ``snapshot PATH [--delete ID]``."""
    parser.add_argument("path", metavar="PATH", type=types.path, help="the page blob")
    parser.add_argument("--delete", metavar="ID", help="delete this snapshot instead")


def ranges(parser: Parser) -> None:
    """Declare ``ranges PATH [--since ID] [--json]``."""
    parser.add_argument("path", metavar="PATH", type=types.path, help="the page blob")
    parser.add_argument("--since", metavar="ID", help="only what differs from this snapshot")
    parser.add_argument("--json", action="store_true", help="print JSON")


def resize(parser: Parser) -> None:
    """Declare ``resize PATH SIZE``."""
    parser.add_argument("path", metavar="PATH", type=types.path, help="the page blob")
    parser.add_argument("size", metavar="SIZE", type=_disk_size, help="64M, 3.5G, ...: a multiple of 512 bytes")


def import_(parser: Parser) -> None:
    """Declare ``import SRC PATH [--format FORMAT]``."""
    parser.add_argument("source", metavar="SRC", type=types.path, help="the file; it is only read")
    parser.add_argument("target", metavar="PATH", type=types.path, help="the new blob; nothing may be there yet")
    _file_format(parser)


def export(parser: Parser) -> None:
    """Declare ``export PATH DST --format FORMAT [--snapshot ID]``."""
    add = parser.add_argument
    add("source", metavar="PATH", type=types.path, help="the page blob; it is only read")
    add("target", metavar="DST", type=types.path, help="the new disk; nothing may be there yet")
    add("--format", metavar="FORMAT", choices=FORMATS, required=True, help=_either(FORMATS))
    add("--snapshot", metavar="ID", help="export what the blob held at this snapshot")


def check(parser: Parser) -> None:
    """Declare ``check PATH [--format FORMAT]``."""
    parser.add_argument("path", metavar="PATH", type=types.path, help="the disk; it is only read")
    _file_format(parser)


def lease(parser: Parser) -> None:
    """Declare ``lease PATH [--hold [SECONDS]]``."""
    add = parser.add_argument
    add("path", metavar="PATH", type=types.path, help="the page blob")
    add("--hold", metavar="SECONDS", type=types.seconds, nargs="?", const=FOR_EVER, help="take and hold it")


def delete(parser: Parser) -> None:
    """Declare ``delete PATH``."""
    parser.add_argument("path", metavar="PATH", type=types.path, help="the page blob")


@types.reads
def _disk_size(text: str) -> int:
    """Read the size of a disk: whole pages."""
    size = parse_size(text)
    if not size or size % SECTOR_SIZE:
        raise ValueError(f"{size} bytes: allowed is a multiple of {SECTOR_SIZE}, and not 0")
    return size


def _file_format(parser: Parser) -> None:
    parser.add_argument(
        "--format", metavar="FORMAT", choices=FILE_FORMATS, help=f"of a plain file: {_either(FILE_FORMATS)}"
    )


def _either(names: list[str] | tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"

"""``kvmpy inspect FILE``: what an image is, every protocol that it offers, and why it would not boot."""

from argparse import Namespace

from kvmpy.cli import parser as types
from kvmpy.cli.parser import Parser
from kvmpy.machine.boot.inspection import Inspection, Offer, inspect
from kvmpy.units import MiB, format_size


def configure(parser: Parser) -> None:
    """Say what the command line may hold."""
    parser.add_argument("file", metavar="FILE", type=types.path, help="the image")
    parser.add_argument("--mem", metavar="SIZE", type=types.size, default=128 * MiB, help="for this memory (128M)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def execute(arguments: Namespace) -> int:
    """Print what the file is; the status is 0 whether it would boot or not, for that is a finding."""
    found = inspect(arguments.file, memory_size=arguments.mem)
    if arguments.json:
        import json

        print(json.dumps(found.as_dict(), indent=2))
    else:
        print(text(found), end="")
    return 0


def text(found: Inspection) -> str:
    """Return an inspection as aligned lines."""
    rows = [("file", found.path), ("size", f"{found.size} bytes")]
    if found.unpacked_size is not None:
        rows.append(("packed", f"with {found.packed_with}: {found.unpacked_size} bytes unpacked"))
    rows.append(("what", found.what))
    if found.linux is not None:
        rows.append(("linux", found.linux))
    rows.append(("boots", f"as {found.boots}" if found.boots else f"no: {found.error}"))
    lines = [f"{name:<8}{value}" for name, value in rows]
    for offer in found.offers:
        lines += ["", *_offer(offer)]
    return "\n".join(lines) + "\n"


def _offer(offer: Offer) -> list[str]:
    lines = [f"{offer.title} (--format {offer.protocol})"]
    if offer.mode is not None and offer.entry is not None:
        lines.append(f"  starts  at 0x{offer.entry:x} in {offer.mode} mode")
    for segment in offer.segments:
        cleared = segment.memory_size - segment.file_size
        lines.append(
            f"  loads   0x{segment.gpa:08x}-0x{segment.end - 1:08x}"
            f"  {segment.file_size} bytes from offset 0x{segment.offset:x}"
            + (f", then {format_size(cleared)} of zeros" if cleared else "")
        )
    lines += [f"  note    {note}" for note in offer.notes]
    if offer.error is not None:
        at = f" (at offset 0x{offer.error_offset:x})" if offer.error_offset is not None else ""
        lines.append(f"  broken  {offer.error}{at}")
    return lines

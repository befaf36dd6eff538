"""argparse as kvmpy wants it: a mistake is an exception, so that `kvmpy.cli.main` alone prints and ends the process."""

import argparse
from collections.abc import Callable
from typing import NoReturn, TypeVar

from kvmpy.cli.messages import UsageError
from kvmpy.units import parse_size

T = TypeVar("T")
ADDRESS_LIMIT = 1 << 64
HELP_WIDTH = 110


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UsageError and knows no abbreviations."""

    def __init__(self, *, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False, formatter_class=_formatter)

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, self.prog)


def _formatter(prog: str) -> argparse.HelpFormatter:
    # Left to itself it asks for the terminal's width at each start, and imports five modules for that.
    return argparse.HelpFormatter(prog, width=HELP_WIDTH, max_help_position=30)


def reads(parse: Callable[[str], T]) -> Callable[[str], T]:
    """Return ``parse`` as argparse wants it: its ValueError becomes the message, with the option's name before it."""

    def checked(text: str) -> T:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return checked


@reads
def path(text: str) -> str:
    """Read the name of a file."""
    if not text:
        raise ValueError("an empty name")
    return text


@reads
def size(text: str) -> int:
    """Read a size in bytes: 512M, 3.5G."""
    return parse_size(text)


@reads
def whole(text: str) -> int:
    """Read a whole number."""
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a whole number") from None


@reads
def budget(text: str) -> int:
    """Read a number of exits: at least 1, and such that C can count to it."""
    if not text.isdecimal() or not 1 <= int(text) < 1 << 63:
        raise ValueError(f"{text!r} is not a number of exits: allowed is 1 to {(1 << 63) - 1}")
    return int(text)


@reads
def seconds(text: str) -> float:
    """Read a time in seconds, above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):  # false for nan too
        raise ValueError(f"{text!r} is not a time limit: allowed is a number of seconds above 0")
    return value


@reads
def grace(text: str) -> float:
    """Read a time in seconds that may be none."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise ValueError(f"{text!r} is not a time: allowed is a number of seconds, 0 for none")
    return value


@reads
def address(text: str) -> int:
    """Read a guest physical address."""
    try:
        value = int(text, 0)
    except ValueError:
        value = -1
    if not 0 <= value < ADDRESS_LIMIT:
        raise ValueError(f"{text!r} is not an address: allowed is 0 to 0xffffffffffffffff (examples: 0x7c00, 4096)")
    return value


@reads
def cpu_list(text: str) -> tuple[int, ...]:
    """Read a list of host CPUs: 0,1."""
    numbers = text.split(",")
    if not all(number.isdecimal() for number in numbers):
        raise ValueError(f"{text!r} is not a list of host CPUs (example: 0,1)")
    return tuple(int(number) for number in numbers)


@reads
def pair(text: str) -> tuple[str, str]:
    """Read KEY=VALUE."""
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise ValueError(f"{text!r} is not KEY=VALUE")
    return key, value

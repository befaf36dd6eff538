"""kvmpy's own words, on standard error, one line each; and which exit status an error stands for.

What the guest prints never passes here.
"""

import os

from kvmpy.errors import DiskError, GuestError, ImageError, KvmpyError

STDERR = 2


class UsageError(Exception):
    """The command line makes no sense. ``command`` is whose ``--help`` explains it."""

    def __init__(self, message: str, command: str = "kvmpy") -> None:
        super().__init__(f"{message} (see {command} --help)")


class DeviceFault(Exception):
    """A Python device raised: the cause is a fault of its code, whatever type the exception has."""


def say(message: str) -> None:
    """Print ``kvmpy: message`` on standard error, in one line whatever the message holds."""
    show(f"kvmpy: {one_line(message)}\n")


def show(text: str) -> None:
    """Print ``text`` on standard error as it is. A standard error that nobody reads any more is no error."""
    data = text.encode(errors="backslashreplace")
    try:
        while data:
            data = data[os.write(STDERR, data) :]
    except OSError:
        return


def one_line(text: str) -> str:
    """Return ``text`` with everything that is not printable escaped: a file's name may hold a line feed."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def describe(error: BaseException) -> str:
    """Return what an error has to say, without Python's decorations."""
    if isinstance(error, OSError) and not isinstance(error, KvmpyError):
        what = error.strerror or str(error)
        return f"{os.fsdecode(error.filename)}: {what}" if isinstance(error.filename, str | bytes) else what
    return str(error) or type(error).__name__


def fail(error: Exception) -> int:
    """Print why, and return the exit status that blames the right one.

    One line for what was to be expected; a traceback for a fault of kvmpy or of a device.
    """
    if is_fault(error):
        import traceback

        show("".join(traceback.format_exception(error.__cause__ or error)))
        say("that is a fault in a device or in kvmpy itself")
    else:
        say(describe(error))
    return status_of(error)


def is_fault(error: Exception) -> bool:
    """Tell whether ``error`` is one that should not have happened."""
    return not isinstance(error, UsageError | ValueError | KvmpyError | OSError | MemoryError)


def status_of(error: Exception) -> int:
    """Return the exit status of an error."""
    from kvmpy.pc.result import ExitStatus

    match error:
        case UsageError() | ValueError():
            return int(ExitStatus.USAGE)
        case ImageError() | DiskError():
            return int(ExitStatus.IMAGE)
        case GuestError():
            return int(ExitStatus.CRASH)
    return int(ExitStatus.HOST)

"""kvmpy's own words: one line each, on standard error. What the guest prints never passes here."""

import os

from kvmpy.errors import KvmpyError

STDERR = 2


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
    """Return what an expected error has to say, without Python's decorations."""
    if isinstance(error, OSError) and not isinstance(error, KvmpyError):
        what = error.strerror or str(error)
        return f"{os.fsdecode(error.filename)}: {what}" if isinstance(error.filename, str | bytes) else what
    return str(error) or type(error).__name__

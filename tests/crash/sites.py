"""Tells the recorder where in a program each change of files is made: imported by the programs that are recorded.

A planted defect is then named by the line that it is a defect of, and the list of them is complete when every line
that syncs is in it.
"""

import os
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

from recording import CREATE, LINK, RENAME, SITE, SYNC, TRUNCATE, UNLINK, WRITE

KINDS = {
    "open": CREATE,
    "pwrite": WRITE,
    "pwritev": WRITE,
    "ftruncate": TRUNCATE,
    "fsync": SYNC,
    "fdatasync": SYNC,
    "rename": RENAME,
    "link": LINK,
    "unlink": UNLINK,
}
TOLD = ("kvmpy.storage.", "kvmpy.devices.block_execute")
MARKS = int(os.environ.get("KVMPY_RECORD_MARKS", "-1"))


def mark(text: str) -> None:
    """Put a mark among the records: whatever was done before it, was done before it."""
    os.write(MARKS, text.encode())


def tell_sites() -> None:
    """Tell from now on where changes are made, by a mark before each."""
    sys.setprofile(_tell)


def _tell(frame: FrameType, event: str, function: Any) -> None:
    if event == "c_call" and function.__module__ == "posix" and function.__name__ in KINDS:
        where = " < ".join(_callers(frame))
        if where:
            os.write(MARKS, f"{SITE}{KINDS[function.__name__]} {where}".encode())


def _callers(frame: FrameType | None) -> Iterator[str]:
    """Yield the lines of ours that lead to the call, the innermost first."""
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith(TOLD) and module != "kvmpy.storage.files":
            yield f"{module.rpartition('.')[2]}:{frame.f_lineno} {frame.f_code.co_qualname}"
        frame = frame.f_back

"""The file of ``--json``: how a run ended, or why there was none."""

import json
import os
from contextlib import ExitStack
from typing import Any

from kvmpy.cli.messages import describe, is_fault, status_of
from kvmpy.cli.output import open_output
from kvmpy.cli.report import as_dict
from kvmpy.pc import Pc, RunResult

STDOUT = 1
STANDARD_OUTPUT = "-"


class JsonFile:
    """The file at ``path``, or standard output for ``-``; written once, closed by ``stack``.

    Open from the beginning, so that a path which cannot be written is found before the guest runs. Raises OSError.
    """

    def __init__(self, path: str, stack: ExitStack) -> None:
        self._fd = os.dup(STDOUT) if path == STANDARD_OUTPUT else open_output(path)
        self._path = path
        self._written = False
        stack.callback(os.close, self._fd)

    def write_result(self, pc: Pc, result: RunResult) -> None:
        """Write how the run ended. Raises OSError."""
        self._write(as_dict(pc, result))

    def write_failure(self, error: Exception) -> None:
        """Write why there was no result; a result that stands already remains. Raises OSError."""
        if not self._written:
            message = repr(error.__cause__ or error) if is_fault(error) else describe(error)
            self._write({"status": status_of(error), "reason": "error", "message": message})

    def _write(self, fields: dict[str, Any]) -> None:
        self._written = True
        data = json.dumps(fields, indent=2).encode() + b"\n"
        try:
            while data:
                data = data[os.write(self._fd, data) :]
        except OSError as error:
            raise type(error)(error.errno, error.strerror, self._path) from error

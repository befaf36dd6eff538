"""`xsave_oracle.c` from Python: what the host's processor makes of an FPU state and an XSAVE area."""

import os
import struct
import subprocess
from collections.abc import Iterator, Sequence
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

from kvmpy.kvm.cpuid_entry import CpuidEntry
from kvmpy.machine.assist.xstate import Layout, layout_of

SOURCE = Path(__file__).parent / "xsave_oracle.c"
SIZE = 4096
SIGSEGV = 11
USED = 0x2FF
"""The components that the oracle loads and saves, if the processor has them."""

_ABOUT = struct.Struct("<QQ1024s")
_ANSWER = struct.Struct(f"<QQ{SIZE}s{SIZE}s{SIZE}s")


class Operation(IntEnum):
    """The odd ones have REX.W."""

    XSAVE = 0
    XSAVE64 = 1
    XSAVEOPT = 2
    XSAVEOPT64 = 3
    XSAVEC = 4
    XSAVEC64 = 5
    XRSTOR = 6
    XRSTOR64 = 7


class Request(NamedTuple):
    """``state`` is an XSAVE area in the standard format that is loaded before."""

    operation: Operation
    mask: int
    state: bytes
    area: bytes


class Answer(NamedTuple):
    """``image`` is the state before, ``after`` the state after it, as XSAVE saves them; ``xinuse`` is XGETBV's."""

    signal: int
    xinuse: int
    image: bytes
    area: bytes
    after: bytes


class XsaveOracle:
    """The program, compiled into ``folder``."""

    def __init__(self, folder: Path) -> None:
        self._program = folder / "xsave_oracle"
        subprocess.run(["gcc", "-O1", "-o", self._program, SOURCE], check=True)
        self.xcr0, selectors, leaves = _ABOUT.unpack(self._run(b""))
        self.saves_selectors = bool(selectors)
        """FCS and FDS of the forms without REX.W are not always 0."""
        rows = enumerate(struct.iter_unpack("<4I", leaves))
        self.layout: Layout = layout_of(CpuidEntry(0xD, index, 1, *row) for index, row in rows)

    def _run(self, requests: bytes) -> bytes:
        return subprocess.run([os.fspath(self._program)], input=requests, capture_output=True, check=True).stdout

    def run(self, requests: Sequence[Request]) -> Iterator[Answer]:
        """Yield the answer to each."""
        raw = b"".join(struct.pack("<QQ", r.operation, r.mask) + r.state + r.area for r in requests)
        answers = self._run(raw)[_ABOUT.size :]
        assert len(answers) == _ANSWER.size * len(requests)
        return (Answer(*row) for row in _ANSWER.iter_unpack(answers))

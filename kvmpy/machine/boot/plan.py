"""What booting is made of: options in, a plan (what goes where), and the state in which the first vCPU starts.

A protocol parses its image into a `Plan` without touching the guest; `Plan.carry_out` then copies. So an image that
is refused has not written a byte of guest memory. Named tuples rather than dataclasses: they are made at every start
of a machine, and cost a seventh.
"""

import os
import re
from collections import Counter
from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import NamedTuple

from kvmpy.machine.boot.image import ImageFile
from kvmpy.machine.memory import GuestMemory

_WORD = r'(?:"[^"]*"?|[^\s"])+'
"""A word of a Linux command line: a double quote keeps spaces, to the next one or to the end."""
_NO_REGISTERS: Mapping[str, int] = MappingProxyType({})


class CpuMode(StrEnum):
    """The mode in which the first vCPU starts: ``kvmpy.machine.x86`` has a function for each."""

    REAL = "real"
    PROTECTED = "protected"
    LONG = "long"


class Segment(NamedTuple):
    """A run of the file that belongs at ``gpa``: ``file_size`` bytes from ``offset``, zeros up to ``memory_size``."""

    gpa: int
    offset: int
    file_size: int
    memory_size: int
    described_at: int = 0
    """Offset in the file of what says so (a program header, a tag): where an error points."""

    @property
    def end(self) -> int:
        """The first gpa behind it."""
        return self.gpa + self.memory_size


class Entry(NamedTuple):
    """How the first vCPU starts. ``registers`` by their names in ``struct kvm_regs``; those not named are 0.

    In real mode ``rip`` is the offset in segment 0: cs:ip = 0:rip.
    """

    mode: CpuMode
    rip: int
    registers: Mapping[str, int] = _NO_REGISTERS
    notes: tuple[str, ...] = ()
    """What the loader did beyond copying, or could not do: a line each."""


class Module(NamedTuple):
    """A file that the boot protocol hands to the kernel, with a command line of its own."""

    path: str
    cmdline: str = ""


class BootOptions(NamedTuple):
    """What the user says about booting. A protocol that cannot serve one of these refuses it (ValueError)."""

    append: str = ""
    """The kernel's command line."""
    modules: tuple[Module, ...] = ()
    initrd: str | None = None
    """bzImage: the ramdisk. PVH, multiboot: the first module."""
    format: str | None = None
    """One of `detect.PROTOCOLS`; None finds out."""
    address: int | None = None
    """flat: the gpa to load at."""
    mode: CpuMode | None = None
    """flat, ELF: the mode to start in."""
    entry: int | None = None
    """flat, ELF: the gpa to start at."""
    devices: tuple[str, ...] = ()
    """What is told to Linux beyond what the user says, word by word: bzImage and PVH append it. Devices that cannot be
    found otherwise, and what the host demands."""
    unpack: bool = False
    """bzImage: unpack the kernel on the host where that can be, instead of running its decompressor."""

    @property
    def linux_cmdline(self) -> str:
        """The kernel's command line with `devices` behind it; before a ``--``, from where on it is init's."""
        if not self.devices:
            return self.append
        separators = (word.start() for word in re.finditer(_WORD, self.append) if word[0].strip('"') == "--")
        end = next(separators, len(self.append))
        return " ".join(filter(None, (self.append[:end].rstrip(), *self.devices, self.append[end:])))

    @property
    def shares(self) -> str:
        """Whose the bytes of `linux_cmdline` are, in words; nothing when all are the user's."""
        if not self.devices:
            return ""
        names = Counter(word.partition("=")[0] for word in self.devices)
        added = ", ".join(f"{name} x {count}" if count > 1 else name for name, count in names.items())
        own = len(os.fsencode(self.append))  # the rest is ours: the spaces between, too
        return f" ({own} given, {len(os.fsencode(self.linux_cmdline)) - own} added: {added})"

    @property
    def files(self) -> tuple[Module, ...]:
        """The initrd, if any, and the modules, as one list."""
        return ((Module(self.initrd),) if self.initrd is not None else ()) + self.modules


class Found(NamedTuple):
    """A protocol that a file offers: where it would load and start, before any option or any memory is known."""

    segments: tuple[Segment, ...]
    mode: CpuMode
    rip: int
    notes: tuple[str, ...] = ()


class PlacedFile(NamedTuple):
    """A module or initrd with its place in the guest."""

    path: str
    gpa: int
    size: int
    cmdline: str

    @property
    def end(self) -> int:
        """The first gpa behind it."""
        return self.gpa + self.size


class Plan(NamedTuple):
    """All that will be written, checked: the image's segments, module files, the loader's own tables."""

    segments: tuple[Segment, ...]
    entry: Entry
    files: tuple[PlacedFile, ...] = ()
    tables: tuple[tuple[int, bytes], ...] = ()
    """(gpa, bytes): boot information, command lines."""

    def carry_out(self, image: ImageFile, memory: GuestMemory) -> Entry:
        """Write everything into the guest and return how to start.

        Raises:
            ImageError: a file changed or failed while it was copied.
        """
        for segment in self.segments:
            with memory.view(segment.gpa, segment.file_size) as view:
                image.read_into(view, segment.offset)
            if segment.memory_size > segment.file_size:
                memory.fill(segment.gpa + segment.file_size, segment.memory_size - segment.file_size)
        for file in self.files:
            with ImageFile(file.path) as source, memory.view(file.gpa, file.size) as view:
                source.read_into(view, 0)
        for gpa, data in self.tables:
            memory.write(gpa, data)
        return self.entry

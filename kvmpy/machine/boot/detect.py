"""Which protocol boots a file, and the boot itself: `boot` is what a machine calls.

Protocols are tried in the order of `PROTOCOLS`; the first that the file offers wins. A file that claims a protocol
and is broken is refused, not tried as something else. Each protocol is a module of this package, imported only when
the file bears its sign, with three functions: ``probe`` (does the file offer it?), ``plan`` (what would go where?) and
``load`` (do it).
"""

import os
from collections.abc import Iterator
from importlib import import_module
from typing import Protocol, cast

from kvmpy.errors import ImageError
from kvmpy.machine.boot.image import ImageFile
from kvmpy.machine.boot.plan import BootOptions, Entry, Found, Plan
from kvmpy.machine.memory import GuestMemory

_SIGNS = {
    "bzimage": (b"HdrS", 0x202, 0x206),
    "pvh": (b"\x7fELF", 0, 4),
    "multiboot2": (b"\xd6\x50\x52\xe8", 0, 32768),
    "multiboot1": (b"\x02\xb0\xad\x1b", 0, 8192),
    "elf": (b"\x7fELF", 0, 4),
    "bootsector": (b"\x55\xaa", 510, 512),
}
"""Bytes that a file of each protocol has between two offsets. A file without them is not worth the import of its
module (a millisecond each, at every start); one with them is for the module to judge."""

PROTOCOLS = (*_SIGNS, "flat")
"""The names of formats, which are modules of this package, in the order in which they are tried."""

_PACKED = ((b"\x1f\x8b", "gzip"), (b"\xfd7zXZ\0", "xz"), (b"\x28\xb5\x2f\xfd", "zstd"), (b"BZh", "bzip2"))


class BootProtocol(Protocol):
    """What a module named in `PROTOCOLS` offers."""

    TITLE: str
    SERVES: frozenset[str]
    """The fields of `BootOptions` that mean something to it."""

    def probe(self, image: ImageFile) -> Found | None: ...

    def plan(self, image: ImageFile, memory: GuestMemory, options: BootOptions) -> Plan: ...

    def load(self, image: ImageFile, memory: GuestMemory, options: BootOptions) -> Entry: ...


def protocol(name: str) -> BootProtocol:
    """Return the protocol called ``name``. Raises ValueError when there is none, with the list."""
    if name not in PROTOCOLS:
        raise ValueError(f"unknown format {name!r}: {', '.join(PROTOCOLS)} are known")
    return cast(BootProtocol, import_module(f"kvmpy.machine.boot.{name}"))


def boot(path: str | os.PathLike[str], memory: GuestMemory, options: BootOptions | None = None) -> Entry:
    """Load the image at ``path`` into the guest and return how its first vCPU starts.

    ACPI tables, if any, are in memory before this: the protocols that tell the guest where they are look there.

    Raises:
        ImageError: the file cannot be read, offers no protocol, is broken, or does not fit.
        ValueError: the format is unknown, or an option means nothing to the protocol.
    """
    options = options or BootOptions()
    chosen = protocol(options.format) if options.format is not None else None
    with ImageFile(path) as image:
        chosen = chosen or detect(image)
        refuse_unserved(chosen, options)
        return chosen.load(image, memory, options)


def detect(image: ImageFile) -> BootProtocol:
    """Return the first protocol that the file offers. Raises ImageError: it offers none, or a broken one."""
    for name in plausible(image):
        candidate = protocol(name)
        if candidate.probe(image) is not None:
            return candidate
    raise unknown(image)


def plausible(image: ImageFile) -> list[str]:
    """Return the protocols whose sign the file bears, in the order in which they are tried."""
    head = image.head(max(end for _, _, end in _SIGNS.values()))
    return [name for name, (sign, start, end) in _SIGNS.items() if head.find(sign, start, end) >= 0]


def unknown(image: ImageFile) -> ImageError:
    """Return the error for a file without any magic: it names the way to boot one all the same."""
    start = image.head(8)
    for magic, name in _PACKED:
        if start.startswith(magic):
            return image.error(f"packed with {name}: unpack it first", 0)
    tried = ", ".join(_SIGNS)
    return image.error(f"no boot protocol found ({tried}); give --format flat (address, mode, entry) to boot it", 0)


def refuse_unserved(chosen: BootProtocol, options: BootOptions) -> None:
    """Refuse options that mean nothing to the protocol. Raises ValueError that names the first."""
    for field in _given(options):
        if field not in chosen.SERVES:
            raise ValueError(f"{chosen.TITLE} takes no {field}: {_SERVERS[field]} do")


_SERVERS = {
    "append": "bzImage, PVH and multiboot",
    "initrd": "bzImage, PVH and multiboot",
    "modules": "PVH and multiboot",
    "address": "flat images",
    "mode": "ELF (--format elf) and flat images",
    "entry": "ELF (--format elf) and flat images",
}


def _given(options: BootOptions) -> Iterator[str]:
    unsaid = BootOptions()
    return (field for field in _SERVERS if getattr(options, field) != getattr(unsaid, field))

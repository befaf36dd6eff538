"""Which protocol boots a file, and the boot itself: `boot` is what a machine calls.

Protocols are tried in the order of `PROTOCOLS`; the first that the file offers wins. A file that claims a protocol
and is broken is refused, not tried as something else. Each protocol is a module of this package, imported only when
the file bears its sign, with three functions: ``probe`` (does the file offer it?), ``plan`` (what would go where?) and
``load`` (do it).
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack
from importlib import import_module
from typing import Protocol, cast

from kvmpy.errors import ImageError
from kvmpy.machine.boot.image import ImageFile
from kvmpy.machine.boot.packed import LONGEST_MAGIC, recognise
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

_FOREIGN = (
    (0x38, b"ARM\x64", "a kernel for AArch64 (Image)"),
    (0x38, b"RSC\x05", "a kernel for RISC-V (Image)"),
    (0x38, b"\xcd\x23\x82\x81", "a kernel for LoongArch (Image)"),
    (0x24, b"\x18\x28\x6f\x01", "a kernel for 32-bit ARM (zImage)"),
    (0, b"\x27\x05\x19\x56", "a uImage, wrapped for U-Boot"),
    (0, b"\xd0\x0d\xfe\xed", "a device tree or a FIT image"),
    (0, b"070701", "a cpio archive: that is an initrd"),
    (0, b"MZ", "an EFI program (PE) without the setup header of a bzImage"),
)
"""Kernels that no PC starts, and what is given in place of one: an offset, the magic there, what it is.

Source: Linux Documentation/arch/arm64/booting.rst, riscv/boot-image-header.rst, loongarch/booting.rst;
arch/arm/boot/compressed/head.S; U-Boot include/image.h; Devicetree Specification 0.4 §5.2.
"""


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
    if options.format is not None:
        protocol(options.format)
    with open_image(path, options, limit=memory.size) as image:
        return boot_image(image, memory, options)


def open_image(path: str | os.PathLike[str], options: BootOptions, *, limit: int) -> ImageFile:
    """Open the image at ``path``; a packed one is unpacked in memory, up to ``limit`` bytes.

    Not where ``options`` say that it is flat: then its bytes are the guest's, as they are.

    Raises:
        ImageError: it cannot be read, or not be unpacked.
    """
    with ExitStack() as opened:
        image = opened.enter_context(ImageFile(path))
        packing = recognise(image.head(LONGEST_MAGIC))
        if packing is None or options.format == "flat":
            opened.pop_all()
            return image
        from kvmpy.machine.boot.unpack import unpack  # with three libraries that no other start needs

        return unpack(image, packing, limit=limit)


def boot_image(image: ImageFile, memory: GuestMemory, options: BootOptions) -> Entry:
    """Load an open image into the guest and return how its first vCPU starts. Raises as `boot` does."""
    chosen = protocol(options.format) if options.format is not None else detect(image)
    refuse_unserved(chosen, options)
    entry = chosen.load(image, memory, options)
    if image.packed_with is None:
        return entry
    return entry._replace(notes=(f"packed with {image.packed_with}: unpacked in memory", *entry.notes))


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
    head = image.head(64)
    for offset, magic, what in _FOREIGN:
        if head.startswith(magic, offset):
            return image.error(f"{what}: a kernel for x86-64 is wanted, as bzImage or ELF", offset)
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

"""What a file is, every boot protocol that it offers, and why it would not boot: what `kvmpy inspect` prints.

Each protocol is asked, not only the first that fits; each is planned for a machine of a given size, and nothing is
loaded anywhere.
"""

import os
from dataclasses import asdict, dataclass, replace
from typing import Any

from kvmpy.errors import ImageError
from kvmpy.machine.boot import bzimage, symbols
from kvmpy.machine.boot.detect import BootProtocol, open_image, plausible, protocol, unknown
from kvmpy.machine.boot.elf import MAGIC as ELF_MAGIC
from kvmpy.machine.boot.image import ImageFile
from kvmpy.machine.boot.linux import linux_version
from kvmpy.machine.boot.packed import LONGEST_MAGIC, recognise
from kvmpy.machine.boot.plan import BootOptions, CpuMode, Segment
from kvmpy.machine.memory import GuestMemory
from kvmpy.units import MiB


@dataclass(frozen=True, slots=True)
class Offer:
    """A protocol that the file offers. ``mode`` and ``entry`` (a gpa) are None when it is too broken to tell."""

    protocol: str
    """The name that ``--format`` takes."""
    title: str
    segments: tuple[Segment, ...]
    mode: CpuMode | None
    entry: int | None
    notes: tuple[str, ...]
    error: str | None
    """Why it would not boot; None when it would."""
    error_offset: int | None


@dataclass(frozen=True, slots=True)
class Inspection:
    """What is known of a file. ``boots`` names the protocol by which it would boot, ``error`` says why it would not."""

    path: str
    size: int
    what: str
    offers: tuple[Offer, ...] = ()
    boots: str | None = None
    error: str | None = None
    linux: str | None = None
    """The release, when it is a Linux kernel."""
    packed_with: str | None = None
    """The packing of a packed file: what is said of it is said of its contents, but for `size`."""
    unpacked_size: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain values for JSON: numbers in bytes and gpas, segments with the names of their fields."""
        plain = asdict(self)
        for offer, shown in zip(self.offers, plain["offers"], strict=True):
            shown["segments"] = [segment._asdict() for segment in offer.segments]
        return plain


def inspect(path: str | os.PathLike[str], *, memory_size: int = 128 * MiB) -> Inspection:
    """Return what the file is and how it would boot on a machine of ``memory_size`` bytes.

    Raises:
        ImageError: it cannot be read, is no regular file, or is empty. A broken kernel is no error but a finding.
    """
    with ImageFile(path) as file, GuestMemory(memory_size) as memory:
        packing = recognise(file.head(LONGEST_MAGIC))
        if packing is None:
            return _inspect(file, memory)
        try:
            image = open_image(path, BootOptions(), limit=memory_size)
        except ImageError as error:
            what = f"packed with {packing.name}"
            return Inspection(file.path, file.size, what, error=error.message, packed_with=packing.name)
        with image:
            found = _inspect(image, memory)
            return replace(found, path=file.path, size=file.size, unpacked_size=image.size)


def _inspect(image: ImageFile, memory: GuestMemory) -> Inspection:
    found = (_offer(image, name, protocol(name), memory) for name in plausible(image))
    offers = tuple(offer for offer in found if offer is not None)
    first = offers[0] if offers else None
    return Inspection(
        path=image.path,
        size=image.size,
        what=_what(image, first),
        linux=linux_version(image),
        packed_with=image.packed_with,
        offers=offers,
        boots=first.protocol if first and first.error is None else None,
        error=first.error if first else unknown(image).message,
    )


def _offer(image: ImageFile, name: str, candidate: BootProtocol, memory: GuestMemory) -> Offer | None:
    try:
        found = candidate.probe(image)
    except ImageError as error:
        return Offer(name, candidate.TITLE, (), None, None, (), error.message, error.offset)
    if found is None:
        return None
    message, offset = None, None
    segments, mode, entry = found.segments, found.mode, found.rip
    try:
        plan = candidate.plan(image, memory, BootOptions())
        segments, mode, entry = plan.segments, plan.entry.mode, plan.entry.rip
    except ImageError as error:
        message, offset = error.message, error.offset
    return Offer(name, candidate.TITLE, segments, mode, entry, found.notes, message, offset)


def _what(image: ImageFile, first: Offer | None) -> str:
    """Return one line on what the file is, from its contents alone."""
    if image.head(4) == ELF_MAGIC:
        try:
            return symbols.describe(image)
        except ImageError as error:
            return f"ELF file, damaged: {error.message}"
    if first is None:
        return "no known format"
    if first.protocol == "bzimage":
        return f"Linux bzImage {bzimage.version_text(image)}"
    return f"{first.title} image"

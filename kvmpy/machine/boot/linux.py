"""Whether an image is a Linux kernel, and of which version: by the line that Linux says of itself.

A bzImage has it in its setup code, and its header says where. A vmlinux has the banner that it prints first,
``Linux version 6.1.0 (who@where) ...``, somewhere in what it loads.

Source: Linux Documentation/arch/x86/boot.rst ("kernel_version"); init/version.c; arch/x86/include/asm/setup.h.
"""

import re
from collections.abc import Iterator

from kvmpy.errors import ImageError
from kvmpy.machine.boot.image import ImageFile
from kvmpy.units import MiB

COMMAND_LINE_SIZE = 2048
"""Bytes of a command line that Linux for x86 keeps, its NUL included: a longer one is cut off without a word."""

_RELEASE = re.compile(r"\d+\.\d+\S*")
_START = b"Linux version "
_BANNER = re.compile(_START + rb"(\d{1,3}\.\d[!-~]{0,59}) \(")
_LONGEST_BANNER = 128
_LOOKED_AT = 256 * MiB
"""The banner is in the first read-only data of a kernel: behind so much of an image nobody looks."""
_STEP = 1 * MiB


def linux_version(image: ImageFile) -> str | None:
    """Return the release of a Linux kernel, such as ``6.1.0-9-amd64``; None when the image is none, or damaged."""
    from kvmpy.machine.boot import bzimage  # which asks this module too

    try:
        if image.head(4) == b"\x7fELF":
            return _banner_release(image)
        release = _RELEASE.match(bzimage.version_line(image))
        return release[0] if release else None
    except ImageError:
        return None


def _banner_release(image: ImageFile) -> str | None:
    for data in _loaded(image):
        at = data.find(_START)
        while at >= 0:
            found = _BANNER.match(data, at)
            if found:
                return found[1].decode("ascii")
            at = data.find(_START, at + 1)
    return None


def _loaded(image: ImageFile) -> Iterator[bytes]:
    """Yield what an ELF file loads, in steps that overlap by the length of a banner."""
    from kvmpy.machine.boot.elf import PT_LOAD, read_elf

    elf = read_elf(image)
    left = _LOOKED_AT
    for header in elf.headers if elf is not None else ():
        if header.type != PT_LOAD:
            continue
        end = min(header.offset + header.filesz, image.size)
        for at in range(header.offset, end, _STEP):
            if left <= 0:
                return
            data = image.read(at, min(_STEP + _LONGEST_BANNER, end - at))
            left -= len(data)
            yield data

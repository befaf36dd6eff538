"""Unpacking on the host, by Python's own library: a packed file (``vmlinux.xz``), and the kernel inside a bzImage.

What comes out is an `ImageFile` in memory, so that everything behind it reads it like a file on disk. It is bounded:
a few packed bytes may claim to be terabytes.

A bzImage carries its kernel, an ELF file, as a packed payload, and the code that unpacks it. Where ring 0 is emulated
instruction by instruction, that code takes the guest from many seconds to tens of minutes, and the host a tenth of a
second. `load_kernel` does what it does: it puts each PT_LOAD at its physical address and enters the kernel there in
long mode, rsi = boot_params. At the address that it is linked for, a kernel needs no relocation: what may lie behind
the ELF file in the payload (the relocations for address-space randomisation) is ignored.

Source: Linux Documentation/arch/x86/boot.rst ("payload_offset", "64-bit Boot Protocol").
"""

import bz2
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from kvmpy.errors import ImageError
from kvmpy.machine.boot import elf as elf_format
from kvmpy.machine.boot.bzimage import Payload
from kvmpy.machine.boot.image import ImageFile
from kvmpy.machine.boot.lz4 import Lz4Error, unpack_blocks
from kvmpy.machine.boot.packed import Packing
from kvmpy.machine.boot.place import check_segments
from kvmpy.machine.boot.plan import CpuMode, Entry, Plan
from kvmpy.machine.memory import GuestMemory
from kvmpy.units import MiB, format_size

_STEP = 1 * MiB
"""Bytes that are read, and unpacked, at a time."""
_LZMA_MEMORY = 256 * MiB
"""What a dictionary may take: a header may ask for 4 GiB."""
_SIZE_BEHIND = 4
"""The payload of a bzImage has its unpacked size behind it (gzip has it inside)."""

_STREAMS: dict[str, Callable[[], Any]] = {
    "gzip": lambda: zlib.decompressobj(16 + zlib.MAX_WBITS),
    "bzip2": bz2.BZ2Decompressor,
    "xz": lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, _LZMA_MEMORY),
    "LZMA": lambda: lzma.LZMADecompressor(lzma.FORMAT_ALONE, _LZMA_MEMORY),
}
_LEGACY_LZ4 = "legacy LZ4"


def can_unpack(packing: Packing) -> bool:
    """Tell whether Python's own library, or `kvmpy.machine.boot.lz4`, unpacks it."""
    return packing.name == _LEGACY_LZ4 or packing.name in _STREAMS


def unpack(image: ImageFile, packing: Packing, *, limit: int, offset: int = 0, size: int | None = None) -> ImageFile:
    """Return what ``size`` bytes of ``image`` from ``offset`` on (all of it) unpack to, as a file in memory.

    Raises:
        ImageError: nothing here unpacks that; it is damaged, empty, or more than ``limit`` bytes.
    """
    if not can_unpack(packing):
        raise image.error(f"packed with {packing.name}: unpack it first, with {packing.command}", offset)
    size = image.size - offset if size is None else size
    pieces = _lz4_pieces if packing.name == _LEGACY_LZ4 else _stream_pieces
    fd = os.memfd_create("kvmpy-image", os.MFD_CLOEXEC)
    try:
        total = 0
        for piece in pieces(image, packing, offset, size):
            total += len(piece)
            if total > limit:
                message = f"{packing.name} data unpacks to more than {format_size(limit)}, the guest's memory"
                raise image.error(message, offset)
            _write(fd, piece)
        if not total:
            raise image.error(f"{packing.name} data unpacks to nothing", offset)
        return ImageFile.in_memory(fd, f"{image.path} (unpacked)", packed_with=packing.name)
    except BaseException:
        os.close(fd)
        raise


def _stream_pieces(image: ImageFile, packing: Packing, offset: int, size: int) -> Iterator[bytes]:
    """Yield what a stream unpacks to, _STEP bytes at a time."""
    stream = _STREAMS[packing.name]()
    for at in range(offset, offset + size, _STEP):
        length = min(_STEP, offset + size - at)
        data = image.read(at, length)
        full = True
        while full:
            try:
                piece = stream.decompress(data, _STEP)
            except (zlib.error, lzma.LZMAError, OSError, ValueError, EOFError) as error:
                raise image.error(f"damaged {packing.name} data: {error}", at) from error
            yield piece
            if stream.eof:
                left = len(stream.unused_data) + offset + size - at - length
                if left > _SIZE_BEHIND:
                    message = f"{left} bytes behind the {packing.name} data: unpack it first, with {packing.command}"
                    raise image.error(message, offset + size - left)
                return
            # zlib keeps input that it had no room for where the caller must take it from; the others keep it.
            data = getattr(stream, "unconsumed_tail", b"")
            full = len(piece) == _STEP
    raise image.error(f"truncated: the {packing.name} data goes on behind the end", offset + size)


def _lz4_pieces(image: ImageFile, packing: Packing, offset: int, size: int) -> Iterator[bytearray]:
    try:
        yield from unpack_blocks(image.read(offset, size))
    except Lz4Error as error:
        raise image.error(f"damaged LZ4 data: {error}", offset + error.offset) from error


def _write(fd: int, piece: bytes | bytearray) -> None:
    view = memoryview(piece)
    while view:
        view = view[os.write(fd, view) :]


# --- the kernel inside a bzImage --------------------------------------------------------------------------------


def load_kernel(image: ImageFile, payload: Payload | None, memory: GuestMemory, plan: Plan) -> Entry:
    """Carry out ``plan``, which starts the decompressor of a bzImage, with the unpacked kernel in its place.

    As it stands where that cannot be: the packing is unknown here, or the address that the kernel is linked for is
    not free. The notes of the entry say which was done.

    Raises:
        ImageError: the payload is damaged, or no kernel.
    """
    if payload is None or payload.packing is None or not can_unpack(payload.packing):
        name = payload.packing.name if payload and payload.packing else "something unknown"
        return _as_it_stands(image, memory, plan, f"compressed with {name}")
    with unpack_kernel(image, payload, payload.packing, limit=memory.size) as kernel:
        elf = elf_format.read_elf(kernel)
        if elf is None or elf.bits != 64:
            raise kernel.error("no ELF64 file, so no kernel for x86-64", 0)
        segments = elf_format.load_segments(kernel, elf)
        rip = elf_format.physical_entry(elf)
        elf_format.check_elf_entry(kernel, rip, CpuMode.LONG, segments)
        try:
            check_segments(kernel, segments, memory, plan.files)
        except ImageError as error:
            return _as_it_stands(image, memory, plan, error.message)
        note = f"unpacked on the host: {payload.packing.name}, {format_size(kernel.size)}"
        entry = Entry(CpuMode.LONG, rip, plan.entry.registers, (note,))
        return plan._replace(segments=segments, entry=entry).carry_out(kernel, memory)


def unpack_kernel(image: ImageFile, payload: Payload, packing: Packing, *, limit: int) -> ImageFile:
    """Return the kernel of a bzImage. Raises ImageError: it is damaged, or more than ``limit`` bytes."""
    kernel = unpack(image, packing, limit=limit, offset=payload.offset, size=payload.size)
    if kernel.size != payload.unpacked_size:
        kernel.close()
        message = f"payload unpacks to {kernel.size} bytes, and says {payload.unpacked_size} at its end"
        raise image.error(message, payload.offset + payload.size - _SIZE_BEHIND)
    return kernel


def _as_it_stands(image: ImageFile, memory: GuestMemory, plan: Plan, reason: str) -> Entry:
    note = f"not unpacked on the host: {reason}"
    return plan._replace(entry=plan.entry._replace(notes=(note,))).carry_out(image, memory)

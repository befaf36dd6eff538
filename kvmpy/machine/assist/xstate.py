"""FPU state in memory, as XSAVE and its kin write and read it: bytes in, bytes out, no guest.

An XSAVE area, in both formats::

    0    x87: control, status, tags, opcode, instruction and data pointer         24 bytes
    24   MXCSR, 28 MXCSR_MASK
    32   ST0..ST7, 10 of 16 bytes each
    160  XMM0..XMM15                                                              416..511 are software's
    512  header: XSTATE_BV, 520 XCOMP_BV, 528..575 reserved
    576  standard format: each other component at the offset that CPUID leaf 0xD tells
         compacted format: those in XCOMP_BV one behind the other, some of them at the next multiple of 64

The vCPU's own state is such an area too, an *image*: standard format, as KVM_GET_XSAVE gives it and KVM_SET_XSAVE
takes it. Components whose bit in XSTATE_BV is clear are in their initial state.

What a processor does with MXCSR differs by instruction: it goes with XMM in the compacted format, and with either of
XMM and YMM in the standard one. XMM registers that are all zero are the initial SSE state whatever MXCSR is, but
XSAVEC, XSAVES and XGETBV look at MXCSR too.

Floor: machine.

Source: Intel SDM vol. 1 §13.4 to §13.12; vol. 2, XSAVE, XSAVEOPT, XSAVEC, XSAVES, XRSTOR, XRSTORS.
"""

import struct
from collections.abc import Iterable
from typing import NamedTuple

from kvmpy.kvm.cpuid_entry import CpuidEntry
from kvmpy.machine.assist.context import GP, Fault, Refused

PKRU_NUMBER = 9
X87, SSE, AVX, PKRU = 1 << 0, 1 << 1, 1 << 2, 1 << PKRU_NUMBER
COMPACTED = 1 << 63

MXCSR, MXCSR_MASK, ST, XMM, LEGACY_END = 24, 28, 32, 160, 416
HEADER, EXTENDED = 512, 576
XSTATE_BV, XCOMP_BV = struct.Struct("<Q"), struct.Struct("<8xQ")
INITIAL_MXCSR = 0x1F80
DEFAULT_MXCSR_MASK = 0xFFBF
INITIAL_X87 = struct.pack("<H22x", 0x037F)
"""Control word; all else is zero, and all registers are empty."""

CPUID_XSTATE = 0xD
FIRST_EXTENDED, COMPONENTS = 2, 63


class Component(NamedTuple):
    """Where an extended component is in the standard format. ``aligned``: to 64 bytes, in the compacted one."""

    offset: int
    size: int
    aligned: bool


Layout = dict[int, Component]
"""The extended components of a processor, by number."""

Piece = tuple[int, bytes]
"""Bytes for an XSAVE area, and their offset."""


def layout_of(cpuid: Iterable[CpuidEntry]) -> Layout:
    """Return the layout that CPUID leaf 0xD tells, without the supervisor components, which no image has."""
    rows = [e for e in cpuid if e.function == CPUID_XSTATE and e.index >= FIRST_EXTENDED and e.eax and not e.ecx & 1]
    return {e.index: Component(e.ebx, e.eax, bool(e.ecx & 2)) for e in rows}


def places(layout: Layout, components: int, *, compacted: bool) -> dict[int, tuple[int, int]]:
    """Return (offset, size) of each extended one of ``components``, a bitmap, in an area that holds those.

    Raises:
        Refused: of one of them CPUID tells nothing.
    """
    found, end = {}, EXTENDED
    for number in range(FIRST_EXTENDED, COMPONENTS):
        if not components >> number & 1:
            continue
        if number not in layout:
            raise Refused(f"CPUID leaf 0xd tells nothing of state component {number}")
        offset, size, aligned = layout[number]
        if compacted:
            offset = -(-end // 64) * 64 if aligned else end
            end = offset + size
        found[number] = offset, size
    return found


def in_use(image: bytes | bytearray, layout: Layout, *, with_mxcsr: bool) -> int:
    """Return XINUSE: the components that are not in their initial state.

    ``with_mxcsr``: MXCSR is part of the SSE state, as for XSAVEC, XSAVES and XGETBV.
    """
    bitmap = int(XSTATE_BV.unpack_from(image, HEADER)[0])
    if PKRU_NUMBER in layout:
        # The kernel keeps PKRU elsewhere, and its mark does not count.
        at, size, _ = layout[PKRU_NUMBER]
        bitmap = bitmap & ~PKRU | (PKRU if any(image[at : at + size]) else 0)
    if _mxcsr(image) == INITIAL_MXCSR:
        return bitmap
    if with_mxcsr:
        return bitmap | SSE
    # The kernel that made the image used XSAVES, and so may have marked SSE for MXCSR alone.
    return bitmap if any(image[XMM:LEGACY_END]) else bitmap & ~SSE


# --- saving -----------------------------------------------------------------------------------------------------


def save(image: bytes, layout: Layout, rfbm: int, old_bv: int, *, wide: bool, optimized: bool) -> list[Piece]:
    """Return what XSAVE, or with ``optimized`` XSAVEOPT, writes into an area whose XSTATE_BV is ``old_bv``.

    ``rfbm`` is the requested-feature bitmap. ``wide``: the instruction has REX.W.
    """
    xinuse = in_use(image, layout, with_mxcsr=False)
    saved = rfbm & xinuse if optimized else rfbm
    pieces = _legacy(image, saved, wide=wide, mxcsr=bool(rfbm & (SSE | AVX)))
    pieces.append((HEADER, XSTATE_BV.pack(old_bv & ~rfbm | xinuse & rfbm)))
    for offset, size in places(layout, saved, compacted=False).values():
        pieces.append((offset, image[offset : offset + size]))
    return pieces


def save_compacted(image: bytes, layout: Layout, rfbm: int, *, wide: bool) -> list[Piece]:
    """Return what XSAVEC or XSAVES writes. Arguments as for `save`."""
    saved = rfbm & in_use(image, layout, with_mxcsr=True)
    pieces = _legacy(image, saved, wide=wide, mxcsr=bool(saved & SSE))
    pieces.append((HEADER, XSTATE_BV.pack(saved) + XSTATE_BV.pack(rfbm | COMPACTED)))
    for number, (offset, size) in places(layout, rfbm, compacted=True).items():
        if saved >> number & 1:
            at = layout[number].offset
            pieces.append((offset, image[at : at + size]))
    return pieces


def _legacy(image: bytes, saved: int, *, wide: bool, mxcsr: bool) -> list[Piece]:
    if wide and mxcsr and saved & (X87 | SSE) == X87 | SSE:
        return [(0, image[:LEGACY_END])]
    pieces = []
    if saved & X87:
        pieces += [(0, _pointers(image[:MXCSR], wide=wide)), (ST, image[ST:XMM])]
    if mxcsr:
        pieces.append((MXCSR, image[MXCSR:ST]))
    if saved & SSE:
        pieces.append((XMM, image[XMM:LEGACY_END]))
    return pieces


def _pointers(x87: bytes, *, wide: bool) -> bytes:
    """Return the first 24 bytes: without REX.W the pointers have 32 bits, and selectors that processors give as 0."""
    return x87 if wide else x87[:12] + bytes(4) + x87[16:20] + bytes(4)


# --- restoring --------------------------------------------------------------------------------------------------


class Request(NamedTuple):
    """What XRSTOR or XRSTORS is about to do with an area, by its header. Made by `parse_header`."""

    rfbm: int
    restored: int
    compacted: bool
    places: dict[int, tuple[int, int]]
    """Of each extended component that is restored: offset and size in the area."""

    @property
    def size(self) -> int:
        """How many bytes of the area are needed."""
        return max((offset + size for offset, size in self.places.values()), default=EXTENDED)


def parse_header(area: bytes, layout: Layout, enabled: int, rfbm: int, *, supervisor: bool) -> Request:
    """Check the header of ``area``, of which at least 576 bytes are there. ``enabled``: XCR0, or XCR0 | IA32_XSS.

    ``supervisor``: by XRSTORS, which takes nothing but the compacted format.

    Raises:
        Fault: #GP(0), for this header.
        Refused: CPUID does not tell where one of its components is.
    """
    (xstate_bv,), (xcomp_bv,) = XSTATE_BV.unpack_from(area, HEADER), XCOMP_BV.unpack_from(area, HEADER)
    compacted = bool(xcomp_bv & COMPACTED)
    held = xcomp_bv & ~COMPACTED if compacted else enabled
    reserved = area[HEADER + 16 : EXTENDED] if compacted else area[HEADER + 8 : HEADER + 24]
    if xstate_bv & ~held or held & ~enabled or any(reserved) or (supervisor and not compacted):
        raise Fault(GP, 0)
    restored = rfbm & xstate_bv
    found = places(layout, held if compacted else restored, compacted=compacted)
    return Request(rfbm, restored, compacted, {n: place for n, place in found.items() if restored >> n & 1})


def restore(image: bytes, layout: Layout, request: Request, area: bytes, *, wide: bool) -> bytearray:
    """Return ``image`` with the components of ``request`` loaded from ``area``, or in their initial state.

    Raises:
        Fault: #GP(0): MXCSR has bits that the processor has not.
    """
    rfbm, restored = request.rfbm, request.restored
    new = bytearray(image)
    if restored & X87:
        new[:MXCSR], new[ST:XMM] = _pointers(area[:MXCSR], wide=wide), _registers(area[ST:XMM])
    elif rfbm & X87:
        new[:MXCSR], new[ST:XMM] = INITIAL_X87, bytes(XMM - ST)

    if restored & SSE:
        new[XMM:LEGACY_END] = area[XMM:LEGACY_END]
    elif rfbm & SSE:
        new[XMM:LEGACY_END] = bytes(LEGACY_END - XMM)
    if restored & SSE if request.compacted else rfbm & (SSE | AVX):
        new[MXCSR:MXCSR_MASK] = _checked_mxcsr(area, image)
    elif rfbm & SSE:
        new[MXCSR:MXCSR_MASK] = INITIAL_MXCSR.to_bytes(4, "little")

    for number, component in layout.items():
        start, end = component.offset, component.offset + component.size
        if restored >> number & 1:
            at, size = request.places[number]
            new[start:end] = area[at : at + size]
        elif rfbm >> number & 1:
            new[start:end] = bytes(component.size)
    _set_header(new, layout, in_use(image, layout, with_mxcsr=False) & ~rfbm | restored)
    return new


def _registers(area: bytes) -> bytes:
    """Return ST0..ST7 as a processor keeps them: 80 of 128 bits."""
    return b"".join(area[at : at + 10] + bytes(6) for at in range(0, len(area), 16))


def _checked_mxcsr(area: bytes, image: bytes) -> bytes:
    mask = int.from_bytes(image[MXCSR_MASK:ST], "little") or DEFAULT_MXCSR_MASK
    if _mxcsr(area) & ~mask:
        raise Fault(GP, 0)
    return area[MXCSR:MXCSR_MASK]


def _set_header(image: bytearray, layout: Layout, bitmap: int) -> None:
    """Mark what KVM_SET_XSAVE shall load: more than ``bitmap`` where else it would not.

    The kernel takes MXCSR with SSE, and leaves PKRU as it is when that is not marked.
    """
    if _mxcsr(image) != INITIAL_MXCSR:
        bitmap |= SSE
    if PKRU_NUMBER in layout:
        bitmap |= PKRU
    XSTATE_BV.pack_into(image, HEADER, bitmap)


def _mxcsr(area: bytes | bytearray) -> int:
    return int.from_bytes(area[MXCSR:MXCSR_MASK], "little")

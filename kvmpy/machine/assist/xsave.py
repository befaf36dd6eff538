"""XSAVE, XSAVEOPT, XSAVEC, XSAVES, XRSTOR, XRSTORS, XGETBV, XSETBV, RDPKRU and WRPKRU.

The guest's FPU state is fetched and set whole, by KVM_GET_XSAVE and KVM_SET_XSAVE; what goes where is `xstate`'s.

Not here: supervisor state components. IA32_XSS has to be 0, else XSAVES and XRSTORS are refused. And no modified
optimization: what has not changed since XRSTOR is saved again, as a processor may do.

FXSAVE and FXRSTOR are in KVM's emulator.

Floor: machine.

Source: Intel SDM vol. 1 §13.3 to §13.12; vol. 2, one page an instruction; vol. 3 §2.6 (XCR0).
"""

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from kvmpy._shim import ffi, lib
from kvmpy.errors import KvmError
from kvmpy.kvm import Vcpu
from kvmpy.kvm.ioctl import ioctl
from kvmpy.kvm.system import MAX_CPUID_ENTRIES, cpuid_entries
from kvmpy.machine.assist import xstate
from kvmpy.machine.assist.context import GP, NM, UD, Completion, Context, Fault, Refused, without_lock
from kvmpy.machine.assist.instruction import Instruction, OpcodeMap
from kvmpy.machine.assist.xstate import EXTENDED, HEADER, Layout, Piece

IA32_XSS = 0xDA0
CR4_OSXSAVE, CR4_PKE = 1 << 18, 1 << 22
RAX, RCX, RDX = 0, 1, 2
LOW_32 = (1 << 32) - 1
ALIGNMENT = 64

_layouts: WeakKeyDictionary[Vcpu, Layout] = WeakKeyDictionary()


def find(instruction: Instruction) -> Completion | None:
    """Return what completes ``instruction``, or None: it is not one of these."""
    if instruction.map is not OpcodeMap.TWO_0F or instruction.vex or instruction.prefix:
        return None
    if instruction.opcode == 0x01:
        found = _REGISTER_FORMS.get(instruction.modrm or 0)
    else:
        found = _MEMORY_FORMS.get((instruction.opcode, instruction.reg & 7)) if instruction.memory else None
    return without_lock(found, instruction)


# --- XCR0, PKRU -------------------------------------------------------------------------------------------------


def _xgetbv(context: Context) -> None:
    """XCR0, or with ECX = 1 those of its components that are in use."""
    _require_osxsave(context)
    index = context.registers[RCX] & LOW_32
    if index > 1:
        raise Fault(GP, 0)
    value = _xcr0(context)
    if index == 1:
        value &= xstate.in_use(_image(context), _layout(context), with_mxcsr=True)
    context.registers[RAX], context.registers[RDX] = value & LOW_32, value >> 32


def _xsetbv(context: Context) -> None:
    """Set XCR0. KVM knows which values may be."""
    _require_osxsave(context)
    if context.cpl != 0 or context.registers[RCX] & LOW_32:
        raise Fault(GP, 0)
    xcrs = context.vcpu.get_state("XCRS")
    xcrs.nr_xcrs = 1
    xcrs.xcrs[0].xcr, xcrs.xcrs[0].value = 0, _mask(context)
    try:
        context.vcpu.set_state("XCRS", xcrs)
    except KvmError:
        raise Fault(GP, 0) from None


def _rdpkru(context: Context) -> None:
    start, end = _pkru(context)
    if context.registers[RCX] & LOW_32:
        raise Fault(GP, 0)
    context.registers[RAX], context.registers[RDX] = int.from_bytes(_image(context)[start:end], "little"), 0


def _wrpkru(context: Context) -> None:
    start, end = _pkru(context)
    if (context.registers[RCX] | context.registers[RDX]) & LOW_32:
        raise Fault(GP, 0)
    image = bytearray(_image(context))
    image[start:end] = (context.registers[RAX] & LOW_32).to_bytes(end - start, "little")
    marks = xstate.in_use(image, _layout(context), with_mxcsr=True) | xstate.PKRU
    xstate.XSTATE_BV.pack_into(image, HEADER, marks)
    _set_image(context, image)


def _pkru(context: Context) -> tuple[int, int]:
    """Return where PKRU is in the image."""
    if not context.sregs.cr4 & CR4_PKE:
        raise Fault(UD)
    if xstate.PKRU_NUMBER not in _layout(context):
        raise Refused("CPUID leaf 0xd does not tell where PKRU is")
    at = _layout(context)[xstate.PKRU_NUMBER].offset
    return at, at + 4


# --- saving and restoring ---------------------------------------------------------------------------------------


def _xsave(context: Context) -> None:
    _save(context, optimized=False)


def _xsaveopt(context: Context) -> None:
    _save(context, optimized=True)


def _save(context: Context, *, optimized: bool) -> None:
    rfbm, area = _begin(context, supervisor=False)
    old_bv = int.from_bytes(context.read(area + HEADER, 8), "little")
    wide, layout = context.instruction.rex_w, _layout(context)
    _write(context, xstate.save(_image(context), layout, rfbm, old_bv, wide=wide, optimized=optimized))


def _xsavec(context: Context) -> None:
    _save_compacted(context, supervisor=False)


def _xsaves(context: Context) -> None:
    _save_compacted(context, supervisor=True)


def _save_compacted(context: Context, *, supervisor: bool) -> None:
    rfbm, _ = _begin(context, supervisor=supervisor)
    _write(context, xstate.save_compacted(_image(context), _layout(context), rfbm, wide=context.instruction.rex_w))


def _xrstor(context: Context) -> None:
    _restore(context, supervisor=False)


def _xrstors(context: Context) -> None:
    _restore(context, supervisor=True)


def _restore(context: Context, *, supervisor: bool) -> None:
    """Load from one copy of the area: the guest may change it meanwhile."""
    rfbm, linear = _begin(context, supervisor=supervisor)
    layout = _layout(context)
    area = context.read(linear, EXTENDED)
    request = xstate.parse_header(area, layout, _xcr0(context), rfbm, supervisor=supervisor)
    if request.size > EXTENDED:
        area += context.read(context.operand_address(request.size) + EXTENDED, request.size - EXTENDED)
    image = xstate.restore(_image(context), layout, request, area, wide=context.instruction.rex_w)
    _set_image(context, image)


def _begin(context: Context, *, supervisor: bool) -> tuple[int, int]:
    """Return the requested-feature bitmap, and the linear address of the area.

    Raises:
        Fault: the instruction may not be executed now, or the area is not aligned.
        Refused: IA32_XSS has supervisor state components enabled.
    """
    _require_osxsave(context)
    if context.sregs.cr0 & lib.X86_CR0_TS:
        raise Fault(NM)
    if supervisor and context.cpl != 0:
        raise Fault(GP, 0)
    if supervisor and context.vcpu.get_msrs([IA32_XSS]).get(IA32_XSS, 0):
        raise Refused("supervisor state components, which IA32_XSS enables")
    linear = context.operand_address(EXTENDED)
    if linear % ALIGNMENT:
        raise Fault(GP, 0)
    return _xcr0(context) & _mask(context), linear


def _write(context: Context, pieces: list[Piece]) -> None:
    """Write all of ``pieces`` into the area, or none; and nothing between them."""
    size = max(offset + len(data) for offset, data in pieces)
    linear, at = context.operand_address(size), 0
    for gpa, length in context.translate(linear, size, write=True):
        for offset, data in pieces:
            start, end = max(offset, at), min(offset + len(data), at + length)
            if start < end:
                context.memory.write(gpa + start - at, data[start - offset : end - offset])
        at += length


# --- the vCPU ---------------------------------------------------------------------------------------------------


def _require_osxsave(context: Context) -> None:
    if not context.sregs.cr4 & CR4_OSXSAVE:
        raise Fault(UD)


def _mask(context: Context) -> int:
    """Return EDX:EAX."""
    return (context.registers[RDX] & LOW_32) << 32 | context.registers[RAX] & LOW_32


def _xcr0(context: Context) -> int:
    xcrs = context.vcpu.get_state("XCRS")
    return next((int(row.value) for row in xcrs.xcrs[0 : xcrs.nr_xcrs] if row.xcr == 0), xstate.X87)


def _image(context: Context) -> bytes:
    return bytes(ffi.buffer(context.vcpu.get_state("XSAVE")))


def _set_image(context: Context, image: bytearray) -> None:
    state: Any = ffi.new("struct kvm_xsave *")
    ffi.buffer(state)[:] = image
    try:
        context.vcpu.set_state("XSAVE", state)
    except KvmError as error:
        raise Refused(str(error)) from None


def _layout(context: Context) -> Layout:
    """Return the layout of XSAVE areas: that of the vCPU's own CPUID, to which KVM also adds leaf 0xD by itself."""
    vcpu = context.vcpu
    if vcpu not in _layouts:
        table = ffi.new("struct kvm_cpuid2 *", [MAX_CPUID_ENTRIES, MAX_CPUID_ENTRIES])
        ioctl(vcpu.fd, "KVM_GET_CPUID2", table)
        _layouts[vcpu] = xstate.layout_of(cpuid_entries(table))
    return _layouts[vcpu]


_RUN: dict[tuple[int, int], tuple[str, Callable[[Context], None]]] = {
    (0xAE, 4): ("xsave", _xsave),
    (0xAE, 5): ("xrstor", _xrstor),
    (0xAE, 6): ("xsaveopt", _xsaveopt),
    (0xC7, 3): ("xrstors", _xrstors),
    (0xC7, 4): ("xsavec", _xsavec),
    (0xC7, 5): ("xsaves", _xsaves),
}
_MEMORY_FORMS = {key: Completion(name, run) for key, (name, run) in _RUN.items()}
"""By opcode and ModRM.reg."""

_REGISTER_FORMS = {
    0xD0: Completion("xgetbv", _xgetbv),
    0xD1: Completion("xsetbv", _xsetbv),
    0xEE: Completion("rdpkru", _rdpkru),
    0xEF: Completion("wrpkru", _wrpkru),
}
"""By ModRM, behind 0F 01."""

"""Faults of the FPU and of encodings, before an instruction is executed natively.

Source: Intel SDM vol. 2 §2.4 (exceptions by instruction class) and the instructions' pages; vol. 3 §2.5 (control
registers), §6.5 (vectors).
"""

from dataclasses import replace

import pytest
from native_faults import fault, mxcsr, of, run, vector
from native_state import INITIAL, Guest

from kvmpy.machine.assist import native
from kvmpy.machine.assist.context import GP, MF, NM, UD, XM, Context, Fault, Refused
from kvmpy.machine.assist.decode import decode
from kvmpy.machine.assist.fpu import CR4_OSXSAVE
from kvmpy.machine.assist.native import require
from kvmpy.machine.assist.rows import find_row
from kvmpy.machine.assist.vector import TABLE

pytestmark = pytest.mark.kvm

CR0_MP, CR0_EM, CR0_TS, CR0_NE = 1 << 1, 1 << 2, 1 << 3, 1 << 5
CR4_OSFXSR, CR4_OSXMMEXCPT = 1 << 9, 1 << 10

INSTRUCTIONS = {
    "fld1": "d9e8",
    "fwait": "9b",
    "emms": "0f77",
    "paddb": "0ffcc1",  # of MMX registers
    "addps": "0f58c1",
    "ldmxcsr": "0fae16",
    "cvtpi2ps": "0f2ac1",
    "vaddps": "c5f058c1",
    "popcnt": "f30fb8c1",
    "andn": "c4e270f2c1",
}
# CR0 and CR4 as they are set: EM; TS; TS without MP; EM and TS; no OSFXSR; no OSXSAVE.
SETTINGS = (
    (CR0_MP | CR0_EM, ~0),
    (CR0_MP | CR0_TS, ~0),
    (CR0_TS, ~0),
    (CR0_MP | CR0_EM | CR0_TS, ~0),
    (CR0_MP, ~CR4_OSFXSR),
    (CR0_MP, ~CR4_OSXSAVE),
)
FAULTS = {
    "fld1": (NM, NM, NM, NM, None, None),
    "fwait": (None, NM, None, NM, None, None),
    "emms": (UD, NM, NM, UD, None, None),
    "paddb": (UD, NM, NM, UD, None, None),
    "addps": (UD, NM, NM, UD, UD, None),
    "ldmxcsr": (UD, NM, NM, UD, UD, None),
    "cvtpi2ps": (UD, NM, NM, UD, UD, None),
    "vaddps": (None, NM, NM, NM, None, UD),
    "popcnt": (None,) * 6,
    "andn": (None,) * 6,
}


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("setting", range(len(SETTINGS)))
def test_the_fpu_is_there_as_the_control_registers_say(guest: Guest, name: str, setting: int) -> None:
    def change(context: Context) -> None:
        cr0, cr4 = SETTINGS[setting]
        context.sregs.cr0 = context.sregs.cr0 & ~(CR0_MP | CR0_EM | CR0_TS) | CR0_NE | cr0
        context.sregs.cr4 &= cr4 % (1 << 64)

    assert vector(guest, of(INSTRUCTIONS[name]), change) == FAULTS[name][setting]


@pytest.mark.parametrize(("xcr0", "expected"), [(1, UD), (3, UD), (7, None)])
def test_avx_needs_its_states_in_xcr0(guest: Guest, xcr0: int, expected: int | None) -> None:
    xcrs = guest.vcpu.get_state("XCRS")
    xcrs.xcrs[0].value = xcr0
    guest.vcpu.set_state("XCRS", xcrs)
    assert vector(guest, of(INSTRUCTIONS["vaddps"])) == expected
    assert vector(guest, of(INSTRUCTIONS["andn"])) is None


PENDING = b"\x7e\x03\x81\x80" + INITIAL[4:]
"""Invalid operation is unmasked, and has been raised."""


@pytest.mark.parametrize(
    ("name", "expected"),
    [("fld1", MF), ("fwait", MF), ("emms", MF), ("paddb", MF), ("cvtpi2ps", MF), ("addps", None), ("popcnt", None)],
)
def test_a_pending_x87_exception_meets_what_uses_its_registers(guest: Guest, name: str, expected: int | None) -> None:
    assert vector(guest, of(INSTRUCTIONS[name], xsave=PENDING)) == expected


def test_no_device_comes_before_a_pending_exception(guest: Guest) -> None:
    def switched(context: Context) -> None:
        context.sregs.cr0 |= CR0_TS

    assert vector(guest, of("d9e8", xsave=PENDING), switched) == NM


ZERO_DIVIDE_UNMASKED = INITIAL[:24] + (0x1F80 & ~(1 << 9)).to_bytes(4, "little") + INITIAL[28:]
DIVPS = "0f5e06"  # divps (%rsi), %xmm0
DIVIDEND = INITIAL[:160] + b"\0\0\x80\x3f" * 4 + INITIAL[176:]  # ones in xmm0


@pytest.mark.parametrize(("cr4", "expected"), [(CR4_OSXMMEXCPT, XM), (0, UD)])
def test_simd_exceptions_are_told_as_the_system_wants(guest: Guest, cr4: int, expected: int) -> None:
    """The flag stands in MXCSR; the destination is as it was."""

    def change(context: Context) -> None:
        context.sregs.cr4 = context.sregs.cr4 & ~CR4_OSXMMEXCPT | cr4

    xsave = DIVIDEND[:24] + ZERO_DIVIDE_UNMASKED[24:28] + DIVIDEND[28:]
    assert vector(guest, of(DIVPS, xsave=xsave), change) == expected
    assert mxcsr(guest) == 0x1D84
    assert vector(guest, of(DIVPS, xsave=DIVIDEND), change) is None
    assert mxcsr(guest) == 0x1F84


def test_reserved_bits_of_mxcsr_change_nothing(guest: Guest) -> None:
    raised = fault(guest, of("0fae16", (0x11F80).to_bytes(4, "little")))
    assert raised
    assert (raised.vector, raised.error_code) == (GP, 0)
    assert mxcsr(guest) == 0x1F80


# --- encodings ----------------------------------------------------------------------------------------------------

UNDEFINED = {
    "lock movups": "f00f1006",
    "lock popcnt": "f0f30fb8c1",
    "lock fld1": "f0d9e8",
    "lock fwait": "f09b",
    "movntps of registers": "0f2bc1",
    "lddqu of registers": "f20ff0c1",
    "pmovmskb of memory": "660fd706",
    "vmovups with a third operand": "c4e17010c1",
    "vmovd of 256 bits": "c5fd6ec1",
    "vzeroupper with a third operand": "c4e17077",
    "vpermq without W": "c4e37d00c100",
    "vpermilps with W": "c4e2f10cc1",
    "vperm2f128 of 128 bits": "c4e37106c100",
    "vbroadcastsd of 128 bits": "c4e2791906",
    "andn of 256 bits": "c4e274f2c1",
    "rorx with a third operand": "c4e373f0c101",
}


@pytest.mark.parametrize("name", UNDEFINED)
def test_forms_that_there_are_not_are_undefined(guest: Guest, name: str) -> None:
    """Natively they would end the process."""
    assert vector(guest, of(UNDEFINED[name])) == UD


def test_what_the_host_lacks_is_undefined(guest: Guest) -> None:
    context = guest.context(of("0f58c1"))
    row = find_row(TABLE, context.instruction)
    assert row is not None
    require(context, row)
    with pytest.raises(Fault) as raised:
        require(context, replace(row, feature="sse9"))
    assert raised.value.vector == UD


def test_a_host_without_xsave_executes_nothing_that_has_fpu_state(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "host_features", lambda: frozenset(("sse", "popcnt")))
    assert vector(guest, of(INSTRUCTIONS["popcnt"])) is None
    with pytest.raises(Refused, match="XSAVE"):
        run(guest, of(INSTRUCTIONS["addps"]))


def test_code_that_is_not_64_bit_is_refused(guest: Guest) -> None:
    """There the same bytes mean other registers, and other instructions."""

    def compatibility(context: Context) -> None:
        context.sregs.cs.l, context.sregs.cs.db = 0, 1
        context.instruction = decode(context.instruction.raw, bits=32)

    with pytest.raises(Refused, match="64-bit"):
        run(guest, of("0f58c1"), compatibility)

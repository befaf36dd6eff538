"""Completions of x87 instructions: opcodes D8 to DF, and FWAIT.

An opcode has eight instructions with a memory operand, by ModRM.reg; with registers, ModRM as a whole is part of the
opcode. Aliases that the manuals do not have are left out.

An unmasked exception is not raised by the instruction that finds it but by the next one that waits (`fpu.load`); so
also by a store, which then has stored nothing.

Source: Intel SDM vol. 2, appendix A.5 (the maps of these opcodes); vol. 1 §8.3.12 and §8.7 (waiting).
"""

from functools import partial

from kvmpy._shim import lib
from kvmpy.machine.assist import fpu
from kvmpy.machine.assist.context import NM, UD, Completion, Context, Fault
from kvmpy.machine.assist.decode import Instruction, OpcodeMap
from kvmpy.machine.assist.native import run_natively
from kvmpy.machine.assist.rows import Row

# By opcode, then by ModRM.reg: operands without those that are the x87 FPU's own, and the name.
MEMORY = """
D8 ,Md: fadd fmul fcom fcomp fsub fsubr fdiv fdivr
D9 ,Md: fld - - - - - - -
D9 Md,: - - fst fstp - - - -
D9 ,Menv: - - - - fldenv - - -
D9 ,Mw: - - - - - fldcw - -
D9 Menv,: - - - - - - fnstenv -
D9 Mw,: - - - - - - - fnstcw
DA ,Md: fiadd fimul ficom ficomp fisub fisubr fidiv fidivr
DB ,Md: fild - - - - - - -
DB Md,: - fisttp fist fistp - - - -
DB ,Mt: - - - - - fld - -
DB Mt,: - - - - - - - fstp
DC ,Mq: fadd fmul fcom fcomp fsub fsubr fdiv fdivr
DD ,Mq: fld - - - - - - -
DD Mq,: - fisttp fst fstp - - - -
DD ,Msave: - - - - frstor - - -
DD Msave,: - - - - - - fnsave -
DD Mw,: - - - - - - - fnstsw
DE ,Mw: fiadd fimul ficom ficomp fisub fisubr fidiv fidivr
DF ,Mw: fild - - - - - - -
DF Mw,: - fisttp fist fistp - - - -
DF ,Mt: - - - - fbld - - -
DF ,Mq: - - - - - fild - -
DF Mt,: - - - - - - fbstp -
DF Mq,: - - - - - - - fistp
"""

# By opcode and the first ModRM of a run of eight, which name a register, or of as many as there are names.
REGISTERS = """
D8 C0: fadd C8: fmul D0: fcom D8: fcomp E0: fsub E8: fsubr F0: fdiv F8: fdivr
D9 C0: fld C8: fxch
DA C0: fcmovb C8: fcmove D0: fcmovbe D8: fcmovu
DB C0: fcmovnb C8: fcmovne D0: fcmovnbe D8: fcmovnu E8: fucomi F0: fcomi
DC C0: fadd C8: fmul E0: fsubr E8: fsub F0: fdivr F8: fdiv
DD C0: ffree D0: fst D8: fstp E0: fucom E8: fucomp
DE C0: faddp C8: fmulp E0: fsubrp E8: fsubp F0: fdivrp F8: fdivp
DF E8: fucomip F0: fcomip
"""

SINGLE = """
D9 D0: fnop
D9 E0: fchs fabs
D9 E4: ftst fxam
D9 E8: fld1 fldl2t fldl2e fldpi fldlg2 fldln2 fldz
D9 F0: f2xm1 fyl2x fptan fpatan fxtract fprem1 fdecstp fincstp fprem fyl2xp1 fsqrt fsincos frndint fscale fsin fcos
DA E9: fucompp
DB E2: fnclex fninit
DE D9: fcompp
DF E0: fnstsw
"""

FWAIT = Row("fwait", ("F",), "fpu")
"""Its opcode, 9B, is not in the tables: it has no ModRM."""

_FEATURES = {"fisttp": "pni"}


def _parse_memory() -> dict[tuple[int, int], Row]:
    """Return the rows of `MEMORY` by opcode and ModRM.reg."""
    rows = {}
    for line in MEMORY.strip().splitlines():
        shape, _, names = line.partition(": ")
        opcode, operands = shape.split()
        letters = tuple(operand or "F" for operand in operands.split(","))
        for reg, name in enumerate(names.split()):
            if name != "-":
                rows[int(opcode, 16), reg] = Row(name, letters, _FEATURES.get(name, "fpu"), reg=reg)
    return rows


def _parse_registers() -> dict[tuple[int, int], Row]:
    """Return the rows of `REGISTERS` and `SINGLE` by opcode and ModRM."""
    rows = {}
    for line in REGISTERS.strip().splitlines():
        opcode, *runs = line.split()
        for first, name in zip(runs[::2], runs[1::2], strict=True):
            for modrm in range(int(first[:2], 16), int(first[:2], 16) + 8):
                feature = "cmov" if name.startswith("fcmov") or name.endswith(("comi", "comip")) else "fpu"
                rows[int(opcode, 16), modrm] = Row(name, ("F", "F"), feature)
    for line in SINGLE.strip().splitlines():
        opcode, first, *names = line.replace(":", "").split()
        for modrm, name in enumerate(names, int(first, 16)):
            rows[int(opcode, 16), modrm] = Row(name, ("F",), "fpu")
    return rows


OF_MEMORY, OF_REGISTERS = _parse_memory(), _parse_registers()


def find(instruction: Instruction) -> Completion | None:
    """Return how to complete ``instruction``, if it is one of these."""
    if instruction.map is not OpcodeMap.ONE or instruction.prefix not in (0, 0x66):
        return None
    if instruction.opcode == 0x9B:
        return Completion(FWAIT.name, _fwait)
    if instruction.modrm is None:
        return None
    if instruction.memory:
        row = OF_MEMORY.get((instruction.opcode, instruction.reg & 7))
    else:
        row = OF_REGISTERS.get((instruction.opcode, instruction.modrm))
    return Completion(row.name, partial(run_natively, row)) if row else None


def _fwait(context: Context) -> None:
    """Raise what is pending. Of CR0.TS it takes no notice without CR0.MP (Intel SDM vol. 3 §2.5)."""
    if context.instruction.lock:
        raise Fault(UD)
    cr0, both = context.sregs.cr0, lib.X86_CR0_MP | lib.X86_CR0_TS
    if cr0 & both == both:
        raise Fault(NM)
    if fpu.State(context, FWAIT).pending:
        fpu.raise_pending(context)

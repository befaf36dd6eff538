"""Completions of instructions on general registers: bit counts, BMI, CRC32, MOVBE, CMPXCHG16B, CLAC and STAC.

Source: Intel SDM vol. 2, the instructions' pages. LZCNT and TZCNT are BSR and BSF on a processor that lacks them.
"""

from functools import partial

from kvmpy.machine.assist.context import UD, Completion, Context, Fault
from kvmpy.machine.assist.decode import Instruction, OpcodeMap
from kvmpy.machine.assist.native import run_in_place, run_natively
from kvmpy.machine.assist.rows import find_row, parse

TABLE = parse(
    """
F3 0F G,Ev popcnt - -: B8 popcnt
F3 0F G,Ev * - -: BC tzcnt BD lzcnt
F2 0F38 G,Eb sse4_2 - -: F0 crc32
F2 0F38 G,Ev sse4_2 - -: F1 crc32
NP+66 0F38 G,Mv movbe - -: F0 movbe
NP+66 0F38 Mv,G movbe - -: F1 movbe
66 0F38 G,Ey adx - -: F6 adcx
F3 0F38 G,Ey adx - -: F6 adox
NP 0F38 G,B,Ey - bmi1 -: F2 andn
NP 0F38 B,Ey - bmi1 -: F3/1 blsr F3/2 blsmsk F3/3 blsi
NP 0F38 G,Ey,B - bmi1 -: F7 bextr
NP 0F38 G,Ey,B - bmi2 -: F5 bzhi
66 0F38 G,Ey,B - bmi2 -: F7 shlx
F3 0F38 G,Ey,B - bmi2 -: F7 sarx
F2 0F38 G,Ey,B - bmi2 -: F7 shrx
F3 0F38 G,B,Ey - bmi2 -: F5 pext
F2 0F38 G,B,Ey - bmi2 -: F5 pdep F6 mulx
F2 0F3A G,Ey - bmi2 -: F0 rorx
NP 0F38 My,G movdiri - -: F9 movdiri
NP+66 0F R rdrand - -: C7/6 rdrand
NP+66 0F R rdseed - -: C7/7 rdseed
66 0F -,Mb clwb - -: AE/6 clwb
NP 0F Mdq cx16 - - W1 LOCK: C7/1 cmpxchg16b
"""
)

EFLAGS_AC = 1 << 18

_OTHERS_WITH = ("cmpxchg16b", "clwb", "rdrand", "rdseed")
"""Their opcodes are those of other instructions too, in other forms."""


def find(instruction: Instruction) -> Completion | None:
    """Return how to complete ``instruction``, if it is one of these."""
    if instruction.map is OpcodeMap.TWO_0F and instruction.opcode == 0x01 and instruction.modrm in (0xCA, 0xCB):
        return Completion("stac" if instruction.modrm == 0xCB else "clac", _set_ac)
    row = find_row(TABLE, instruction)
    if row is None or (row.name in _OTHERS_WITH and not row.allows(instruction)):
        return None
    return Completion(row.name, partial(run_in_place if row.lockable else run_natively, row))


def _set_ac(context: Context) -> None:
    """CLAC and STAC: #UD unless at CPL 0, without LOCK, 66, F2 and F3."""
    instruction = context.instruction
    if context.cpl or instruction.lock or instruction.prefix:
        raise Fault(UD)
    on = instruction.modrm == 0xCB
    context.rflags = context.rflags & ~EFLAGS_AC | (EFLAGS_AC if on else 0)

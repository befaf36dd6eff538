"""Two ways to try a completion: on a vCPU that executes nothing (`AssistedBench.context`), where every state can be
had, and in a guest that runs (`AssistedBench.run`), where an ordinary host executes it all by itself.
"""

import struct
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from kvmpy._shim import ffi
from kvmpy.kvm import InternalError, Kvm, Vcpu
from kvmpy.machine.assist import Assist
from kvmpy.machine.assist.context import REGISTERS, Completion, Context, Fault
from kvmpy.machine.assist.decode import decode
from kvmpy.machine.assist.instruction import Instruction
from kvmpy.machine.assist.native import host_features
from kvmpy.machine.assist.xsave import CR4_OSXSAVE
from kvmpy.machine.probe import tables
from kvmpy.machine.probe.bench import Bench, Ended, Mode, Outcome, finish
from kvmpy.units import PAGE_SIZE

COMPONENTS = 0xE7 if "avx512f" in host_features() else 7 if "avx" in host_features() else 3
"""Those of XCR0 that processors have and guests get: x87, SSE, AVX, AVX-512."""
NUMBERS = {name: number for number, name in enumerate(REGISTERS)}


@cache
def assemble(text: str, bits: int = 64) -> bytes:
    """Return ``text``, one or more instructions of GNU assembler, as bytes."""
    with tempfile.TemporaryDirectory() as folder:
        made, flat = Path(folder) / "code.o", Path(folder) / "code.bin"
        subprocess.run(["as", "-o", made, "-"], input=f".code{bits}\n{text}\n".encode(), check=True)
        subprocess.run(["objcopy", "-O", "binary", "-j", ".text", made, flat], check=True)
        return flat.read_bytes()


class AssistedBench(Bench):
    """A probe's VM, in which what KVM cannot emulate is completed. Has one page more in its map, `map_page`."""

    def __init__(self, kvm: Kvm) -> None:
        super().__init__(kvm)
        self.assist = Assist(self.memory)

    def run(
        self,
        code: bytes | str,
        mode: Mode = Mode.CPL0,
        *,
        prepare: Callable[[Vcpu], None] = lambda vcpu: None,
        inspect: Callable[[Vcpu], object] = lambda vcpu: None,
        **registers: int,
    ) -> Outcome:
        """Run ``code`` to its end, as `Bench.run`; ``prepare`` has the vCPU before, ``inspect`` after it."""
        with self.start(as_bytes(code, mode), mode, **registers) as vcpu:
            prepare(vcpu)
            outcome = self.finish(vcpu)
            inspect(vcpu)
            return outcome

    def finish(self, vcpu: Vcpu) -> Outcome:
        """Run ``vcpu`` to its guest's end."""
        while True:
            outcome = finish(vcpu)
            match outcome:
                case Ended(exit=InternalError() as exit):
                    if self.assist.complete(vcpu, exit) is None:
                        return outcome
                case _:
                    return outcome

    def context(self, vcpu: Vcpu, code: bytes | str, *, cpl: int = 0, rflags: int = 2, **registers: int) -> Context:
        """Return the instruction ``code`` about to be completed on a vCPU that has not run. Sregs may be changed."""
        regs: Any = ffi.new("struct kvm_regs *")
        regs.rip, regs.rsp, regs.rflags = tables.CODE, tables.KERNEL_STACK, rflags
        for name, value in registers.items():
            setattr(regs, name, value)
        context = Context(vcpu, self.memory, regs, vcpu.get_sregs())
        context.sregs.ss.dpl = cpl
        context.instruction = decode(as_bytes(code, Mode.CPL0), bits=context.bits)
        return context

    def restore_tables(self) -> None:
        """Undo what a guest has done to its own tables."""
        tables.write_tables(self.memory)

    def map_page(self, linear: int, gpa: int, flags: int) -> None:
        """Map the page at ``linear`` (8 MiB to 10 MiB, where nothing else is) to ``gpa``; flags 0: it is not there."""
        directory, table = tables.PAGES_64 + 2 * PAGE_SIZE, 0x1F_F000
        assert 8 << 20 <= linear < 10 << 20
        self.memory.write(directory + 8 * (linear >> 21), struct.pack("<Q", table | 7))
        self.memory.write(table + 8 * (linear >> 12 & 511), struct.pack("<Q", gpa | flags))


def enable(vcpu: Vcpu, xcr0: int = COMPONENTS) -> None:
    """Let the guest use the XSAVE family, on the components of ``xcr0``."""
    with vcpu.edit_sregs() as sregs:
        sregs.cr4 |= CR4_OSXSAVE
    xcrs = vcpu.get_state("XCRS")
    xcrs.nr_xcrs, xcrs.xcrs[0].xcr, xcrs.xcrs[0].value = 1, 0, xcr0
    vcpu.set_state("XCRS", xcrs)


def as_bytes(code: bytes | str, mode: Mode) -> bytes:
    if isinstance(code, bytes):
        return code
    return assemble(code, {Mode.CPL0: 64, Mode.CPL3: 64, Mode.REAL: 16}.get(mode, 32))


def complete(find: Callable[[Instruction], Completion | None], context: Context) -> Fault | None:
    """Do it; return the fault that it raises."""
    completion = find(context.instruction)
    assert completion is not None, context.instruction.raw.hex()
    before = list(context.registers), context.rflags
    try:
        completion.run(context)
    except Fault as fault:
        assert (context.registers, context.rflags) == before, "a fault has changed something"
        return fault
    return None


def fault_of(find: Callable[[Instruction], Completion | None], context: Context) -> tuple[int, int | None] | None:
    """Do it; return vector and error code of the fault."""
    fault = complete(find, context)
    return (fault.vector, fault.error_code) if fault else None

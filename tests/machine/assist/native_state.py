"""The processor's state before and after one instruction, and two who execute it: a guest by our completions, and
`native_oracle.c` by the kernel's signal frames.

Both have the same 256 bytes at `MEMORY`, and the instruction at `CODE`.
"""

import os
import random
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvmpy._shim import ffi
from kvmpy.kvm import Vcpu
from kvmpy.machine.assist import context as contexts
from kvmpy.machine.assist.context import REGISTERS, Completion, Context, Fault
from kvmpy.machine.assist.decode import Instruction, decode
from kvmpy.machine.assist.native import STATUS_FLAGS, host_features
from kvmpy.machine.memory import GuestMemory

CAMPAIGN = 50 if os.environ.get("KVMPY_CAMPAIGN") == "1" else 1
SEED = int(os.environ.get("KVMPY_SEED", random.SystemRandom().randrange(1 << 32)))
SOURCE = Path(__file__).parent / "native_oracle.c"

CODE, MEMORY, MEMORY_SIZE = 0x12_0000, 0x10_1000, 256
XSAVE_SIZE = 2688
SIGILL, SIGTRAP, SIGBUS, SIGFPE, SIGSEGV = 4, 5, 7, 8, 11
COMPONENTS = 0xE7 if "avx512f" in host_features() else 7 if "avx" in host_features() else 3

INITIAL = (
    (0x37F).to_bytes(24, "little")  # the x87 control word
    + (0x1F80).to_bytes(488, "little")  # MXCSR
    + COMPONENTS.to_bytes(XSAVE_SIZE - 512, "little")  # XSTATE_BV
)
"""FPU state after FNINIT, in which all is zero and nothing is pending."""

_SIGNALS = {
    **dict.fromkeys((contexts.UD,), SIGILL),
    **dict.fromkeys((contexts.MF, contexts.XM), SIGFPE),
    **dict.fromkeys((contexts.GP, contexts.PF, contexts.SS), SIGSEGV),
    contexts.AC: SIGBUS,
}


def seeded() -> random.Random:
    """Return the random numbers of this run, from the beginning; pytest shows the seed when a test fails."""
    print(f"KVMPY_SEED={SEED}")
    return random.Random(SEED)


@dataclass(frozen=True)
class State:
    """What an instruction finds, or what it leaves: ``signal`` is SIGTRAP, or that of the fault which it raised."""

    code: bytes
    registers: tuple[int, ...] = (0,) * 16
    rflags: int = 0
    xsave: bytes = INITIAL
    memory: bytes = bytes(MEMORY_SIZE)
    signal: int = SIGTRAP

    def pack(self) -> bytes:
        numbers = b"".join(number.to_bytes(8, "little") for number in (*self.registers, self.rflags))
        return numbers + self.code.ljust(16, b"\xcc") + bytes(8) + self.xsave + self.memory

    def unpack(self, raw: bytes) -> "State":
        numbers = [int.from_bytes(raw[at : at + 8], "little") for at in range(0, 17 * 8, 8)]
        signal = int.from_bytes(raw[152:160], "little")
        xsave, memory = raw[160 : 160 + XSAVE_SIZE], raw[160 + XSAVE_SIZE :]
        return replace(
            self, registers=tuple(numbers[:16]), rflags=numbers[16], xsave=xsave, memory=memory, signal=signal
        )

    def differences(self, other: "State") -> list[str]:
        """Return where the two differ; the FPU state without its header and what software may use."""
        found = [
            f"{name}: {mine:#x} {theirs:#x}"
            for name, mine, theirs in zip(REGISTERS, self.registers, other.registers, strict=True)
            if mine != theirs
        ]
        for name in ("rflags", "signal"):
            if getattr(self, name) != getattr(other, name):
                found.append(f"{name}: {getattr(self, name):#x} {getattr(other, name):#x}")
        for name, start, end in (*_FPU_PARTS, ("memory", 0, MEMORY_SIZE)):
            mine, theirs = (state.memory if name == "memory" else state.xsave for state in (self, other))
            if mine[start:end] != theirs[start:end]:
                found.append(f"{name}: {mine[start:end].hex()} {theirs[start:end].hex()}")
        return found


_FPU_PARTS = (
    *(("fcw", 0, 2), ("fsw", 2, 4), ("ftw", 4, 5), ("fop", 6, 8), ("fip", 8, 16), ("fdp", 16, 24), ("mxcsr", 24, 28)),
    *((f"st{i}", 32 + 16 * i, 42 + 16 * i) for i in range(8)),
    *((f"xmm{i}", 160 + 16 * i, 176 + 16 * i) for i in range(16)),
    *((f"ymm{i}", 576 + 16 * i, 592 + 16 * i) for i in range(16)),
    ("avx512", 832, XSAVE_SIZE),
)


class Oracle:
    """The compiled `native_oracle.c`."""

    def __init__(self, folder: Path) -> None:
        self._program = folder / "native_oracle"
        subprocess.run(["gcc", "-O1", "-o", self._program, SOURCE], check=True)

    def run(self, states: Sequence[State]) -> list[State]:
        """Return what each of ``states`` becomes."""
        done = subprocess.run(
            [self._program], input=b"".join(state.pack() for state in states), capture_output=True, check=True
        )
        size = len(done.stdout) // len(states)
        return [state.unpack(done.stdout[size * i : size * (i + 1)]) for i, state in enumerate(states)]

    def compare(self, guest: "Guest", states: Sequence[State]) -> list[State]:
        """Assert that ``guest`` makes the same of all ``states``, and return what."""
        found = self.run(states)
        wrong = [
            f"{before.code.hex()}: {differences}"
            for before, expected in zip(states, found, strict=True)
            if (differences := guest.run(before).differences(expected))
        ]
        assert not wrong, "\n".join(wrong[:10])
        return found


@dataclass
class Guest:
    """A vCPU that executes nothing: only its state and its memory are used. ``find`` is the completions' own."""

    vcpu: Vcpu
    memory: GuestMemory
    find: Callable[[Instruction], Completion | None]

    def context(self, state: State) -> Context:
        """Return the instruction of ``state``, decoded, in a guest that is in that state."""
        xsave = self.vcpu.get_state("XSAVE")
        ffi.buffer(xsave)[:XSAVE_SIZE] = state.xsave
        self.vcpu.set_state("XSAVE", xsave)
        self.memory.write(MEMORY, state.memory)
        regs: Any = ffi.new("struct kvm_regs *")
        for name, value in zip(REGISTERS, state.registers, strict=True):
            setattr(regs, name, value)
        regs.rip, regs.rflags = CODE, 2 | state.rflags
        context = Context(self.vcpu, self.memory, regs, self.vcpu.get_sregs())
        context.instruction = decode(state.code, bits=context.bits)
        return context

    def run(self, state: State) -> State:
        """Return what ``state`` becomes by the completion."""
        context = self.context(state)
        completion = self.find(context.instruction)
        assert completion is not None, f"no completion of {state.code.hex()}"
        signal = SIGTRAP
        try:
            completion.run(context)
        except Fault as fault:
            signal = _SIGNALS[fault.vector]
        return replace(
            state,
            registers=tuple(context.registers),
            rflags=context.rflags & STATUS_FLAGS,
            xsave=self.xsave(),
            memory=self.memory.read(MEMORY, MEMORY_SIZE),
            signal=signal,
        )

    def xsave(self) -> bytes:
        """Return the FPU state that the vCPU has."""
        return bytes(ffi.buffer(self.vcpu.get_state("XSAVE")))[:XSAVE_SIZE]

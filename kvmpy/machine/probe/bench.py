"""A small VM in which probe guests run, each on a vCPU of its own, and how each of them ended.

A guest is a few bytes of code. Behind them the bench puts an OUT that reports EAX, and under it a handler for every
vector, so a guest ends in one of four ways: `Done`, `Trap`, `Hang`, or with an exit that neither made (`Ended`). It
always ends: the time it gets is bounded, and a signal takes it out of KVM_RUN.

Source: KVM API §5; Intel SDM vol. 3 §6 (vectors).
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Self

from kvmpy._shim import lib
from kvmpy.kvm import DeadlinePassed, Exit, InternalError, IoOut, Kvm, Shutdown, Vcpu
from kvmpy.kvm.cpuid_entry import CpuidEntry
from kvmpy.machine import layout, x86
from kvmpy.machine.memory import GuestMemory
from kvmpy.machine.probe import tables

CPU_SECONDS = 0.05
"""A guest that has used this much processor time hangs: a healthy one needs a hundredth of it."""
WALL_SECONDS = 1.0
"""A guest that waits for ever uses no processor; a busy host may give it little."""

# In 16-bit code the same bytes say %ax.
FINISH = bytes.fromhex(
    "e7f4"  # out %eax, $0xf4
)

EFER_SCE = 1 << 0  # system-call extensions (Intel SDM vol. 4, table 2-2)
EFLAGS_IOPL_3 = 3 << 12

_VECTOR_NAMES = {1: "#DB", 3: "#BP", 6: "#UD", 7: "#NM", 8: "#DF", 13: "#GP", 14: "#PF"}


class Mode(Enum):
    """How a guest starts. 32-bit code may turn paging on: CR3 points at tables of either kind."""

    REAL = "real mode"
    PROTECTED = "protected mode"
    PROTECTED_PAE = "protected mode, CR4.PAE set"
    CPL0 = "64-bit code at CPL0"
    CPL3 = "64-bit code at CPL3"


@dataclass(frozen=True, slots=True)
class Done:
    """The guest came to its end with ``value`` in EAX."""

    value: int


@dataclass(frozen=True, slots=True)
class Trap:
    """The guest's handler of ``vector`` was entered, at ``cpl``."""

    vector: int
    cpl: int = 0


@dataclass(frozen=True, slots=True)
class Hang:
    """The guest did not end in the time it had."""


@dataclass(frozen=True, slots=True)
class Ended:
    """KVM ended it with an exit of another kind."""

    exit: Exit


Outcome = Done | Trap | Hang | Ended


class Bench:
    """A VM with 2 MiB of RAM, the tables of `tables` in it, and an in-kernel irqchip.

    Raises:
        KvmError: the host refused a part of it.
    """

    def __init__(self, kvm: Kvm) -> None:
        self.kvm = kvm
        self.cpuid = kvm.get_supported_cpuid()
        self.vm = kvm.create_vm()
        # Held, so that closing the VM closes also those that a refused ioctl left open.
        self._vcpus: list[Vcpu] = []
        try:
            self.memory = GuestMemory(tables.RAM_SIZE)
        except BaseException:
            self.vm.close()
            raise
        try:
            self.vm.set_identity_map_addr(layout.IDENTITY_MAP)
            self.vm.set_tss_addr(layout.TSS)
            self.vm.create_irqchip()
            # Else KVM makes some failures of its emulator a #UD of the guest, and the cause is lost.
            if self.vm.check_extension(lib.KVM_CAP_EXIT_ON_EMULATION_FAILURE):
                self.vm.enable_cap(lib.KVM_CAP_EXIT_ON_EMULATION_FAILURE, 1)
            tables.write_tables(self.memory)
            self.memory.map_into(self.vm)
        except BaseException:
            self.close()
            raise

    def run(self, code: bytes, mode: Mode = Mode.CPL0, **registers: int) -> Outcome:
        """Run ``code`` on a new vCPU whose general ``registers`` are set, and return how it ended."""
        with self.start(code, mode, cpuid=(), **registers) as vcpu:
            return finish(vcpu)

    def start(self, code: bytes, mode: Mode = Mode.CPL0, *, cpuid: Sequence[CpuidEntry] = (), **registers: int) -> Vcpu:
        """Return a new vCPU that is about to execute ``code``; `finish` runs it. Close it before the next.

        RSI points at 4 KiB of data, which stay as they are. ``cpuid`` replaces what the host supports.
        """
        self.memory.write(tables.CODE, code + FINISH)
        vcpu = self.add_vcpu(cpuid)
        # Only the first processor of a board starts by itself.
        vcpu.set_mp_state(lib.KVM_MP_STATE_RUNNABLE)
        _START[mode](vcpu)
        user = mode is Mode.CPL3
        with vcpu.edit_regs() as regs:
            regs.rip, regs.rsi = tables.CODE, tables.DATA
            regs.rsp = tables.USER_STACK if user else tables.KERNEL_STACK
            regs.rflags = lib.X86_EFLAGS_FIXED | (EFLAGS_IOPL_3 if user else 0)
            for name, value in registers.items():
                setattr(regs, name, value)
        return vcpu

    def add_vcpu(self, cpuid: Sequence[CpuidEntry] = ()) -> Vcpu:
        """Return a new vCPU as KVM makes it."""
        vcpu = self.vm.create_vcpu(len(self._vcpus))
        self._vcpus.append(vcpu)
        vcpu.set_cpuid2(cpuid or self.cpuid)
        return vcpu

    def close(self) -> None:
        """Close the VM and its memory."""
        self.vm.close()
        self.memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def finish(vcpu: Vcpu) -> Outcome:
    """Run ``vcpu`` to its guest's end, or to the end of its time."""
    wall, cpu = time.monotonic(), time.thread_time()
    while True:
        vcpu.set_budget(timeout=CPU_SECONDS)
        match vcpu.next_exit():
            case IoOut(port=tables.DONE_PORT, data=data):
                return Done(int.from_bytes(data, "little"))
            case IoOut(port=tables.TRAP_PORT, data=data):
                sregs = vcpu.get_sregs()
                return Trap(data[0], sregs.cs.selector & 3)
            case DeadlinePassed():
                if time.thread_time() - cpu >= CPU_SECONDS / 2 or time.monotonic() - wall >= WALL_SECONDS:
                    return Hang()
            case other:
                return Ended(other)


def describe(outcome: Outcome) -> str:
    """Return what happened, for the detail of a finding."""
    match outcome:
        case Done(value=value):
            return f"gives 0x{value:x}"
        case Trap(vector=vector, cpl=cpl):
            name = _VECTOR_NAMES.get(vector, f"vector 0x{vector:x}")
            return f"raises {name}" + (f" at CPL{cpl}" if cpl else "")
        case Hang():
            return "hangs inside KVM_RUN until a signal ends it"
        case Ended(exit=InternalError(suberror=lib.KVM_INTERNAL_ERROR_EMULATION)):
            return "KVM cannot emulate it"
        case Ended(exit=Shutdown()):
            return "ends in a triple fault"
        case Ended(exit=exit):
            return f"ends in the exit {type(exit).__name__}"


# --- how each mode starts ---------------------------------------------------------------------------------------


def _start_real(vcpu: Vcpu) -> None:
    x86.real_mode(vcpu, tables.CODE)


def _start_protected(vcpu: Vcpu) -> None:
    x86.protected_mode(vcpu, tables.CODE)
    sregs = vcpu.get_sregs()
    sregs.cr3 = tables.PAGES_32
    sregs.gdt.base, sregs.idt.base, sregs.tr.base = tables.GDT_32, tables.IDT_32, tables.TSS
    sregs.idt.limit = 8 * tables.VECTORS - 1
    vcpu.set_sregs(sregs)


def _start_protected_pae(vcpu: Vcpu) -> None:
    _start_protected(vcpu)
    sregs = vcpu.get_sregs()
    sregs.cr3, sregs.cr4 = tables.PAGES_PAE, lib.X86_CR4_PAE
    vcpu.set_sregs(sregs)


def _start_long(vcpu: Vcpu) -> None:
    x86.long_mode(vcpu, tables.CODE)
    sregs = vcpu.get_sregs()
    sregs.cr0 |= lib.X86_CR0_MP | lib.X86_CR0_NE | lib.X86_CR0_WP
    sregs.cr3 = tables.PAGES_64
    sregs.cr4 |= lib.X86_CR4_OSFXSR | lib.X86_CR4_OSXMMEXCPT
    sregs.efer |= EFER_SCE
    sregs.gdt.base, sregs.idt.base, sregs.tr.base = tables.GDT_64, tables.IDT_64, tables.TSS
    sregs.gdt.limit, sregs.idt.limit = tables.USER_CODE + 7, 16 * tables.VECTORS - 1
    vcpu.set_sregs(sregs)


def _start_user(vcpu: Vcpu) -> None:
    _start_long(vcpu)
    sregs = vcpu.get_sregs()
    sregs.cs.selector, sregs.cs.dpl = tables.USER_CODE | 3, 3
    for register in (sregs.ss, sregs.ds, sregs.es):
        register.selector, register.dpl = tables.USER_DATA | 3, 3
    vcpu.set_sregs(sregs)


_START = {
    Mode.REAL: _start_real,
    Mode.PROTECTED: _start_protected,
    Mode.PROTECTED_PAE: _start_protected_pae,
    Mode.CPL0: _start_long,
    Mode.CPL3: _start_user,
}

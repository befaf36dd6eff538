"""What this host's KVM leaves undone, and who completes it: the way from an exit to `kvmpy.machine.assist`.

Most hosts leave nothing undone, and most guests would not notice; so nothing is imported and nothing is probed before
an exit says that there is something to do. The MSRs of SYSCALL are what makes it necessary to listen: a guest that
writes one of them may need our help with SYSCALL, which raises no exit by itself. The first such write asks the probe,
and where the host needs no help, it was the last that came to us.

Floor: machine.
"""

import threading
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from kvmpy._shim import ffi, lib
from kvmpy.errors import KvmError
from kvmpy.kvm import DeadlinePassed, Debug, Exit, InternalError, Vcpu, Vm, Wrmsr
from kvmpy.machine.memory import GuestMemory

if TYPE_CHECKING:
    from kvmpy.machine.assist import Assist

SYSCALL_MSRS = (0xC000_0081, 0xC000_0082, 0xC000_0084)
"""IA32_STAR, IA32_LSTAR, IA32_FMASK (Intel SDM vol. 4, table 2-2)."""
ADDRESS_SIZES = 0x8000_0008
"""The leaf of CPUID whose EAX 7:0 is the width of a physical address."""
FIRST_LOOK = 0.001
"""Seconds until it is first looked whether a vCPU is at a long string instruction."""
IN_C = ("int3", "clac", "stac", "syscall", "page_fault")
"""What C completes, too, and counts: fields of ``struct kvmpy_assist``."""


class Completer:
    """Completes what the KVM of ``vm`` leaves undone. ``finish_strings``: also what it does slowly (`assist.strings`).

    Raises:
        KvmError: the host refused to tell of MSR writes.
    """

    def __init__(self, vm: Vm, memory: GuestMemory) -> None:
        self.finish_strings = False
        self._vm, self._memory = vm, memory
        self._assist: Assist | None = None
        self._making = threading.Lock()
        # Without it the host's KVM turns some emulation failures into #UD for the guest, and we would not see them.
        if vm.check_extension(lib.KVM_CAP_EXIT_ON_EMULATION_FAILURE):
            vm.enable_cap(lib.KVM_CAP_EXIT_ON_EMULATION_FAILURE, 1)
        if vm.check_extension(lib.KVM_CAP_X86_MSR_FILTER):
            vm.enable_cap(lib.KVM_CAP_X86_USER_SPACE_MSR, lib.KVM_MSR_EXIT_REASON_FILTER)
            vm.filter_msr_writes(SYSCALL_MSRS)

    def attach(self, vcpu: Vcpu) -> None:
        """Let C complete on a new ``vcpu`` what it can."""
        vcpu.use_assist(ffi.new("struct kvmpy_assist *", {"memory": self._memory.table}))

    def begin(self, vcpu: Vcpu) -> None:
        """Take note that ``vcpu`` is about to run."""
        if self.finish_strings:
            vcpu.set_deadline(FIRST_LOOK)

    def complete(self, vcpu: Vcpu, exit: Exit) -> bool:
        """Complete what made ``exit``; False: it is something else, or nothing can be done. From the vCPU's thread."""
        match exit:
            case InternalError():
                return self.assist.complete(vcpu, exit) is not None
            case Debug():
                return self.assist.complete_debug(vcpu, exit) is not None
            case DeadlinePassed() if self.finish_strings:
                self.assist.look(vcpu)
                return True
            case Wrmsr(index=index, data=data) if index in SYSCALL_MSRS:
                self._write_syscall_msr(vcpu, index, data)
                return True
        return False

    def _write_syscall_msr(self, vcpu: Vcpu, index: int, data: int) -> None:
        try:
            vcpu.set_msrs({index: data})
        except KvmError:  # what no processor takes: #GP
            vcpu.reply_msr(None)
            return
        vcpu.reply_msr(data)
        if has_syscall():
            self._vm.filter_msr_writes(())
        else:
            self.assist.msr_written(vcpu, index, data)

    @property
    def assist(self) -> "Assist":
        """What completes; made when the first vCPU needs it."""
        with self._making:
            return self._made()

    def _made(self) -> "Assist":
        if self._assist is None:
            from kvmpy.machine.assist import Assist
            from kvmpy.machine.assist.context import MAX_PHYS_ADDR

            bits = next((e.eax & 0xFF for e in self._vm.kvm.get_supported_cpuid() if e.function == ADDRESS_SIZES), 0)
            self._assist = Assist(self._memory, max_phys_addr=bits or MAX_PHYS_ADDR)
        return self._assist

    def counts(self, vcpus: Iterable[Vcpu]) -> Counter[str]:
        """Return how often each thing was completed on ``vcpus``, by its name."""
        total = self._assist.counts() if self._assist is not None else Counter()
        for vcpu in vcpus:
            total.update({name.replace("_", " "): int(getattr(vcpu.assist, name)) for name in IN_C})
        return +total

    def refusal(self, vcpu_id: int | None) -> str:
        """Return why the last exit of a vCPU could not be completed, or nothing."""
        return self._assist.refusal(vcpu_id) if self._assist is not None else ""


def has_syscall() -> bool:
    """Tell whether SYSCALL from CPL 3 reaches ring 0 on this host."""
    from kvmpy.machine.probe import has

    return has("syscall-cpl3")

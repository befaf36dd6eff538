"""Seeing that a guest has halted for ever: every vCPU in HLT with interrupts off, or never started.

With the irqchip in the kernel, HLT does not exit: such a guest looks like one that waits. When the counts of exits
stand still, each vCPU is asked; the looks become rarer while the guest is busy.
"""

from kvmpy._shim import lib
from kvmpy.kvm import Vcpu
from kvmpy.machine.machine import End, EndReason, Machine

FIRST_INTERVAL = 0.1  # seconds
LONGEST_INTERVAL = 2.0


class HaltWatch:
    """Looks at ``machine`` when `look` is called, about every `interval` seconds."""

    def __init__(self, machine: Machine) -> None:
        self.interval = FIRST_INTERVAL
        self._machine = machine
        self._exits = -1

    def look(self) -> None:
        """End the run if no vCPU can ever go on."""
        exits = self._machine.exits_total()
        if exits != self._exits:
            self._exits = exits
            return
        self.interval = min(2 * self.interval, LONGEST_INTERVAL)
        try:
            stuck = all(thread.call(cannot_wake) for thread in self._machine.threads)
        except RuntimeError:  # a thread ended meanwhile: so did the run
            return
        if stuck:
            self._machine.finish(End(EndReason.HALTED, vcpu_id=0))


def cannot_wake(vcpu: Vcpu) -> bool:
    """Tell whether a vCPU is halted with interrupts off, or waits for another to start it."""
    state = vcpu.get_mp_state()
    if state == lib.KVM_MP_STATE_HALTED:
        return not vcpu.get_regs().rflags & lib.X86_EFLAGS_IF
    return state in (lib.KVM_MP_STATE_UNINITIALIZED, lib.KVM_MP_STATE_INIT_RECEIVED)

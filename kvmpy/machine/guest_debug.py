"""The one owner of what KVM_SET_GUEST_DEBUG is asked for: breakpoints of several parties on one vCPU.

KVM takes the whole wish at each call, so somebody must hold it: the assist of SYSCALL (`assist.syscall`) has slot 0,
whoever debugs a guest the other three.

Source: KVM API §4.87; Intel SDM vol. 3 §18.2 (DR7). Floor: machine.
"""

from kvmpy._shim import lib
from kvmpy.kvm import Vcpu

ASSIST_SLOT = 0
SLOTS = 4

DR7_FIXED = 1 << 10
DR6_BS = 1 << 14
"""In DR6: a single step."""


class GuestDebug:
    """What one vCPU shall stop at. To be used from the vCPU's thread, between two exits."""

    def __init__(self, vcpu: Vcpu) -> None:
        self._vcpu = vcpu
        self._breakpoints: dict[int, int] = {}
        self._stepping = False

    def breakpoint(self, slot: int) -> int | None:
        """Return the linear address at which ``slot`` stops, or None."""
        return self._breakpoints.get(slot)

    def set_breakpoint(self, slot: int, linear: int | None) -> None:
        """Stop before the instruction at ``linear``, or no more. Raises KvmError."""
        if self._breakpoints.get(slot) == linear:
            return
        if linear is None:
            del self._breakpoints[slot]
        else:
            self._breakpoints[slot] = linear
        self._apply()

    def step(self, on: bool) -> None:
        """Stop after each instruction, with the breakpoints out of force; or no more. Raises KvmError."""
        if self._stepping != on:
            self._stepping = on
            self._apply()

    @property
    def stepping(self) -> bool:
        """Whether the vCPU stops after each instruction."""
        return self._stepping

    def _apply(self) -> None:
        registers, control = [0] * 8, 0
        if self._stepping:
            control = lib.KVM_GUESTDBG_ENABLE | lib.KVM_GUESTDBG_SINGLESTEP
        elif self._breakpoints:
            control = lib.KVM_GUESTDBG_ENABLE | lib.KVM_GUESTDBG_USE_HW_BP
            registers[7] = DR7_FIXED
            for slot, linear in self._breakpoints.items():
                registers[slot] = linear
                registers[7] |= 2 << 2 * slot  # for all tasks; kind 0 is execution
        self._vcpu.set_guest_debug(control, registers)

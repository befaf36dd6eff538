"""The shapes of the register structures, for the type checker: what the cffi objects of the kernel's structs have.

Source: <asm/kvm.h>, `struct kvm_regs`, `struct kvm_sregs`; Intel SDM vol. 3 §3.4.5 (segment descriptors).
"""

from typing import NamedTuple, Protocol


class Regs(Protocol):
    """General registers, 64 bits each."""

    rax: int
    rbx: int
    rcx: int
    rdx: int
    rsi: int
    rdi: int
    rsp: int
    rbp: int
    r8: int
    r9: int
    r10: int
    r11: int
    r12: int
    r13: int
    r14: int
    r15: int
    rip: int
    rflags: int


class Segment(Protocol):
    """A segment register with its hidden part. ``limit`` is in bytes, whatever ``g`` says."""

    base: int
    limit: int
    selector: int
    type: int
    present: int
    dpl: int
    db: int
    s: int
    l: int  # noqa: E741  (the SDM's own name)
    g: int
    avl: int
    unusable: int


class Dtable(Protocol):
    """GDTR or IDTR."""

    base: int
    limit: int


class Sregs(Protocol):
    """Segment, control and system registers."""

    cs: Segment
    ds: Segment
    es: Segment
    fs: Segment
    gs: Segment
    ss: Segment
    tr: Segment
    ldt: Segment
    gdt: Dtable
    idt: Dtable
    cr0: int
    cr2: int
    cr3: int
    cr4: int
    cr8: int
    efer: int
    apic_base: int


GENERAL_REGISTERS = tuple(Regs.__annotations__)
"""The fields of `Regs`, in the kernel's order."""

SEGMENT_REGISTERS = ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")
"""The segment registers of `Sregs`."""

STATES = {
    "FPU": "struct kvm_fpu",
    "LAPIC": "struct kvm_lapic_state",
    "VCPU_EVENTS": "struct kvm_vcpu_events",
    "DEBUGREGS": "struct kvm_debugregs",
    "XSAVE": "struct kvm_xsave",
    "XCRS": "struct kvm_xcrs",
}
"""The structures of `Vcpu.get_state`, by the names of their ioctls."""


class Translation(NamedTuple):
    """What a guest virtual address means to the MMU."""

    physical_address: int
    valid: bool
    writeable: bool

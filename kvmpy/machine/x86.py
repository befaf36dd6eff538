"""The three ways to start an x86 processor, in the state registers of a vCPU, step by step.

Each function leaves a vCPU that executes at ``entry`` with interrupts off. No descriptor table needs to be in guest
memory for that: KVM_SET_SREGS fills the hidden parts of the segment registers, which is what the processor uses. A
guest that reloads a segment register reads the GDT, so `write_boot_tables` puts one where GDTR points.

Source: Intel SDM vol. 3 §3.4 (segments), §4.5 (4-level paging), §10.9 (mode switching), §20.1 (real mode).
"""

from kvmpy._shim import lib
from kvmpy.kvm import Vcpu
from kvmpy.kvm.state import Segment, Sregs
from kvmpy.machine import layout
from kvmpy.machine.memory import GuestMemory
from kvmpy.units import PAGE_SIZE, GiB, MiB

# EFER has no header that user space may include (Intel SDM vol. 4, table 2-2, IA32_EFER).
EFER_LME = 1 << 8
EFER_LMA = 1 << 10

# Segment types (Intel SDM vol. 3, table 3-1 and 3-2): both already marked accessed or busy, as after a load.
CODE = 0xB
DATA = 0x3
BUSY_TSS = 0xB

# Page-table entry bits (Intel SDM vol. 3, table 4-15 and following).
PRESENT, WRITABLE, USER, PAGE_SIZE_BIT = 1 << 0, 1 << 1, 1 << 2, 1 << 7

CODE_SELECTOR, DATA_SELECTOR, TSS_SELECTOR = 0x10, 0x18, 0x20

_FLAT_LIMIT = 0xFFFF_FFFF
# Access byte | flags << 8 of the flat descriptors (Intel SDM vol. 3, figure 3-8): present, type, granularity.
_CODE32, _CODE64, _DATA32 = 0xC09B, 0xA09B, 0xC093
_TSS32 = 0x008B


def real_mode(vcpu: Vcpu, entry: int, *, segment: int = 0) -> None:
    """Start in real mode at cs:ip = ``segment``:``entry``, all other segments zero. 16-bit offset."""
    sregs = vcpu.get_sregs()
    for register in (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss):
        _set_segment(register, selector=0, base=0, limit=0xFFFF, type=DATA)
    _set_segment(sregs.cs, selector=segment, base=segment << 4, limit=0xFFFF, type=CODE)
    sregs.cr0 &= ~(lib.X86_CR0_PE | lib.X86_CR0_PG)
    sregs.cr4 = sregs.efer = 0
    sregs.idt.base, sregs.idt.limit = 0, 0x3FF
    vcpu.set_sregs(sregs)
    _start(vcpu, entry)


def protected_mode(vcpu: Vcpu, entry: int) -> None:
    """Start in 32-bit protected mode at ``entry``: flat segments of 4 GiB, paging off."""
    sregs = vcpu.get_sregs()
    _protected_segments(sregs)
    sregs.cr0 = lib.X86_CR0_PE | lib.X86_CR0_ET
    sregs.cr3 = sregs.cr4 = sregs.efer = 0
    vcpu.set_sregs(sregs)
    _start(vcpu, entry)


def long_mode(vcpu: Vcpu, entry: int) -> None:
    """Start in 64-bit mode at ``entry``, CPL 0, on the 1:1 page tables of `write_boot_tables`."""
    sregs = vcpu.get_sregs()
    _protected_segments(sregs)
    sregs.cs.l, sregs.cs.db = 1, 0
    # The order a guest would go: PAE, the table, LME, and PG, upon which the processor sets LMA.
    sregs.cr4 = lib.X86_CR4_PAE
    sregs.cr3 = layout.BOOT_PAGE_TABLES
    sregs.efer = EFER_LME | EFER_LMA
    sregs.cr0 = lib.X86_CR0_PE | lib.X86_CR0_ET | lib.X86_CR0_PG
    vcpu.set_sregs(sregs)
    _start(vcpu, entry)


def write_boot_tables(memory: GuestMemory, *, long: bool) -> None:
    """Write the boot GDT, and for long mode page tables that map the first 4 GiB 1:1 in pages of 2 MiB."""
    code = _CODE64 if long else _CODE32
    descriptors = (0, 0, _descriptor(_FLAT_LIMIT, code), _descriptor(_FLAT_LIMIT, _DATA32), _descriptor(0x67, _TSS32))
    memory.write(layout.BOOT_GDT, b"".join(d.to_bytes(8, "little") for d in descriptors))
    if long:
        memory.write(layout.BOOT_PAGE_TABLES, page_tables(layout.BOOT_PAGE_TABLES))


def page_tables(gpa: int) -> bytes:
    """Return six pages for ``gpa``: PML4, PDPT and four page directories that map 4 GiB 1:1, writable, CPL 0."""
    flags = PRESENT | WRITABLE
    pml4, pdpt = [gpa + PAGE_SIZE | flags], [gpa + (2 + i) * PAGE_SIZE | flags for i in range(4)]
    directories = [at | flags | PAGE_SIZE_BIT for at in range(0, 4 * GiB, 2 * MiB)]
    return b"".join(_table(entries) for entries in (pml4, pdpt)) + _table(directories)


def _table(entries: list[int]) -> bytes:
    raw = b"".join(entry.to_bytes(8, "little") for entry in entries)
    return raw + bytes(-len(raw) % PAGE_SIZE)


def _descriptor(limit: int, access_and_flags: int) -> int:
    """Pack a segment descriptor of base 0; ``limit`` in bytes (Intel SDM vol. 3, figure 3-8)."""
    granular = access_and_flags >> 8 & 0x80
    units = limit >> 12 if granular else limit
    return (units & 0xFFFF) | (access_and_flags & 0xF0FF) << 40 | (units >> 16) << 48


def _protected_segments(sregs: Sregs) -> None:
    _set_segment(sregs.cs, selector=CODE_SELECTOR, limit=_FLAT_LIMIT, type=CODE, db=1, g=1)
    for register in (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss):
        _set_segment(register, selector=DATA_SELECTOR, limit=_FLAT_LIMIT, type=DATA, db=1, g=1)
    _set_segment(sregs.tr, selector=TSS_SELECTOR, limit=0x67, type=BUSY_TSS, s=0)
    sregs.gdt.base, sregs.gdt.limit = layout.BOOT_GDT, 5 * 8 - 1
    sregs.idt.base, sregs.idt.limit = 0, 0


def _set_segment(
    register: Segment, *, selector: int, limit: int, type: int, base: int = 0, s: int = 1, db: int = 0, g: int = 0
) -> None:
    register.selector, register.base, register.limit = selector, base, limit
    register.type, register.s, register.db, register.g = type, s, db, g
    register.present, register.dpl, register.l, register.avl, register.unusable = 1, 0, 0, 0, 0


def _start(vcpu: Vcpu, entry: int) -> None:
    with vcpu.edit_regs() as regs:
        regs.rip = entry
        regs.rflags = lib.X86_EFLAGS_FIXED

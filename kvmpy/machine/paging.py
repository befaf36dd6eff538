"""Linear addresses to guest physical addresses: the guest's page tables, walked as the processor walks them.

What a linear address is made of, and which tables it goes through (Intel SDM vol. 3 §4.2 to §4.5)::

    4 levels  63..48 sign  | 47..39 PML4 | 38..30 PDPT | 29..21 PD | 20..12 PT | 11..0 offset      9 bits each
    5 levels  63..57 sign  | 56..48 PML5 | 47..39 PML4 | ... the same
    PAE                                    31..30 PDPT | 29..21 PD | 20..12 PT | 11..0 offset      8-byte entries
    32-bit                                               31..22 PD | 21..12 PT | 11..0 offset      4-byte entries

An entry of 8 bytes (§4.5.5, tables 4-15 to 4-20), M is MAXPHYADDR::

     63   62        52 51      M M-1                    12 11   9  8   7   6   5   4   3   2   1   0
    +----+------------+---------+-------------------------+-------+---+----+---+---+---+---+---+---+---+
    | XD |  ignored   |    0    |  table, or 4 KiB page   |ignored| G | PS | D | A |PCD|PWT|U/S|R/W| P |
    +----+------------+---------+-------------------------+-------+---+----+---+---+---+---+---+---+---+
      PS in a PD entry: a page of 2 MiB, bits 20..13 are 0; in a PDPT entry: of 1 GiB, bits 29..13 are 0 (bit 12: PAT)
      PS in a PML4 or PML5 entry is reserved; XD is reserved while EFER.NXE is 0
      PAE: bits 62..52 are 0; the four PDPT entries have no rights: bits 2..1, 8..5 and 63..M are 0

An entry of 4 bytes (§4.3, tables 4-4 to 4-6), a page of 4 MiB while CR4.PSE is 1; R is min(M, 40) - 32::

     31                22 21  13+R 12+R   13 12  11   9  8   7   6   5   4   3   2   1   0
    +--------------------+--------+--------+----+-------+---+----+---+---+---+---+---+---+---+
    | address 31..22     |   0    | 32+R-1 | PAT|ignored| G | 1  | D | A |PCD|PWT|U/S|R/W| P |
    |                    |        |  ..32  |    |       |   |    |   |   |   |   |   |   |   |
    +--------------------+--------+--------+----+-------+---+----+---+---+---+---+---+---+---+

Not looked at: protection keys, shadow stacks, linear-address masking. Pages of 1 GiB are taken for supported.

The tables are the guest's, which may change them during the walk. A walk reads at most five entries, wherever they
point.

Floor: machine.
"""

from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

from kvmpy._shim import ffi, lib
from kvmpy.errors import GuestMemoryError
from kvmpy.machine import x86
from kvmpy.machine.memory import GuestMemory

# Bits of an entry that x86.py does not need (Intel SDM vol. 3, table 4-20).
ACCESSED, DIRTY = 1 << 5, 1 << 6
EXECUTE_DISABLE = 1 << 63

# Control registers (Intel SDM vol. 3 §2.5), EFER (§2.2.1), RFLAGS (§2.3).
CR4_PSE, CR4_LA57, CR4_SMEP, CR4_SMAP = 1 << 4, 1 << 12, 1 << 20, 1 << 21
EFER_NXE = 1 << 11
RFLAGS_AC = 1 << 18

# Error code of a page fault (Intel SDM vol. 3, figure 4-12).
FAULT_PROTECTION, FAULT_WRITE, FAULT_USER, FAULT_RESERVED, FAULT_FETCH = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 4


class Paging(NamedTuple):
    """What translation depends on: control registers, RFLAGS (AC), and MAXPHYADDR (CPUID 0x80000008)."""

    cr0: int
    cr3: int
    cr4: int
    efer: int
    rflags: int
    max_phys_addr: int = 52


class PageFault(Exception):
    """The access raises #PF: ``address`` is CR2, ``error_code`` as Intel SDM vol. 3 §4.7 has it."""

    def __init__(self, address: int, error_code: int) -> None:
        super().__init__(f"page fault at 0x{address:x}, error code 0x{error_code:x}")
        self.address, self.error_code = address, error_code


class PageUnsupported(ValueError):
    """No translation is defined: the address is not canonical, or the tables change again and again."""


class Step(NamedTuple):
    """One entry that a walk read. ``level`` 1 is the page table, 5 the PML5; ``gpa`` is where the entry is."""

    level: int
    gpa: int
    entry: int


class _Format(NamedTuple):
    """What the tables of a paging mode have in common."""

    levels: int
    index_bits: int
    entry_size: int
    linear_bits: int


_32_BIT = _Format(levels=2, index_bits=10, entry_size=4, linear_bits=32)
_PAE = _Format(levels=3, index_bits=9, entry_size=8, linear_bits=32)
_4_LEVEL = _Format(levels=4, index_bits=9, entry_size=8, linear_bits=48)
_5_LEVEL = _Format(levels=5, index_bits=9, entry_size=8, linear_bits=57)

_ATTEMPTS = 16
"""So often a walk is begun again because the guest changed an entry; a second time is rare already."""


def translate(
    memory: GuestMemory, paging: Paging, linear: int, *, write: bool = False, fetch: bool = False, user: bool = False
) -> int:
    """Return the guest physical address of ``linear``, and set accessed and dirty bits as the access does.

    Without ``user`` it is a supervisor-mode access. What the address leads to need not be RAM.

    Raises:
        PageFault: the access is not allowed. No table has changed.
        GuestMemoryError: a table is outside RAM.
        PageUnsupported: see there.
    """
    if not paging.cr0 & lib.X86_CR0_PG:
        return linear & 0xFFFF_FFFF
    for _ in range(_ATTEMPTS):
        steps = tuple(_steps(memory, paging, linear))
        error_code = _refusal(paging, steps, write=write, fetch=fetch, user=user)
        if error_code is not None:
            raise PageFault(linear, error_code)
        if _mark_used(memory, paging, steps, write=write):
            return _address(paging, steps[-1], linear)
    raise PageUnsupported(f"the page tables of 0x{linear:x} change during the walk")


def walk(memory: GuestMemory, paging: Paging, linear: int) -> tuple[Step, ...]:
    """Return the entries that lead to ``linear``, as far as there are any; nothing is set."""
    steps: list[Step] = []
    if not paging.cr0 & lib.X86_CR0_PG:
        return ()
    with suppress(GuestMemoryError, PageUnsupported):
        steps.extend(_steps(memory, paging, linear))
    return tuple(steps)


def _format(paging: Paging) -> _Format:
    """Return the paging mode (Intel SDM vol. 3 §4.1.1)."""
    if not paging.cr4 & lib.X86_CR4_PAE:
        return _32_BIT
    if not paging.efer & x86.EFER_LMA:
        return _PAE
    return _5_LEVEL if paging.cr4 & CR4_LA57 else _4_LEVEL


def _steps(memory: GuestMemory, paging: Paging, linear: int) -> Iterator[Step]:
    """Read entries down to the page, or to one that is not present or has reserved bits set."""
    format = _format(paging)
    if format.linear_bits > 32:
        if not _is_canonical(linear, format.linear_bits):
            raise PageUnsupported(f"0x{linear:x} is not canonical")
        table = paging.cr3 & _mask(paging.max_phys_addr) & ~0xFFF
    else:
        table = paging.cr3 & (0xFFFF_FFE0 if format is _PAE else 0xFFFF_F000)
    for level in range(format.levels, 0, -1):
        index = (linear & _mask(format.linear_bits)) >> _shift(format, level) & _mask(format.index_bits)
        gpa = table + index * format.entry_size
        entry = int.from_bytes(memory.read(gpa, format.entry_size), "little")
        yield Step(level, gpa, entry)
        if not entry & x86.PRESENT or _reserved(paging, format, level, entry) or _is_page(paging, level, entry):
            return
        table = entry & _mask(paging.max_phys_addr) & ~0xFFF


def _is_page(paging: Paging, level: int, entry: int) -> bool:
    """Tell whether the entry maps a page. PS means one at levels 2 and 3; PAE has none of 1 GiB: reserved there."""
    if level == 1:
        return True
    if _format(paging) is _32_BIT and not paging.cr4 & CR4_PSE:
        return False
    return level in (2, 3) and bool(entry & x86.PAGE_SIZE_BIT)


def _reserved(paging: Paging, format: _Format, level: int, entry: int) -> int:
    """Return the reserved bits that are set."""
    page = level > 1 and _is_page(paging, level, entry)
    if format is _32_BIT:
        # PSE-36: bits 32 and up of the address are at 13 (Intel SDM vol. 3, table 4-4).
        high_bits = max(min(paging.max_phys_addr, 40) - 32, 0)
        return entry & _range(13 + high_bits, 21) if page else 0
    reserved = _range(paging.max_phys_addr, 51)
    if not paging.efer & EFER_NXE:
        reserved |= EXECUTE_DISABLE
    if format is _PAE:
        reserved |= _range(52, 62)
        if level == 3:
            return entry & (reserved | EXECUTE_DISABLE | _range(5, 8) | _range(1, 2))
    if level > 3:
        reserved |= x86.PAGE_SIZE_BIT
    if page:
        reserved |= _range(13, _shift(format, level) - 1)
    return entry & reserved


def _refusal(paging: Paging, steps: tuple[Step, ...], *, write: bool, fetch: bool, user: bool) -> int | None:
    """Return the error code of the page fault, or None where the access is allowed (Intel SDM vol. 3 §4.6, §4.7)."""
    format, last = _format(paging), steps[-1]
    execute_disable = format.entry_size == 8 and bool(paging.efer & EFER_NXE)
    code = FAULT_WRITE * write | FAULT_USER * user
    if fetch and (execute_disable or paging.cr4 & CR4_SMEP):
        code |= FAULT_FETCH
    if not last.entry & x86.PRESENT:
        return code
    code |= FAULT_PROTECTION
    if _reserved(paging, format, last.level, last.entry):
        return code | FAULT_RESERVED
    with_rights = [step.entry for step in steps if not (format is _PAE and step.level == 3)]
    user_page = all(entry & x86.USER for entry in with_rights)
    writable = all(entry & x86.WRITABLE for entry in with_rights)
    if fetch and any(entry & EXECUTE_DISABLE for entry in with_rights):  # reserved without EFER.NXE
        return code
    if user:
        return None if user_page and (writable or not write) else code
    if write and not writable and paging.cr0 & lib.X86_CR0_WP:
        return code
    if user_page:
        if fetch:
            return code if paging.cr4 & CR4_SMEP else None
        if paging.cr4 & CR4_SMAP and not paging.rflags & RFLAGS_AC:
            return code
    return None


def _address(paging: Paging, page: Step, linear: int) -> int:
    """Return where ``linear`` is in the page that the entry maps."""
    format = _format(paging)
    size = 1 << _shift(format, page.level)
    base = page.entry & _mask(paging.max_phys_addr) & ~(size - 1)
    if format is _32_BIT and page.level == 2:
        base |= (page.entry >> 13 & 0xFF) << 32
    return base | linear & (size - 1)


def _mark_used(memory: GuestMemory, paging: Paging, steps: tuple[Step, ...], *, write: bool) -> bool:
    """Set A in each entry, and D in the last if it is written to (Intel SDM vol. 3 §4.8).

    Returns False where an entry is no longer what the walk read.
    """
    for step in steps:
        if _format(paging) is _PAE and step.level == 3:
            continue
        bits = ACCESSED | (DIRTY if write and step is steps[-1] else 0)
        if step.entry & bits != bits and not _set_bits(memory, step, bits, _format(paging).entry_size):
            return False
    return True


def _set_bits(memory: GuestMemory, step: Step, bits: int, entry_size: int) -> bool:
    """Set ``bits`` in the entry, unless another vCPU has changed it since it was read; tell whether they are set."""
    word = step.gpa & ~7  # of which a 4-byte entry is one half
    shift = 8 * (step.gpa - word)
    now = int.from_bytes(memory.read(word, 8), "little")
    if ((now >> shift & _mask(8 * entry_size)) ^ step.entry) & ~(ACCESSED | DIRTY):
        return False
    region = memory.region_at(word, 8)
    return bool(lib.kvmpy_exchange(ffi.cast("uint64_t *", region.hva + word - region.gpa), now, now | bits << shift))


def _is_canonical(linear: int, bits: int) -> bool:
    return linear >> (bits - 1) in (0, _mask(64 - bits + 1))


def _shift(format: _Format, level: int) -> int:
    return 12 + format.index_bits * (level - 1)


def _mask(bits: int) -> int:
    return (1 << bits) - 1


def _range(first: int, last: int) -> int:
    """Return bits ``first`` to ``last`` set; none where ``last`` is lower."""
    return _mask(last + 1) & ~_mask(first)

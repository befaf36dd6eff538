"""What a probe guest finds in its memory: page tables, descriptor tables, and a handler for every vector.

::

    0x0000  real-mode vectors, 256 x 4 bytes
    0x1000  the guest's code
    0x2000  handlers, 256 x 8 bytes: each says its number on TRAP_PORT
    0x3000  IDT of 64-bit code        0x4000  IDT of 32-bit code
    0x5000  GDT of 64-bit code        0x5100  GDT of 32-bit code       0x5200  TSS
    0x6000  4-level page tables, 3 pages: the first 16 MiB, 1:1, user
    0x9000  2-level page tables, 2 pages: the first 4 MiB, 1:1
    0xb000  PAE page tables, 2 pages: the first 2 MiB, 1:1
    0xe000  stack of CPL 0 (grows down)       0xf000  stack of CPL 3
    0x10000 data      0x11000 where an application processor starts

The selectors are those of `x86` (code 0x10, data 0x18, TSS 0x20), and two more for CPL 3.

Source: Intel SDM vol. 3 §3.4.5 (segments), §4 (paging), §6.10 to §6.14 (IDT), §7.2.1 and §7.7 (TSS).
"""

from kvmpy.machine import x86
from kvmpy.machine.memory import GuestMemory
from kvmpy.units import MiB

CODE, HANDLERS = 0x1000, 0x2000
IDT_64, IDT_32, GDT_64, GDT_32, TSS = 0x3000, 0x4000, 0x5000, 0x5100, 0x5200
PAGES_64, PAGES_32, PAGES_PAE = 0x6000, 0x9000, 0xB000
KERNEL_STACK, USER_STACK = 0xE000, 0xF000
DATA, AP_CODE = 0x10000, 0x11000

RAM_SIZE = 2 * MiB
MAPPED_64 = 16 * MiB

USER_DATA, USER_CODE = 0x30, 0x38
VECTORS = 256
DONE_PORT, TRAP_PORT = 0xF4, 0xF5

# Flat descriptors whole, as SDM vol. 3 figure 3-8 draws them; DPL 0 and DPL 3.
_CODE_32, _DATA_0 = 0x00CF9B000000FFFF, 0x00CF93000000FFFF
_CODE_64_0, _CODE_64_3, _DATA_3 = 0x00AF9B000000FFFF, 0x00AFFB000000FFFF, 0x00CFF3000000FFFF
_TSS_LIMIT = 0x67
_BUSY_TSS = 0x8B00_0000_0000 | _TSS_LIMIT | (TSS & 0xFFFFFF) << 16
_INTERRUPT_GATE = 0x8E
_DPL_3 = 0x60


def write_tables(memory: GuestMemory) -> None:
    """Write all of it but code and data."""
    memory.write(0, b"".join(_word(_handler(v), 2) + _word(0, 2) for v in range(VECTORS)))
    memory.write(HANDLERS, b"".join(_handler_code(v) for v in range(VECTORS)))
    memory.write(IDT_64, b"".join(_gate(v) + bytes(8) for v in range(VECTORS)))
    memory.write(IDT_32, b"".join(_gate(v) for v in range(VECTORS)))
    memory.write(GDT_64, _words([0, 0, _CODE_64_0, _DATA_0, _BUSY_TSS, 0, _DATA_3, _CODE_64_3]))
    memory.write(GDT_32, _words([0, 0, _CODE_32, _DATA_0, _BUSY_TSS]))
    memory.write(TSS + 4, _word(KERNEL_STACK, 8))  # RSP0
    _write_page_tables(memory)


def _write_page_tables(memory: GuestMemory) -> None:
    kernel = x86.PRESENT | x86.WRITABLE
    user = kernel | x86.USER
    large = x86.PAGE_SIZE_BIT
    memory.write(PAGES_64, _word(PAGES_64 + 0x1000 | user, 8))
    memory.write(PAGES_64 + 0x1000, _word(PAGES_64 + 0x2000 | user, 8))
    memory.write(PAGES_64 + 0x2000, _words([at | user | large for at in range(0, MAPPED_64, 2 * MiB)]))
    memory.write(PAGES_32, _word(PAGES_32 + 0x1000 | kernel, 4))
    memory.write(PAGES_32 + 0x1000, b"".join(_word(at | kernel, 4) for at in range(0, 4 * MiB, 0x1000)))
    memory.write(PAGES_PAE, _word(PAGES_PAE + 0x1000 | x86.PRESENT, 8))
    memory.write(PAGES_PAE + 0x1000, _word(kernel | large, 8))


def _handler(vector: int) -> int:
    return HANDLERS + 8 * vector


def _handler_code(vector: int) -> bytes:
    """Say ``vector`` on TRAP_PORT; the bytes mean the same in 16-, 32- and 64-bit code."""
    return bytes(
        [
            *(0xB0, vector),  # mov $vector, %al
            *(0xE6, TRAP_PORT),  # out %al, $TRAP_PORT
            *(0xF4, 0x90, 0x90, 0x90),  # hlt; nop; nop; nop
        ]
    )


def _gate(vector: int) -> bytes:
    """Return the gate of ``vector``, which CPL 3 may use too; the 64-bit gate has 8 zero bytes more."""
    kind = _INTERRUPT_GATE | _DPL_3
    return _word(_handler(vector), 2) + _word(x86.CODE_SELECTOR, 2) + _word(kind << 8, 2) + _word(0, 2)


def _word(value: int, size: int) -> bytes:
    return value.to_bytes(size, "little")


def _words(values: list[int]) -> bytes:
    return b"".join(_word(value, 8) for value in values)

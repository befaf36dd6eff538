"""Guests that mean harm, in 64-bit code at CPL 0, through the whole stack: a `Pc` boots them.

Each ends by the exit port: with the vector of the first exception, or with 0. With an exception, RBX is its error
code, RDX where it was, RSI is CR2.
"""

from collections.abc import Mapping
from types import MappingProxyType

from kvmpy.machine import layout, x86
from kvmpy.units import MiB

DIRECTORY = layout.BOOT_PAGE_TABLES + 2 * 4096
FAR, EDGE = 2 * MiB, 4 * MiB
"""Where a page of 2 MiB begins that `guest` does not need, and where RAM ends."""
FAR_ENTRY = DIRECTORY + FAR // (2 * MiB) * 8
WITH_ERROR_CODE = (8, 10, 11, 12, 13, 14, 17)
VECTORS = 20
NONE: Mapping[int, str] = MappingProxyType({})

FLUSH = "movq %cr3, %rax ; movq %rax, %cr3\n"
ABSENT = f"movq $0, {FAR_ENTRY}\n" + FLUSH
READ_ONLY = f"""
        andb    ${~x86.WRITABLE & 0xFF:#x}, {FAR_ENTRY}
        movq    %cr0, %rax ; orl $0x10000, %eax ; movq %rax, %cr0       # WP
        {FLUSH}"""
DONE = "xorl %eax, %eax ; outb %al, $KVMPY_PORT_EXIT ; 9: hlt ; jmp 9b\n"


def guest(body: str, *, handlers: Mapping[int, str] = NONE, behind: str = "") -> str:
    """Return a guest that does ``body``. ``handlers`` are those of exceptions that do not end it, by vector, which
    find RBX, RDX and RSI as above and the rest of the frame on the stack; ``behind`` is code that it may call.
    """
    gates = "\n".join(f"gate {vector}, on_{vector}" for vector in range(VECTORS))
    report = {vector: f"movb ${vector}, %al ; outb %al, $KVMPY_PORT_EXIT" for vector in range(VECTORS)}
    code = "\n".join(_handler(vector, then) for vector, then in (report | dict(handlers)).items())
    return f"""
#include "idt.inc"
        .text
        movl    $stack_end, %esp
        movq    %cr4, %rax ; orl $0x200, %eax ; movq %rax, %cr4         # OSFXSR
        {gates}
        load_idt
        {body}
        {DONE}
        {code}
        {behind}
        .bss
        .balign 16
        .skip   4096
stack_end:
        .skip   4096
ap_stack_end:
    """


def _handler(vector: int, then: str) -> str:
    error_code = "popq %rbx" if vector in WITH_ERROR_CODE else "xorl %ebx, %ebx"
    return f"on_{vector}: {error_code} ; movq (%rsp), %rdx ; movq %cr2, %rsi\n {then}"

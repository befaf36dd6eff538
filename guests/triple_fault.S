# triple_fault.S -- a fault, while delivering it another, and no way left to report that
#
# Teaches:   the processor gives up: KVM_EXIT_SHUTDOWN, and a report   (Intel SDM vol. 3 section 6.15, double fault)
# Mode:      ELF64, long mode, CPL0
# Memory:    0x100000 code
# Exits:     IoOut port=0xe9 x16 ; Shutdown
# Prints:    three, two, ...
# Status:    198
# Exercise:  give vector 6 a gate that points to an unmapped page. How many faults are there now, and which?
#include "abi.h"

        .code64
        .globl  _start
_start:
        movl    $text, %esi
1:      lodsb
        testb   %al, %al
        jz      2f
        outb    %al, $KVMPY_PORT_CONSOLE
        jmp     1b

# An interrupt table without room for a single gate: #UD has none, the general protection fault that follows has
# none, nor has the double fault.
2:      lidt    empty
        ud2

        .section .rodata
empty:  .word   0
        .quad   0
text:   .asciz  "three, two, ...\n"

# outside_ram.S -- one step beyond the end of RAM, and one foot on each side
#
# Teaches:   the end of a memory slot is no wall: what lies beyond is MMIO, and an access across it is cut in two
# Mode:      ELF64, long mode, CPL0
# Memory:    0x100000 code   0x8000000 the end of 128 MiB, which the parameter page tells
# Exits:     MmioWrite gpa=0x8000000 size=8 ; MmioRead gpa=0x8000000 size=8 ; MmioWrite gpa=0x8000000 size=4
# Exits:     IoOut port=0xe9 x42 ; IoOut port=0xf4
# Prints:    read beyond: ffffffff
# Prints:    last word: 76543210
# Exercise:  run with --mem 1M: which line of the listing fails now, and what is at the addresses that it uses?
#include "abi.h"

        .code64
        .globl  _start
_start:
        movl    $stack_end, %esp
        movl    $KVMPY_PARAMS, %eax
        movq    KVMPY_PARAMS_OFF_RAM_LOW(%rax), %rbx
        movq    $0xfedcba9876543210, %r8

        movq    %r8, -8(%rbx)           # the last eight bytes of RAM: no exit
        movq    %r8, (%rbx)             # the first eight beyond: one exit
        movq    (%rbx), %rbp            # one more; it reads all ones
        movq    %r8, -4(%rbx)           # four bytes into RAM, four into an exit

        movl    $text_read, %esi
        call    puts
        movl    %ebp, %eax
        call    put_hex
        movl    $text_last, %esi
        call    puts
        movl    -4(%rbx), %eax
        call    put_hex
        movb    $'\n', %al
        outb    %al, $KVMPY_PORT_CONSOLE
        jmp     finish

        .section .rodata
text_read:
        .asciz  "read beyond: "
text_last:
        .asciz  "\nlast word: "
        .text

#include "console.inc"

        .bss
        .balign 16
        .skip   256
stack_end:

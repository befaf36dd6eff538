# bootsector.S -- what a PC without an operating system reads from its first disk
#
# Teaches:   512 bytes that end in 55 AA, loaded at 0x7c00; cs:ip may be written in several ways
# Mode:      boot sector, 0x7c00
# Memory:    0x7c00 code and text   below 0x7c00 the stack
# Exits:     IoOut port=0xe9 x24 ; IoOut port=0xf4
# Prints:    boot sector at 00007c00
# Exercise:  change the last byte to 0xab. What does kvmpy say about the file, and which option still boots it?
#include "abi.h"

        .code16
        .globl  _start
_start:
# Firmware arrives as 0x0000:0x7c00 or 0x07c0:0x0000, which is the same byte. A far jump settles it.
        ljmp    $0, $1f
1:      xorw    %ax, %ax
        movw    %ax, %ds
        movw    %ax, %ss
        movw    $_start, %sp            # the stack grows down from the sector

# A PC's BIOS would print by INT 0x10. Here is no BIOS, only the board.
        movl    $text, %esi
        call    puts
        call    2f
2:      popw    %ax                     # where we really are
        subw    $2b - _start, %ax
        movzwl  %ax, %eax
        call    put_hex
        movb    $'\n', %al
        outb    %al, $KVMPY_PORT_CONSOLE
        jmp     finish

text:   .asciz  "boot sector at "

#include "console.inc"

# The signature: without it, it is no boot sector.
        .section .signature, "a"
        .byte   0x55, 0xaa

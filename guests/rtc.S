# rtc.S -- how much memory is there? Ask the clock chip
#
# Teaches:   the CMOS: an index port and a data port; registers 0x34 and 0x35 count 64 KiB units above 16 MiB
# Mode:      real mode, cs:ip = 0:0x1000
# Memory:    0x1000 code   0x2000 end of the stack
# Exits:     (IoOut port=0x70 ; IoIn port=0x71) x2 ; IoOut port=0xe9 x16 ; IoOut port=0xf4
# Prints:    memory: 128 MiB
# Exercise:  print the time of day too: registers 0, 2 and 4. What is special about 0x59 as a number of seconds?
#include "abi.h"

#define CMOS_INDEX      0x70
#define CMOS_DATA       0x71
#define CMOS_MEMORY     0x34

        .code16
        .globl  _start
_start:
        xorw    %ax, %ax
        movw    %ax, %ds
        movw    %ax, %ss
        movw    $0x2000, %sp

# Two accesses for each byte: the index is state inside the chip, so no one may come between.
        movb    $CMOS_MEMORY + 1, %al
        outb    %al, $CMOS_INDEX
        inb     $CMOS_DATA, %al
        movb    %al, %bh
        movb    $CMOS_MEMORY, %al
        outb    %al, $CMOS_INDEX
        inb     $CMOS_DATA, %al
        movb    %al, %bl

        movl    $text, %esi
        call    puts
        movzwl  %bx, %eax
        shrl    $4, %eax                # sixteen units of 64 KiB make a MiB
        addl    $16, %eax
        call    put_dec
        movl    $unit, %esi
        call    puts
        jmp     finish

text:   .asciz  "memory: "
unit:   .asciz  " MiB\n"

#include "console.inc"

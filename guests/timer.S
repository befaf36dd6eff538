# timer.S -- five ticks of the PIT, counted asleep
#
# Teaches:   PIT, interrupt controller and HLT in the kernel: an interrupt wakes the guest, and no exit is seen
# Mode:      real mode, cs:ip = 0:0x1000
# Memory:    0x0080 vector 0x20   0x1000 code   0x2000 end of the stack
# Exits:     IoOut port=0xe9 x14 ; IoOut port=0xf4
# Prints:    .....
# Prints:    5 ticks
# Exercise:  leave out the end-of-interrupt. How many ticks come, and which bit of the controller says why?
#include "abi.h"

#define PIC1            0x20
#define PIC1_DATA       0x21
#define PIC2_DATA       0xa1
#define PIC_EOI         0x20
#define PIT_CHANNEL0    0x40
#define PIT_COMMAND     0x43
#define VECTOR          0x20
#define DIVISOR         11932                   /* 1193182 Hz / 11932 = 100 Hz */
#define TICKS           5

        .macro  out_byte value, port
        movb    $\value, %al
        outb    %al, $\port
        .endm

        .code16
        .globl  _start
_start:
        xorw    %ax, %ax
        movw    %ax, %ds
        movw    %ax, %ss
        movw    $0x2000, %sp
        movw    $tick, VECTOR * 4
        movw    %ax, VECTOR * 4 + 2

# Four initialisation words: begin; IRQ 0 is vector 0x20; the second chip is at pin 2; 8086 mode. Then the mask:
# IRQ 0 alone. None of these leaves the kernel.
        out_byte 0x11, PIC1
        out_byte VECTOR, PIC1_DATA
        out_byte 0x04, PIC1_DATA
        out_byte 0x01, PIC1_DATA
        out_byte 0xfe, PIC1_DATA
        out_byte 0xff, PIC2_DATA

# Channel 0, low byte then high byte, mode 2: a tick each DIVISOR cycles.
        out_byte 0x34, PIT_COMMAND
        out_byte DIVISOR & 0xff, PIT_CHANNEL0
        out_byte DIVISOR >> 8, PIT_CHANNEL0

        sti
1:      hlt                             # asleep until the next tick
        cmpb    $TICKS, ticks
        jb      1b
        cli

        movl    $text, %esi
        call    puts
        jmp     finish

tick:
        movb    $'.', %al
        outb    %al, $KVMPY_PORT_CONSOLE
        incb    ticks
        movb    $PIC_EOI, %al           # else this was the last one
        outb    %al, $PIC1
        iret

ticks:  .byte   0
text:   .asciz  "\n5 ticks\n"

#include "console.inc"

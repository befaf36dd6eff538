# apic_timer.S -- the timer that every core has for itself
#
# Teaches:   the local APIC is memory that the kernel answers: MMIO without exits   (Intel SDM vol. 3 section 11.5.4)
# Mode:      ELF64, long mode, CPL0
# Memory:    0x100000 code   IDT and stack in .bss   0xfee00000 local APIC
# Exits:     IoOut port=0xe9 x14 ; IoOut port=0xf4
# Prints:    .....
# Prints:    5 ticks
# Exercise:  make it one-shot (bit 17 of the timer entry off) and start it again in the handler.
#include "abi.h"
#include "idt.inc"

#define APIC            0xfee00000
#define APIC_EOI        0x0b0
#define APIC_SPURIOUS   0x0f0
#define APIC_ENABLE     0x100
#define APIC_LVT_TIMER  0x320
#define APIC_PERIODIC   0x20000
#define APIC_COUNT      0x380
#define APIC_DIVIDE     0x3e0
#define DIVIDE_BY_1     0xb
#define VECTOR          0x40
#define SPURIOUS        0xff
#define CYCLES          10000000                /* of the bus clock: 10 ms under KVM */
#define TICKS           5

        .code64
        .globl  _start
_start:
        movl    $stack_end, %esp
        gate    VECTOR, tick
        gate    SPURIOUS, spurious
        load_idt

        movl    $APIC, %ebx
        movl    $APIC_ENABLE | SPURIOUS, APIC_SPURIOUS(%rbx)
        movl    $DIVIDE_BY_1, APIC_DIVIDE(%rbx)
        movl    $APIC_PERIODIC | VECTOR, APIC_LVT_TIMER(%rbx)
        movl    $CYCLES, APIC_COUNT(%rbx)       # it runs

        sti
1:      hlt
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
        movl    $0, APIC_EOI(%rbx)
spurious:
        iretq

        .section .rodata
text:   .asciz  "\n5 ticks\n"
        .text

#include "console.inc"

        .bss
ticks:  .skip   1
        .balign 16
        .skip   1024
stack_end:

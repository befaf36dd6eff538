# ipi.S -- two cores wake each other, ten times
#
# Teaches:   a fixed interrupt from core to core: the interrupt command register   (Intel SDM vol. 3 section 11.6.1)
# Mode:      ELF64, long mode, CPL0
# Run:       --cores 2
# Memory:    0x8000 start of the other core   0x100000 code   0xfee00000 local APIC
# Exits:     IoOut port=0xe9 x19 ; IoOut port=0xf4
# Prints:    pings 10, pongs 10
# Exercise:  send through the x2APIC (MSR 0x830) instead. Which of the two is cheaper under --stats?
#include "abi.h"
#include "idt.inc"

#define APIC            0xfee00000
#define APIC_EOI        0x0b0
#define APIC_SPURIOUS   0x0f0
#define APIC_ENABLE     0x100
#define APIC_ICR        0x300
#define ICR_INIT        0xc4500                 /* to all but myself */
#define ICR_STARTUP     0xc4608                 /* vector 8: the page 0x8000 */
#define ICR_FIXED       0xc4000
#define PING            0x40
#define PONG            0x41
#define SPURIOUS        0xff
#define ROUNDS          10

        .globl  _start
_start:
        movl    $stack_end, %esp
        call    prepare_trampoline
        gate    PING, ping
        gate    PONG, pong
        gate    SPURIOUS, spurious
        load_idt
        movl    $APIC, %ebx
        movl    $APIC_ENABLE | SPURIOUS, APIC_SPURIOUS(%rbx)
        movl    $ap_stack_end, ap_stack
        movl    $ICR_INIT, APIC_ICR(%rbx)
        movl    $ICR_STARTUP, APIC_ICR(%rbx)
1:      pause
        cmpb    $0, ap_awake
        je      1b

# One ping, then sleep until its pong. STI lets nothing in before HLT.
        xorl    %ebp, %ebp
2:      incl    %ebp
        movl    $ICR_FIXED | PING, APIC_ICR(%rbx)
3:      cli
        cmpl    pongs, %ebp
        je      4f
        sti
        hlt
        jmp     3b
4:      cmpl    $ROUNDS, %ebp
        jb      2b

        movl    $text_pings, %esi
        call    puts
        movl    pings, %eax
        call    put_dec
        movl    $text_pongs, %esi
        call    puts
        movl    pongs, %eax
        call    put_dec
        movb    $'\n', %al
        outb    %al, $KVMPY_PORT_CONSOLE
        jmp     finish

# The other core does nothing but answer.
ap_main:
        load_idt
        movl    $APIC, %ebx                     # the same address, its own APIC
        movl    $APIC_ENABLE | SPURIOUS, APIC_SPURIOUS(%rbx)
        movb    $1, ap_awake
1:      sti
        hlt
        jmp     1b

ping:   incl    pings
        movl    $ICR_FIXED | PONG, APIC_ICR(%rbx)
        movl    $0, APIC_EOI(%rbx)
        iretq

pong:   incl    pongs
        movl    $0, APIC_EOI(%rbx)
spurious:
        iretq

        .section .rodata
text_pings:
        .asciz  "pings "
text_pongs:
        .asciz  ", pongs "
        .text

#include "ap.inc"
#include "console.inc"

        .bss
pings:  .skip   4
pongs:  .skip   4
ap_awake:
        .skip   1
        .balign 16
        .skip   1024
stack_end:
        .skip   1024
ap_stack_end:

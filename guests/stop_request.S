# stop_request.S -- asked to stop, a guest says yes and goes
#
# Teaches:   a mailbox in memory and an interrupt that says "look": the way of every graceful shutdown   (guests/abi.h)
# Mode:      ELF64, long mode, CPL0
# Memory:    0x100000 code   0xe0000 the parameter page   0xfec00000 IOAPIC   0xfee00000 local APIC
# Input:     (stop request)
# Exits:     IoOut port=0xe9 x24 ; IoOut port=0xf4
# Prints:    waiting
# Prints:    stop: bye, bye!
# Exercise:  do not answer, and go on sleeping. What does the host do after its grace period?
#include "abi.h"
#include "idt.inc"

#define IOAPIC          0xfec00000
#define IOAPIC_SELECT   0x00
#define IOAPIC_WINDOW   0x10
#define REDIRECTION(gsi) (0x10 + 2 * (gsi))
#define APIC            0xfee00000
#define APIC_EOI        0x0b0
#define APIC_SPURIOUS   0x0f0
#define APIC_ENABLE     0x100
#define VECTOR          0x50
#define SPURIOUS        0xff

        .code64
        .globl  _start
_start:
        movl    $stack_end, %esp
        gate    VECTOR, stop_interrupt
        gate    SPURIOUS, spurious
        load_idt

# The GSI reaches the two 8259 and the IOAPIC. One of them shall tell us: mask every line of the older pair.
        movb    $0xff, %al
        outb    %al, $0x21
        outb    %al, $0xa1

        movl    $APIC, %ebx
        movl    $APIC_ENABLE | SPURIOUS, APIC_SPURIOUS(%rbx)

# Pin KVMPY_STOP_GSI: an edge gives VECTOR to the APIC with id 0.
        movl    $IOAPIC, %ebp
        movl    $REDIRECTION(KVMPY_STOP_GSI) + 1, IOAPIC_SELECT(%rbp)
        movl    $0, IOAPIC_WINDOW(%rbp)
        movl    $REDIRECTION(KVMPY_STOP_GSI), IOAPIC_SELECT(%rbp)
        movl    $VECTOR, IOAPIC_WINDOW(%rbp)

        movl    $text_waiting, %esi
        call    puts

# The mailbox is the truth; the interrupt only wakes us. STI lets none in before HLT.
        movl    $KVMPY_PARAMS, %ebp
1:      cli
        movl    KVMPY_PARAMS_OFF_REQUEST(%rbp), %eax
        cmpl    $KVMPY_REQUEST_STOP, %eax
        je      2f
        sti
        hlt
        jmp     1b

2:      movl    %eax, KVMPY_PARAMS_OFF_ACK(%rbp)
        movl    $text_bye, %esi
        call    puts
        jmp     finish

stop_interrupt:
        movl    $0, APIC_EOI(%rbx)
spurious:
        iretq

        .section .rodata
text_waiting:
        .asciz  "waiting\n"
text_bye:
        .asciz  "stop: bye, bye!\n"
        .text

#include "console.inc"

        .bss
        .balign 16
        .skip   1024
stack_end:

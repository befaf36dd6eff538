# smp_lock.S -- two cores, one counter, and the lock that keeps it right
#
# Teaches:   INIT and start-up IPI wake the other core; XCHG makes a lock   (Intel SDM vol. 3 sections 9.4.4, 9.1.2)
# Mode:      ELF64, long mode, CPL0
# Run:       --cores 2
# Memory:    0x8000 start of the other core   0x100000 code   0xfee00000 local APIC
# Exits:     IoOut port=0xe9 x19 ; IoOut port=0xf4
# Prints:    2 cores x 200: 400
# Exercise:  take the lock away (a NOP for the XCHG). How often is the sum still right, and why so often?
#include "abi.h"

#define APIC            0xfee00000
#define APIC_ICR        0x300
#define ICR_INIT        0xc4500                 /* INIT, assert, to all but myself */
#define ICR_STARTUP     0xc4608                 /* vector 8: the page 0x8000 */
#define TURNS           200

        .globl  _start
_start:
        movl    $stack_end, %esp
        call    prepare_trampoline
        movl    $ap_stack_end, ap_stack
        movl    $APIC, %ebx
        movl    $ICR_INIT, APIC_ICR(%rbx)       # real hardware wants 10 ms now; KVM does not
        movl    $ICR_STARTUP, APIC_ICR(%rbx)

# Begin together, else one is done before the other wakes.
1:      pause
        cmpb    $0, ap_awake
        je      1b
        movb    $1, go
        call    count
2:      pause
        cmpb    $0, ap_done
        je      2b

        movl    $text, %esi
        call    puts
        movl    counter, %eax
        call    put_dec
        movb    $'\n', %al
        outb    %al, $KVMPY_PORT_CONSOLE
        jmp     finish

ap_main:
        movb    $1, ap_awake
1:      pause
        cmpb    $0, go
        je      1b
        call    count
        movb    $1, ap_done
2:      cli
        hlt
        jmp     2b

# Load, add, store: three steps, between which the other core may come.
count:
        movl    $TURNS, %ecx
1:      movl    $1, %eax
        xchgl   %eax, lock_word         # XCHG with memory locks by itself: who reads 0 has it
        testl   %eax, %eax
        jz      3f
2:      pause
        cmpl    $0, lock_word           # look without writing until it is free
        jne     2b
        jmp     1b
3:      movl    counter, %eax
        incl    %eax
        movl    %eax, counter
        movl    $0, lock_word
        decl    %ecx
        jnz     1b
        ret

        .section .rodata
text:   .asciz  "2 cores x 200: "
        .text

#include "ap.inc"
#include "console.inc"

        .bss
lock_word:
        .skip   4
counter:
        .skip   4
ap_awake:
        .skip   1
go:     .skip   1
ap_done:
        .skip   1
        .balign 16
        .skip   256
stack_end:
        .skip   256
ap_stack_end:

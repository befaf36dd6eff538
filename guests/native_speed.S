# native_speed.S -- fifty million turns of a loop at CPL3
#
# Teaches:   guest code runs on the processor itself: no exit, no help, full speed
# Mode:      ELF64, long mode, CPL0
# Memory:    0x100000 code   page tables, GDT and TSS: see user.inc
# Exits:     IoOut port=0xe9 x16 ; IoOut port=0xf4
# Prints:    turns: 50000000
# Exercise:  run the loop at CPL0 with 500,000 turns and compare `--stats`: some hosts emulate kernel code.
#include "abi.h"
#include "idt.inc"

#define TURNS 50000000

        .globl  _start
_start:
        movl    $kernel_stack_end, %esp
        call    user_setup
        gate    3, report, USER
        load_idt
        movl    $user, %edi
        jmp     enter_user

user:   xorl    %ebx, %ebx
1:      incl    %ebx
        cmpl    $TURNS, %ebx
        jne     1b
        int3

report: movl    $text, %esi
        call    puts
        movl    %ebx, %eax
        call    put_dec
        movb    $'\n', %al
        outb    %al, $KVMPY_PORT_CONSOLE
        jmp     finish

        .section .rodata
text:   .asciz  "turns: "
        .text

#include "user.inc"
#include "console.inc"

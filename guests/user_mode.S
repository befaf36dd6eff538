# user_mode.S -- down to CPL3 and back by a gate: a system call
#
# Teaches:   IRETQ lowers privilege, a gate with DPL 3 raises it, from a stack of the TSS   (Intel SDM vol. 3 section 6.12)
# Mode:      ELF64, long mode, CPL0
# Memory:    0x100000 code   page tables, GDT and TSS: see user.inc
# Exits:     IoOut port=0xe9 x52 ; IoOut port=0xf4
# Prints:    user: my CPL is 3
# Prints:    kernel: #GP, for CPL3 may not OUT
# Exercise:  set IOPL to 3 in the frame that enter_user pushes. What does the OUT do now?
#include "abi.h"
#include "idt.inc"

#define CALL_PUTS       1
#define CALL_PUT_DEC    2

        .globl  _start
_start:
        movl    $kernel_stack_end, %esp
        call    user_setup
        gate    3, system_call, USER
        gate    13, general_protection
        load_idt
        movl    $user, %edi
        jmp     enter_user

# The user program. INT3 is one byte, works on every host, and is a trap: the user goes on behind it.
user:
        movl    $CALL_PUTS, %eax
        movl    $text_user, %edi
        int3
        movl    $CALL_PUT_DEC, %eax
        movl    %cs, %edi
        andl    $3, %edi
        int3
        movl    $CALL_PUTS, %eax
        movl    $text_newline, %edi
        int3
        outb    %al, $KVMPY_PORT_EXIT   # forbidden: IOPL is 0, and the TSS has no I/O bitmap
1:      jmp     1b

# %eax the number of the call, %rdi its argument.
system_call:
        cmpl    $CALL_PUT_DEC, %eax
        je      1f
        movl    %edi, %esi
        call    puts
        iretq
1:      movl    %edi, %eax
        call    put_dec
        iretq

general_protection:
        movl    $text_protection, %esi
        call    puts
        jmp     finish

        .section .rodata
text_user:
        .asciz  "user: my CPL is "
text_newline:
        .asciz  "\n"
text_protection:
        .asciz  "kernel: #GP, for CPL3 may not OUT\n"
        .text

#include "user.inc"
#include "console.inc"

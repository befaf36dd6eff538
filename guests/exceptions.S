# exceptions.S -- three faults, three handlers
#
# Teaches:   IDT, stack frame, error code, CR2: faults stay inside the guest, no exit   (Intel SDM vol. 3 chapter 6)
# Mode:      ELF64, long mode, CPL0
# Memory:    0x100000 code   IDT and stack in .bss   0x7f0000000000 is mapped nowhere
# Exits:     IoOut port=0xe9 x86 ; IoOut port=0xf4
# Prints:    #DE divide error
# Prints:    #UD invalid opcode
# Prints:    #PF page fault at 00007f0000000000, error 2
# Prints:    alive
# Exercise:  read from the address instead. Which bit of the error code changes? Then jump to it.
#include "abi.h"
#include "idt.inc"

        .code64
        .globl  _start
_start:
        movl    $stack_end, %esp
        gate    0, divide_error
        gate    6, invalid_opcode
        gate    14, page_fault
        load_idt

        xorl    %ecx, %ecx
        divl    %ecx                    # two bytes
        ud2                             # two bytes
        movq    $0x7f0000000000, %rbx
        movb    %al, (%rbx)             # two bytes

        movl    $text_alive, %esi
        call    puts
        jmp     finish

# A fault leaves rip at the instruction that failed: all three are two bytes long, so one way out serves them all.
divide_error:
        movl    $text_de, %esi
        call    puts
        jmp     skip

invalid_opcode:
        movl    $text_ud, %esi
        call    puts
        jmp     skip

# #PF pushes an error code below the frame: bit 0 present, bit 1 write, bit 2 user.
page_fault:
        movl    $text_pf, %esi
        call    puts
        movq    %cr2, %rbx
        movq    %rbx, %rax
        shrq    $32, %rax
        call    put_hex
        movl    %ebx, %eax
        call    put_hex
        movl    $text_error, %esi
        call    puts
        popq    %rax
        call    put_dec
        movb    $'\n', %al
        outb    %al, $KVMPY_PORT_CONSOLE
skip:
        addq    $2, (%rsp)
        iretq

        .section .rodata
text_de:
        .asciz  "#DE divide error\n"
text_ud:
        .asciz  "#UD invalid opcode\n"
text_pf:
        .asciz  "#PF page fault at "
text_error:
        .asciz  ", error "
text_alive:
        .asciz  "alive\n"
        .text

#include "console.inc"

        .bss
        .balign 16
        .skip   1024
stack_end:

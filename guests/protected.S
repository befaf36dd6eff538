# protected.S -- from real mode to protected mode, and a byte beyond the first MiB
#
# Teaches:   GDT, CR0.PE and the far jump that makes them count   (Intel SDM vol. 3 section 10.9.1)
# Mode:      real mode, cs:ip = 0:0x1000
# Memory:    0x1000 code and GDT   0x2000 end of the stack   0x200000 a word
# Exits:     IoOut port=0xe9 x38 ; IoOut port=0xf4
# Prints:    real mode
# Prints:    protected mode
# Prints:    at 2 MiB: P!
# Exercise:  set the granularity bit of the data segment to 0 (0x00cf.. to 0x004f..). Which exit do you get?
#include "abi.h"

#define CODE32 0x08
#define DATA32 0x10
#define CR0_PE 1

        .code16
        .globl  _start
_start:
        cli
        xorw    %ax, %ax
        movw    %ax, %ds
        movw    %ax, %ss
        movw    $0x2000, %sp
        movl    $text_real, %esi
1:      lodsb
        testb   %al, %al
        jz      2f
        outb    %al, $KVMPY_PORT_CONSOLE
        jmp     1b

# Between the write to CR0 and the far jump the processor is in protected mode with a real-mode code segment.
2:      lgdtl   gdt_pointer
        movl    %cr0, %eax
        orl     $CR0_PE, %eax
        movl    %eax, %cr0
        ljmpl   $CODE32, $protected

        .code32
protected:
        movl    $DATA32, %eax
        movw    %ax, %ds
        movw    %ax, %ss
        movw    %ax, %es
        movl    $0x2000, %esp
        movl    $text_protected, %esi
        call    puts

# No segment of real mode reaches this address.
        movl    $'P' | '!' << 8 | '\n' << 16, 0x200000
        movl    $text_high, %esi
        call    puts
        movl    $0x200000, %esi
        call    puts
        jmp     finish

# Base 0, limit 4 GiB, 32-bit: code may be read, data may be written.
        .balign 8
gdt:    .quad   0
        .quad   0x00cf9b000000ffff
        .quad   0x00cf93000000ffff
gdt_pointer:
        .word   gdt_pointer - gdt - 1
        .long   gdt

text_real:
        .asciz  "real mode\n"
text_protected:
        .asciz  "protected mode\n"
text_high:
        .asciz  "at 2 MiB: "

#include "console.inc"

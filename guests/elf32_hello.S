# elf32_hello.S -- an ELF file without any boot protocol, entered in protected mode
#
# Teaches:   program headers say what goes where, e_entry where to begin   (System V ABI 4.1, chapters 4 and 5)
# Mode:      ELF32, protected mode, CPL0
# Memory:    0x100000 code   the stack in .bss behind it
# Exits:     IoOut port=0xe9 x34 ; IoOut port=0xf4
# Prints:    protected mode, cr0 bit 0 is 1
# Prints:    ok
# Exercise:  `kvmpy inspect` shows two segments. Which is longer in memory than in the file? Who clears the rest?
#include "abi.h"

        .code32
        .globl  _start
_start:
        movl    $stack_end, %esp        # the protocol gives no stack
        movl    $text, %esi
        call    puts
        movl    %cr0, %eax
        andl    $1, %eax
        call    put_dec
        movl    $text_end, %esi
        call    puts

# .bss takes no place in the file, and yet it is zero.
        cmpl    $0, zero
        jne     finish
        movl    $text_ok, %esi
        call    puts
        jmp     finish

text:   .asciz  "protected mode, cr0 bit 0 is "
text_end:
        .asciz  "\n"
text_ok:
        .asciz  "ok\n"

#include "console.inc"

        .bss
zero:   .skip   4
        .balign 16
        .skip   256
stack_end:

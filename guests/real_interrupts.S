# real_interrupts.S -- a handler of our own in the real-mode interrupt table
#
# Teaches:   the vector table at address 0: four bytes each, offset then segment   (Intel SDM vol. 3 section 21.1.4)
# Mode:      real mode, cs:ip = 0:0x1000
# Memory:    0x0000 interrupt vectors   0x1000 code   0x2000 end of the stack
# Exits:     IoOut port=0xe9 x32 ; IoOut port=0xf4
# Prints:    int 0x21 says A
# Prints:    divide error
# Prints:    on
# Exercise:  let the handler of the divide error return without the correction of ip. What do you see, and why?
#include "abi.h"

        .code16
        .globl  _start
_start:
        xorw    %ax, %ax
        movw    %ax, %ds
        movw    %ax, %ss
        movw    $0x2000, %sp

        movw    $divide_error, 0 * 4
        movw    %ax, 0 * 4 + 2
        movw    $service, 0x21 * 4
        movw    %ax, 0x21 * 4 + 2

        movb    $'A', %al
        int     $0x21                   # pushes flags, cs, ip and jumps through 0x84; no exit

        xorw    %cx, %cx
        divw    %cx                     # two bytes long; the same way through vector 0
        movl    $text_on, %esi
        call    puts
        jmp     finish

# A service as DOS had them: the letter in %al is the argument.
service:
        movb    %al, letter
        movl    $text_service, %esi
        call    puts
        iret

# A fault returns to the instruction that failed. We step over it.
divide_error:
        movl    $text_divide, %esi
        call    puts
        movw    %sp, %bp
        addw    $2, (%bp)
        iret

text_service:
        .ascii  "int 0x21 says "
letter: .asciz  "?\n"
text_divide:
        .asciz  "divide error\n"
text_on:
        .asciz  "on\n"

#include "console.inc"

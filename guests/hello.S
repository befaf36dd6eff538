# hello.S -- the smallest guest: print a line, end the run
#
# Teaches:   the VM exit: an OUT leaves the guest and arrives as IoOut   (KVM API section 5, KVM_EXIT_IO)
# Mode:      real mode, cs:ip = 0:0x1000
# Memory:    0x1000 code, then the string
# Exits:     IoOut port=0xe9 x13 ; IoOut port=0xf4 data=0x0
# Prints:    Hello, world
# Exercise:  end with status 7 instead of 0. What does the shell's $? show, and what would 0x87 give?
#include "abi.h"

        .code16
        .globl  _start
_start:
        xorw    %ax, %ax
        movw    %ax, %ds
        movw    $text, %si

# One byte, one exit: the VMM is called for every letter.
1:      lodsb
        testb   %al, %al
        jz      2f
        outb    %al, $KVMPY_PORT_CONSOLE        # exits 1 to 13: IoOut(port=0xe9)
        jmp     1b

2:      outb    %al, $KVMPY_PORT_EXIT           # exit 14: IoOut(port=0xf4), the value is the status

# Without an exit port (the few lines of README's first example have none) the guest ends here: an exit named Hlt.
# On a board with an in-kernel interrupt controller HLT waits inside the kernel and never exits.
3:      hlt
        jmp     3b

text:   .asciz  "Hello, world\n"

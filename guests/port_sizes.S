# port_sizes.S -- ports that nobody owns, in one, two and four bytes
#
# Teaches:   kvm_run.io.size and .direction; a read from nowhere gives all ones   (KVM API section 5, KVM_EXIT_IO)
# Mode:      real mode, cs:ip = 0:0x1000
# Memory:    0x1000 code   0x2000 end of the stack
# Exits:     IoOut port=0x700 size=1 data=0x11 ; IoOut port=0x700 size=2 data=0x2222
# Exits:     IoOut port=0x700 size=4 data=0x44444444
# Exits:     IoIn port=0x700 size=1 ; IoOut port=0xe9 x9 ; IoIn port=0x700 size=2 ; IoOut port=0xe9 x9
# Exits:     IoIn port=0x700 size=4 ; IoOut port=0xe9 x9 ; IoOut port=0xf4
# Prints:    000000ff
# Prints:    0000ffff
# Prints:    ffffffff
# Exercise:  the guest reads four bytes at port 0xe6: who owns the last one? Predict %eax, then try it.
#include "abi.h"

#define NOBODY 0x700

        .code16
        .globl  _start
_start:
        xorw    %ax, %ax
        movw    %ax, %ds
        movw    %ax, %ss
        movw    $0x2000, %sp
        movw    $NOBODY, %dx

# The same port three times: only `size` tells the host how much of %eax is meant.
        movl    $0x11, %eax
        outb    %al, %dx
        movl    $0x2222, %eax
        outw    %ax, %dx
        movl    $0x44444444, %eax
        outl    %eax, %dx

# The host answers with ones, as a bus that nobody drives does. A narrow IN leaves the rest of %eax as it was.
        xorl    %ebx, %ebx
        movl    %ebx, %eax
        inb     %dx, %al
        call    show
        movl    %ebx, %eax
        inw     %dx, %ax
        call    show
        inl     %dx, %eax
        call    show
        jmp     finish

show:   call    put_hex
        movb    $'\n', %al
        outb    %al, $KVMPY_PORT_CONSOLE
        movw    $NOBODY, %dx
        ret

#include "console.inc"

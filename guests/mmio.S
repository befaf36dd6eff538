# mmio.S -- loads and stores where no RAM is
#
# Teaches:   an address without a memory slot is a device's: kvm_run.mmio   (KVM API section 5, KVM_EXIT_MMIO)
# Mode:      ELF64, long mode, CPL0
# Memory:    0x100000 code   0xc0000000 the hole below 4 GiB, on every machine
# Exits:     MmioWrite gpa=0xc0000000 size=1 data=0x11 ; MmioWrite gpa=0xc0000002 size=2 data=0x2222
# Exits:     MmioWrite gpa=0xc0000004 size=4 data=0x44444444 ; MmioWrite gpa=0xc0000008 size=8 data=0x8888888888888888
# Exits:     MmioRead gpa=0xc0000000 size=4 ; IoOut port=0xe9 x9
# Exits:     MmioRead gpa=0xc0000000 size=1 ; IoOut port=0xe9 x9 ; IoOut port=0xf4
# Prints:    ffffffff
# Prints:    000000ff
# Exercise:  store 8 bytes at 0xc0000ffc, across a page. How many exits, and of which sizes?
#include "abi.h"

#define HOLE 0xc0000000

        .code64
        .globl  _start
_start:
        movl    $stack_end, %esp
        movl    $HOLE, %ebx
        movq    $0x8888888888888888, %r8

        movb    $0x11, (%rbx)
        movw    $0x2222, 2(%rbx)
        movl    $0x44444444, 4(%rbx)
        movq    %r8, 8(%rbx)

# Nobody is there: the write is lost, the read is all ones.
        movl    (%rbx), %eax
        call    show
        movzbl  (%rbx), %eax
        call    show
        jmp     finish

show:   call    put_hex
        movb    $'\n', %al
        outb    %al, $KVMPY_PORT_CONSOLE
        ret

#include "console.inc"

        .bss
        .balign 16
        .skip   256
stack_end:

# rep_outsb.S -- one instruction, many bytes, how many exits?
#
# Teaches:   string I/O and kvm_run.io.count   (KVM API section 5, KVM_EXIT_IO)
# Mode:      real mode, cs:ip = 0:0x1000
# Memory:    0x1000 code   0x1100 the string
# Exits:     IoOut port=0xe9 x13 ; IoOut port=0xf4
# Prints:    Hello, world
# Exercise:  run with --trace. One exit with count=13, or 13 with count=1? Hosts differ, so the header counts bytes.
#include "abi.h"

        .code16
        .globl  _start
_start:
        xorw    %ax, %ax
        movw    %ax, %ds
        movw    $text, %si
        movw    $text_length, %cx
        movw    $KVMPY_PORT_CONSOLE, %dx
        cld                             # %si walks upwards

# Hardware gathers the bytes into one exit; an instruction emulator may hand them over one at a time. A device
# must take both: it looks at `count`, always.
        rep outsb                       # IoOut(port=0xe9), 13 bytes in all

        outb    %al, $KVMPY_PORT_EXIT
1:      hlt
        jmp     1b

        .org    0x100
text:   .ascii  "Hello, world\n"
        .set    text_length, . - text

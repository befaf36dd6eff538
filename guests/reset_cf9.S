# reset_cf9.S -- start again: the chipset's reset control register
#
# Teaches:   port 0xcf9: bit 1 chooses a full reset, the rise of bit 2 makes it; what ACPI's reset register names
# Mode:      real mode, cs:ip = 0:0x1000
# Memory:    0x1000 code
# Exits:     IoOut port=0xe9 x2 ; IoOut port=0xcf9 data=0x2 ; IoOut port=0xcf9 data=0x6
# Prints:    3
# Status:    202
# Exercise:  leave out the second write. How does the run end?
#include "abi.h"

#define FULL_RESET      0x02
#define RESET_CPU       0x04

        .code16
        .globl  _start
_start:
        movb    $'3', %al
        outb    %al, $KVMPY_PORT_CONSOLE
        movb    $'\n', %al
        outb    %al, $KVMPY_PORT_CONSOLE
        movw    $KVMPY_PORT_RESET, %dx
        movb    $FULL_RESET, %al
        outb    %al, %dx                # which kind
        movb    $FULL_RESET | RESET_CPU, %al
        outb    %al, %dx                # now: the last exit
1:      hlt
        jmp     1b

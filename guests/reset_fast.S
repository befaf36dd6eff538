# reset_fast.S -- start again: bit 0 of system control port A
#
# Teaches:   port 0x92 of the PS/2: bit 0 resets at once, bit 1 is the A20 gate; a reader keeps the other bits
# Mode:      real mode, cs:ip = 0:0x1000
# Memory:    0x1000 code
# Exits:     IoOut port=0xe9 x2 ; IoIn port=0x92 ; IoOut port=0x92
# Prints:    2
# Status:    202
# Exercise:  print the value that was read. Is the A20 gate open? Close it: does anything change here?
#include "abi.h"

#define CONTROL_A       0x92
#define FAST_RESET      0x01

        .code16
        .globl  _start
_start:
        movb    $'2', %al
        outb    %al, $KVMPY_PORT_CONSOLE
        movb    $'\n', %al
        outb    %al, $KVMPY_PORT_CONSOLE
        inb     $CONTROL_A, %al
        orb     $FAST_RESET, %al
        outb    %al, $CONTROL_A         # the last exit
1:      hlt
        jmp     1b

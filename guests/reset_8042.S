# reset_8042.S -- start again: the keyboard controller holds the reset line
#
# Teaches:   the oldest reset of a PC: command 0xfe to port 0x64 pulses the line; kvmpy ends the run and says "reset"
# Mode:      real mode, cs:ip = 0:0x1000
# Memory:    0x1000 code
# Exits:     IoOut port=0xe9 x2 ; IoOut port=0x64 data=0xfe
# Prints:    1
# Status:    202
# Exercise:  write 0xff instead: only bit 0 low means reset. Which line of the output port does the command pulse?
#include "abi.h"

#define CONTROLLER      0x64
#define PULSE_RESET     0xfe

        .code16
        .globl  _start
_start:
        movb    $'1', %al
        outb    %al, $KVMPY_PORT_CONSOLE
        movb    $'\n', %al
        outb    %al, $KVMPY_PORT_CONSOLE
        movb    $PULSE_RESET, %al
        outb    %al, $CONTROLLER        # the last exit
1:      hlt
        jmp     1b

# spin.S -- run for ever without an exit
#
# Teaches:   a guest that never exits still obeys the host: a signal takes the vCPU out of KVM_RUN (EINTR)
# Mode:      real mode, cs:ip = 0:0x1000
# Run:       --timeout 0.3
# Memory:    0x1000 code
# Exits:     IoOut port=0xe9 x2
# Prints:    @
# Status:    200
# Exercise:  which rip does the report name? Turn the loop into two instructions and predict both values.
#include "abi.h"

        .code16
        .globl  _start
_start:
        movb    $'@', %al
        outb    %al, $KVMPY_PORT_CONSOLE
        movb    $'\n', %al
        outb    %al, $KVMPY_PORT_CONSOLE
1:      jmp     1b

# halt.S -- sleep for ever: HLT with interrupts off
#
# Teaches:   HLT stays in the kernel when the interrupt controller is there; kvmpy looks whether anything could wake it
# Mode:      real mode, cs:ip = 0:0x1000
# Memory:    0x1000 code
# Exits:     IoOut port=0xe9 x2
# Prints:    z
# Status:    198
# Exercise:  how much processor time does the run take? Compare with spin.S  (`time kvmpy run ...`).
#include "abi.h"

        .code16
        .globl  _start
_start:
        movb    $'z', %al
        outb    %al, $KVMPY_PORT_CONSOLE
        movb    $'\n', %al
        outb    %al, $KVMPY_PORT_CONSOLE

# With IF clear only an NMI, an INIT or a reset wakes a processor.
        cli
1:      hlt                             # no exit: KVM puts the vCPU's thread to sleep
        jmp     1b

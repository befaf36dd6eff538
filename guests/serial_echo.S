# serial_echo.S -- echo what arrives on COM1, by interrupts; Ctrl-D ends it
#
# Teaches:   the 16550's receive interrupt: IER, IIR and LSR, IRQ 4 through the interrupt controllers, HLT between keys
# Mode:      ELF64, long mode, CPL0
# Memory:    0x100000 code   IDT and stack in .bss
# Input:     two lines\nof text\n\x04
# Exits:     IoOut port=0x3f9 ; IoOut port=0x3fa ; IoOut port=0x3fc
# Exits:     (IoIn port=0x3fa | IoIn port=0x3fd | IoIn port=0x3f8 | IoOut port=0x3f8) x* ; IoOut port=0xf4
# Prints:    two lines
# Prints:    of text
# Exercise:  run `kvmpy run -i` and type. How many exits does one key cost? Which of them could go?
#include "abi.h"
#include "idt.inc"

#define DATA            KVMPY_PORT_SERIAL       /* RBR when read, THR when written */
#define INTERRUPTS      (KVMPY_PORT_SERIAL + 1) /* IER */
#define FIFO_CONTROL    (KVMPY_PORT_SERIAL + 2) /* FCR when written, IIR when read */
#define MODEM_CONTROL   (KVMPY_PORT_SERIAL + 4) /* MCR */
#define LINE_STATUS     (KVMPY_PORT_SERIAL + 5) /* LSR */
#define DATA_READY      0x01
#define THRE            0x20
#define CTRL_D          0x04
#define VECTOR          0x20                    /* of IRQ 0; IRQ 4 follows it */

        .macro  out_byte value, port
        movb    $\value, %al
        movw    $\port, %dx
        outb    %al, %dx
        .endm

        .code64
        .globl  _start
_start:
        movl    $stack_end, %esp
        gate    VECTOR + KVMPY_IRQ_SERIAL, serial_interrupt
        load_idt

# The two 8259: begin, first vector, where they meet, 8086 mode; then let IRQ 4 alone through. In the kernel: no exits.
        out_byte 0x11, 0x20
        out_byte VECTOR, 0x21
        out_byte 0x04, 0x21
        out_byte 0x01, 0x21
        out_byte ~(1 << KVMPY_IRQ_SERIAL) & 0xff, 0x21
        out_byte 0xff, 0xa1

# Received data shall interrupt, FIFO on, and OUT2 connects the chip to its interrupt line.
        out_byte 0x01, INTERRUPTS
        out_byte 0x01, FIFO_CONTROL
        out_byte 0x0b, MODEM_CONTROL

# STI takes effect after the next instruction, so no interrupt slips in between the test and the sleep.
1:      cli
        cmpb    $0, done
        jne     2f
        sti
        hlt
        jmp     1b

2:      xorl    %eax, %eax
        outb    %al, $KVMPY_PORT_EXIT
3:      hlt
        jmp     3b

serial_interrupt:
        movw    $FIFO_CONTROL, %dx
        inb     %dx, %al                # IIR: why; we have allowed one reason only
1:      movw    $LINE_STATUS, %dx
        inb     %dx, %al
        testb   $DATA_READY, %al
        jz      4f
        movw    $DATA, %dx
        inb     %dx, %al
        cmpb    $CTRL_D, %al
        je      3f
        movb    %al, %bl
        movw    $LINE_STATUS, %dx
2:      inb     %dx, %al
        testb   $THRE, %al
        jz      2b
        movb    %bl, %al
        movw    $DATA, %dx
        outb    %al, %dx
        jmp     1b
3:      movb    $1, done
4:      movb    $0x20, %al              # end of interrupt
        outb    %al, $0x20
        iretq

        .bss
done:   .skip   1
        .balign 16
        .skip   1024
stack_end:

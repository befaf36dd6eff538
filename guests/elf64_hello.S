# elf64_hello.S -- 64 bits from the first instruction, printing on a serial port
#
# Teaches:   long mode set up by the VMM; a polled 16550: wait for THRE, write the byte   (PC16550D data sheet, LSR)
# Mode:      ELF64, long mode, CPL0
# Memory:    0x100000 code; the page tables are the VMM's: 4 GiB, one to one
# Exits:     (IoIn port=0x3fd ; IoOut port=0x3f8) x18 ; IoOut port=0xf4
# Prints:    Hello, long mode!
# Exercise:  turn the FIFO on (FCR = 1): THRE then means 16 free places. Save how many exits?
#include "abi.h"

#define LINE_STATUS     (KVMPY_PORT_SERIAL + 5)
#define THRE            0x20                    /* transmitter holding register empty */

        .code64
        .globl  _start
_start:
        movl    $text, %esi
1:      lodsb
        testb   %al, %al
        jz      3f
        movb    %al, %bl

        movw    $LINE_STATUS, %dx
2:      inb     %dx, %al                # IoIn(port=0x3fd)
        testb   $THRE, %al
        jz      2b

        movb    %bl, %al
        movw    $KVMPY_PORT_SERIAL, %dx
        outb    %al, %dx                # IoOut(port=0x3f8)
        jmp     1b

3:      outb    %al, $KVMPY_PORT_EXIT
4:      hlt
        jmp     4b

        .section .rodata
text:   .asciz  "Hello, long mode!\n"

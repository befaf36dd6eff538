# virtio_blk.S -- a driver for a disk: three rings in our own memory, and one register to knock at
#
# Teaches:   virtio-mmio, a split virtqueue, virtio-blk requests; read virtio_blk.c next   (virtio 1.2 sections 2.7, 4.2, 5.2)
# Mode:      ELF64, long mode, CPL0
# Disk:      64K
# Memory:    0x100000 code, rings and buffers   0xd0000000 the device's registers
# Exits:     MmioRead gpa=0xd0000000 size=4 ; MmioRead gpa=0xd0000004 size=4 ; MmioRead gpa=0xd0000008 size=4
# Exits:     MmioWrite gpa=0xd0000070 size=4 data=0x0 ; MmioWrite gpa=0xd0000070 size=4 data=0x3
# Exits:     MmioWrite gpa=0xd0000024 size=4 data=0x0 ; MmioWrite gpa=0xd0000020 size=4 data=0x200
# Exits:     MmioWrite gpa=0xd0000024 size=4 data=0x1 ; MmioWrite gpa=0xd0000020 size=4 data=0x1
# Exits:     MmioWrite gpa=0xd0000070 size=4 data=0xb ; MmioRead gpa=0xd0000070 size=4
# Exits:     MmioWrite gpa=0xd0000030 size=4 data=0x0 ; MmioRead gpa=0xd0000034 size=4
# Exits:     MmioWrite gpa=0xd0000038 size=4 data=0x8
# Exits:     MmioWrite gpa=0xd0000080 size=4 ; MmioWrite gpa=0xd0000084 size=4 data=0x0
# Exits:     MmioWrite gpa=0xd0000090 size=4 ; MmioWrite gpa=0xd0000094 size=4 data=0x0
# Exits:     MmioWrite gpa=0xd00000a0 size=4 ; MmioWrite gpa=0xd00000a4 size=4 data=0x0
# Exits:     MmioWrite gpa=0xd0000044 size=4 data=0x1 ; MmioWrite gpa=0xd0000070 size=4 data=0xf
# Exits:     IoOut port=0xe9 x13 ; MmioRead gpa=0xd0000100 size=4 ; IoOut port=0xe9 x12
# Exits:     MmioRead gpa=0xd0000060 size=4 ; MmioWrite gpa=0xd0000064 size=4 data=0x1 ; IoOut port=0xe9 x26
# Exits:     (MmioRead gpa=0xd0000060 size=4 ; MmioWrite gpa=0xd0000064 size=4 data=0x1) x3
# Exits:     IoOut port=0xe9 x27 ; IoOut port=0xf4 size=1 data=0x0
# Prints:    the disk has 128 sectors
# Prints:    starts before this one: 0
# Prints:    written, flushed, verified
# Exercise:  run it twice with the same disk. Then add `,readonly` to --disk: which status does the device give, and where?
#include "abi.h"
#include "idt.inc"

#define VECTOR          0x20                    /* of IRQ 0 */
#define INTERRUPT_STATUS 0x60
#define INTERRUPT_ACK   0x64

        .macro  out_byte value, port
        movb    $\value, %al
        outb    %al, $\port
        .endm

        .code64
        .globl  _start, wait_for_interrupt, put_text, put_number
_start:
        movl    $stack_end, %esp
        gate    VECTOR + 5, disk_interrupt      # the board gives the first device IRQ 5
        load_idt

# The two 8259, as in serial_echo: IRQ 5 alone comes through.
        out_byte 0x11, 0x20
        out_byte VECTOR, 0x21
        out_byte 0x04, 0x21
        out_byte 0x01, 0x21
        out_byte ~(1 << 5) & 0xff, 0x21
        out_byte 0xff, 0xa1

        call    driver_main
        outb    %al, $KVMPY_PORT_EXIT           # what it returned is the status
1:      hlt
        jmp     1b

# STI takes effect after the next instruction, so no interrupt slips in between the test and the sleep.
wait_for_interrupt:
        cli
        cmpb    $0, interrupted
        jne     1f
        sti
        hlt
        jmp     wait_for_interrupt
1:      movb    $0, interrupted
        ret

# Reading the status says why, writing it back says that we know. Both are for the device alone: the PIC has its own EOI.
disk_interrupt:
        pushq   %rax
        movl    $KVMPY_VIRTIO_MMIO, %eax
        pushq   %rbx
        movl    INTERRUPT_STATUS(%rax), %ebx
        movl    %ebx, INTERRUPT_ACK(%rax)
        popq    %rbx
        movb    $1, interrupted
        movb    $0x20, %al                      # end of interrupt
        outb    %al, $0x20
        popq    %rax
        iretq

# For C: puts and put_dec take their argument in %esi and %eax.
put_text:
        movl    %edi, %esi
        jmp     puts
put_number:
        movl    %edi, %eax
        jmp     put_dec

#include "console.inc"

        .bss
interrupted:
        .skip   1
        .balign 16
        .skip   2048
stack_end:

"""A bare-metal virtio-blk driver of a page: the guest with which disks are tested end to end, in long mode.

For every device of the parameter page it negotiates, reads sector 0, writes what it read to sector 1, and flushes,
all devices at once; between the steps it halts until interrupts tell that all are done. It prints a line for each
step: one status byte of each device, as a digit. ``X`` and exit status 1: something is not as virtio 1.2 says.
"""

VECTOR = 0x40
DATA = 0x20_0400
"""The gpa of the first device's data buffer."""

MMIO = """
        .set MAGIC, 0x00 ; .set VERSION, 0x04 ; .set DEVICE_ID, 0x08
        .set DEVICE_FEATURES, 0x10 ; .set DEVICE_SEL, 0x14 ; .set DRIVER_FEATURES, 0x20 ; .set DRIVER_SEL, 0x24
        .set QUEUE_SEL, 0x30 ; .set NUM_MAX, 0x34 ; .set NUM, 0x38 ; .set READY, 0x44 ; .set NOTIFY, 0x50
        .set ISR, 0x60 ; .set ACK, 0x64 ; .set STATUS, 0x70
        .set DESC, 0x80 ; .set AVAIL, 0x90 ; .set USED, 0xa0 ; .set CONFIG, 0x100
        .set AREA, 0x200000                     # 16 KiB for each device
        .set AVAIL_AT, 0x80 ; .set USED_AT, 0x100 ; .set HEADER_AT, 0x200 ; .set STATUS_AT, 0x210 ; .set DATA_AT, 0x400
"""

DRIVER = """
_begin: movl $0x80000, %esp
        call wires
        lidt idtr
        movl $start_device, %ebx
        call each
        movl $read_sector, %ebx
        call step
        movl $write_sector, %ebx
        call step
        movl $flush, %ebx
        call step
        xorb %al, %al
        outb %al, $KVMPY_PORT_EXIT

step:   call each                               # submit on every device, wait for all, print each status
        incl steps
1:      cli
        xorl %esi, %esi
2:      call place
        movw steps, %ax
        cmpw %ax, USED_AT + 2(%rbp)
        jne 3f
        incl %esi
        cmpl %esi, KVMPY_PARAMS + KVMPY_PARAMS_OFF_VIRTIO_COUNT
        jne 2b
        movl $print_status, %ebx
        call each
        movb $10, %al
        outb %al, $KVMPY_PORT_CONSOLE
        ret
3:      sti
        hlt
        jmp 1b

each:   xorl %esi, %esi                         # call *%rbx: esi the device's number, edi its window, ebp its area
1:      cmpl %esi, KVMPY_PARAMS + KVMPY_PARAMS_OFF_VIRTIO_COUNT
        je 2f
        call place
        call *%rbx
        incl %esi
        jmp 1b
2:      ret

place:  movl %esi, %edi
        imull $KVMPY_VIRTIO_MMIO_STRIDE, %edi
        addl $KVMPY_VIRTIO_MMIO, %edi
        movl %esi, %ebp
        shll $14, %ebp
        addl $AREA, %ebp
        ret

start_device:
        cmpl $0x74726976, MAGIC(%rdi) ; jne fail
        cmpl $2, VERSION(%rdi) ; jne fail
        cmpl $2, DEVICE_ID(%rdi) ; jne fail
        movl $0, STATUS(%rdi)
        movl $1, STATUS(%rdi)                   # ACKNOWLEDGE
        movl $3, STATUS(%rdi)                   # DRIVER
        movl $1, DEVICE_SEL(%rdi)
        testl $1, DEVICE_FEATURES(%rdi) ; jz fail   # VIRTIO_F_VERSION_1
        movl $1, DRIVER_SEL(%rdi)
        movl $1, DRIVER_FEATURES(%rdi)
        movl $0, DRIVER_SEL(%rdi)
        movl $0x200, DRIVER_FEATURES(%rdi)      # VIRTIO_BLK_F_FLUSH
        movl $11, STATUS(%rdi)                  # FEATURES_OK
        cmpl $11, STATUS(%rdi) ; jne fail
        movl $0, QUEUE_SEL(%rdi)
        cmpl $8, NUM_MAX(%rdi) ; jb fail
        movl $8, NUM(%rdi)
        movl %ebp, DESC(%rdi)
        leal AVAIL_AT(%rbp), %eax ; movl %eax, AVAIL(%rdi)
        leal USED_AT(%rbp), %eax ; movl %eax, USED(%rdi)
        movl $1, READY(%rdi)
        movl $15, STATUS(%rdi)                  # DRIVER_OK
        cmpl $15, STATUS(%rdi) ; jne fail
        ret

read_sector:
        movl $0, %eax ; movl $0, %edx ; movl $3, %ecx   # IN; the data descriptor: NEXT | WRITE
        jmp submit
write_sector:
        movl $1, %eax ; movl $1, %edx ; movl $1, %ecx   # OUT
        jmp submit
flush:  movl $4, %eax ; movl $0, %edx ; movl $1, %ecx   # FLUSH: the chain leaves the data out
submit: movl %eax, HEADER_AT(%rbp)
        movl %edx, HEADER_AT + 8(%rbp)
        leal HEADER_AT(%rbp), %edx ; movl %edx, (%rbp) ; movl $16, 8(%rbp) ; movl $0x00010001, 12(%rbp)
        leal DATA_AT(%rbp), %edx ; movl %edx, 16(%rbp) ; movl $512, 24(%rbp)
        movl %ecx, 28(%rbp) ; movw $2, 30(%rbp)
        leal STATUS_AT(%rbp), %edx ; movl %edx, 32(%rbp) ; movl $1, 40(%rbp) ; movl $2, 44(%rbp)
        cmpl $4, %eax ; jne 1f
        movw $2, 14(%rbp)
1:      movb $0xff, STATUS_AT(%rbp)
        movzwl AVAIL_AT + 2(%rbp), %eax         # the ring's entries stay 0: the chain's head
        incl %eax
        movw %ax, AVAIL_AT + 2(%rbp)
        movl $0, NOTIFY(%rdi)
        ret

print_status:
        movb STATUS_AT(%rbp), %al
        addb $'0', %al
        outb %al, $KVMPY_PORT_CONSOLE
        ret

acknowledge:                                    # what every device has to say
        movl ISR(%rdi), %eax
        movl %eax, ACK(%rdi)
        orl %eax, acknowledged
        ret

handler:                                        # comes while `step` halts, which keeps nothing in registers
        movl $acknowledge, %ebx
        call each
        call eoi
        iretq

fail:   movb $'X', %al
        outb %al, $KVMPY_PORT_CONSOLE
        movb $1, %al
        outb %al, $KVMPY_PORT_EXIT
        hlt

gate:   movl $handler, %eax                     # a 64-bit interrupt gate for vector edx
        movl %edx, %ecx
        shll $4, %ecx
        movw %ax, 0x7000(%rcx)
        shrl $16, %eax
        movl $0x8e000010, 0x7002(%rcx)          # the selector of the boot GDT's code, and the type
        movw %ax, 0x7006(%rcx)
        ret

idtr:   .word 0xfff
        .quad 0x7000
steps:  .long 0
acknowledged: .long 0
"""

WATCH_CAPACITY = """
        movl $0x80000, %esp
        call wires
        lidt idtr
        movl $start_device, %ebx
        call each
        movl $print_capacity, %ebx
        call each
1:      sti
        hlt
        cli
        testl $2, acknowledged                  # VIRTIO_MMIO_INT_CONFIG
        jz 1b
        movl $print_capacity, %ebx
        call each
        xorb %al, %al
        outb %al, $KVMPY_PORT_EXIT

print_capacity:
        movl CONFIG(%rdi), %eax
        outb %al, $KVMPY_PORT_CONSOLE
        ret
"""

IOAPIC = f"""
        .set IOWIN, 0x10
wires:  movb $0xff, %al                         # the PICs hear the ISA interrupts too
        outb %al, $0x21
        outb %al, $0xa1
        movl $0xfec00000, %r8d                  # I/O APIC: IOREGSEL, IOWIN
        movl $0xfee00000, %r9d
        movl $0x1ff, 0xf0(%r9)                  # APIC on
        movl ${VECTOR}, %edx
        call gate
        movl $wire, %ebx
        jmp each
wire:   movzbl KVMPY_PARAMS + KVMPY_PARAMS_OFF_VIRTIO_GSI(%rsi), %eax
        leal 0x11(%rax, %rax), %eax
        movl %eax, (%r8)
        movl $0, IOWIN(%r8)                     # to the processor with APIC id 0
        decl %eax
        movl %eax, (%r8)
        movl ${VECTOR}, IOWIN(%r8)              # edge, active high, fixed
        ret
eoi:    movl $0, 0xb0(%r9)
        ret
"""
"""One vector for all: an edge that comes while another is served stays pending."""

PICS = """
wires:  movl $pic_words, %ecx
1:      movb 1(%rcx), %al
        movzbl (%rcx), %edx
        outb %al, %dx
        addl $2, %ecx
        cmpl $pic_words_end, %ecx
        jne 1b
        movl $0x40, %edx
2:      call gate
        incl %edx
        cmpl $0x50, %edx
        jne 2b
        ret
pic_words:                                      # ICW1 to ICW4, and every interrupt unmasked but the PIT's
        .byte 0x20, 0x11, 0x21, 0x40, 0x21, 4, 0x21, 1, 0x21, 1
        .byte 0xa0, 0x11, 0xa1, 0x48, 0xa1, 2, 0xa1, 1, 0xa1, 0
pic_words_end:
eoi:    movb $0x20, %al
        outb %al, $0xa0
        outb %al, $0x20
        ret
"""


def guest(wires: str) -> str:
    """Return the whole program, whose interrupts come by way of ``wires``: IOAPIC or PICS."""
    return MMIO + DRIVER + wires


def watch_capacity() -> str:
    """Return a program that prints the low byte of the capacity in sectors, and again when it has changed."""
    return MMIO + WATCH_CAPACITY + DRIVER + IOAPIC

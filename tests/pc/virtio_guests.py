"""Bare-metal drivers of the entropy device and of the virtio console, in long mode; each waits for its interrupt.

``edi`` is the window that is driven, ``ebp`` the rings of its queue 0: descriptors, available at 0x80, used at 0x100.
Queue 1 lies 0x800 further. One vector, by the I/O APIC, ends every HLT.
"""

BUFFER = 0x20_0400
"""The gpa of the first buffer."""

DRIVER = """
        .set DEVICE_ID, 0x08 ; .set DRIVER_FEATURES, 0x20 ; .set DRIVER_SEL, 0x24
        .set QUEUE_SEL, 0x30 ; .set NUM, 0x38 ; .set READY, 0x44 ; .set NOTIFY, 0x50
        .set ISR, 0x60 ; .set ACK, 0x64 ; .set STATUS, 0x70
        .set DESC, 0x80 ; .set AVAIL, 0x90 ; .set USED, 0xa0 ; .set CONFIG, 0x100
        .set AVAIL_AT, 0x80 ; .set USED_AT, 0x100 ; .set BUFFER_AT, 0x400
        .set READ, 0 ; .set WRITE, 2 ; .set IOWIN, 0x10
        movl $0x80000, %esp
        movl $0x200000, %ebp
        movb $0xff, %al                         # the PICs hear the ISA interrupts too
        outb %al, $0x21
        outb %al, $0xa1
        lidt idtr
        movl $0xfec00000, %r8d
        movl $0xfee00000, %r9d
        movl $0x1ff, 0xf0(%r9)                  # APIC on
        movl $handler, %eax                     # a 64-bit interrupt gate for vector 0x40
        movw %ax, 0x7400
        movl $0x8e000010, 0x7402
        shrl $16, %eax
        movw %ax, 0x7406
        jmp main

start:                                          # of the device at edi, with GSI eax; ecx queues
        leal 0x11(%rax, %rax), %eax
        movl %eax, (%r8)
        movl $0, IOWIN(%r8)
        decl %eax
        movl %eax, (%r8)
        movl $0x40, IOWIN(%r8)
        movl $0, STATUS(%rdi)
        movl $1, STATUS(%rdi)
        movl $3, STATUS(%rdi)
        movl $1, DRIVER_SEL(%rdi)
        movl $1, DRIVER_FEATURES(%rdi)          # VIRTIO_F_VERSION_1
        movl $11, STATUS(%rdi)
        cmpl $11, STATUS(%rdi) ; jne fail
        xorl %edx, %edx
        movl %ebp, %ebx
1:      movl %edx, QUEUE_SEL(%rdi)
        movl $8, NUM(%rdi)
        movl %ebx, DESC(%rdi)
        leal AVAIL_AT(%rbx), %eax ; movl %eax, AVAIL(%rdi)
        leal USED_AT(%rbx), %eax ; movl %eax, USED(%rdi)
        movl $1, READY(%rdi)
        addl $0x800, %ebx
        incl %edx
        cmpl %ecx, %edx
        jne 1b
        movl $15, STATUS(%rdi)
        cmpl $15, STATUS(%rdi) ; jne fail
        ret

submit:                                         # edx bytes at eax, in direction ecx, to queue esi with rings at ebx
        movl %eax, (%rbx)
        movl %edx, 8(%rbx)
        movw %cx, 12(%rbx)
        incw AVAIL_AT + 2(%rbx)                 # the ring's entries stay 0: the chain's head
        movl %esi, NOTIFY(%rdi)
        ret

wait:                                           # until the device has given back what was submitted at ebx
        cli
        movw AVAIL_AT + 2(%rbx), %ax
        cmpw %ax, USED_AT + 2(%rbx)
        je 1f
        sti
        hlt
        jmp wait
1:      ret

handler:
        movl ISR(%rdi), %eax
        movl %eax, ACK(%rdi)
        movl $0, 0xb0(%r9)
        iretq

fail:   movb $'X', %al
        outb %al, $KVMPY_PORT_CONSOLE
        movb $1, %al
        outb %al, $KVMPY_PORT_EXIT
        hlt
idtr:   .word 0xfff
        .quad 0x7000
"""

FINISH = """
        xorb %al, %al
        outb %al, $KVMPY_PORT_EXIT
        hlt
"""


def rng_guest(window: int, gsi: int) -> str:
    """Return a guest that asks for 64 random bytes, of the device in the window at this gpa."""
    return f"""{DRIVER}
main:   movl ${window}, %edi
        cmpl $4, DEVICE_ID(%rdi) ; jne fail
        movl ${gsi}, %eax
        movl $1, %ecx
        call start
        movl %ebp, %ebx
        leal BUFFER_AT(%rbp), %eax
        movl $64, %edx
        movl $WRITE, %ecx
        xorl %esi, %esi
        call submit
        call wait
        {FINISH}"""


CONSOLE = """
        cmpl $3, DEVICE_ID(%rdi) ; jne fail
        movl $2, %ecx
        call start
"""

PRINT = """
        leal 0x800(%rbp), %ebx
        movl $text, %eax
        movl $text_end - text, %edx
        movl $READ, %ecx
        movl $1, %esi
        call submit
"""

READ_BYTE = """
        movl %ebp, %ebx
        leal BUFFER_AT(%rbp), %eax
        movl $1, %edx
        movl $WRITE, %ecx
        xorl %esi, %esi
        call submit
        call wait
"""


def console_guest(window: int, gsi: int, body: str, text: str = "") -> str:
    """Return a guest that starts the console in the window at this gpa and goes on with ``body``."""
    return f"""{DRIVER}
text:   .ascii "{text}"
text_end:
main:   movl ${window}, %edi
        movl ${gsi}, %eax
        {CONSOLE}
        {body}
        {FINISH}"""


PRINT_AND_FINISH = PRINT
"""Does not wait until the device has taken the text."""
PRINT_AND_WAIT = PRINT + "call wait\n"
ECHO = f"""
again:  {READ_BYTE}
        movb BUFFER_AT(%rbp), %al
        outb %al, $KVMPY_PORT_CONSOLE
        cmpb $'q', %al
        jne again
"""
REBOOT_UNTIL_Q = f"""
        {READ_BYTE}
        movb BUFFER_AT(%rbp), %al
        outb %al, $KVMPY_PORT_CONSOLE
        cmpb $'q', %al
        je 9f
        movb $0xfe, %al
        outb %al, $0x64
        hlt
9:
"""
EMERGENCY = """
        movl $'!', CONFIG + 8(%rdi)
"""

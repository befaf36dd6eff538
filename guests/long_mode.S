# long_mode.S -- from protected mode to long mode, over page tables of our own
#
# Teaches:   PAE, CR3, EFER.LME, CR0.PG: the order matters, and a far jump ends it   (Intel SDM vol. 3 section 10.8.5)
# Mode:      multiboot 1, protected mode
# Memory:    0x100000 code   page tables and stack in .bss: the first 16 MiB, one to one, in pages of 2 MiB
# Exits:     IoOut port=0xe9 x56 ; IoOut port=0xf4
# Prints:    multiboot, 32 bits
# Prints:    64 bits: 1 << 40 is 0000010000000000
# Exercise:  map one 2 MiB page more than there is RAM and read from it. Is it a page fault or an exit? Why?
#include "abi.h"

#define MULTIBOOT_HEADER_MAGIC  0x1badb002
#define MULTIBOOT_MAGIC         0x2badb002      /* in %eax: a multiboot loader was here */
#define PRESENT_WRITE           0x03
#define HUGE_PAGE               0x80            /* in a page directory: 2 MiB */
#define CR4_PAE                 0x20
#define CR0_PG                  0x80000000
#define MSR_EFER                0xc0000080
#define EFER_LME                0x100
#define CODE64                  0x08

# The header: within the first 8 KiB of the file. Magic, flags and checksum add up to 0.
        .section .boot, "ax"
        .balign 4
        .long   MULTIBOOT_HEADER_MAGIC, 0, -MULTIBOOT_HEADER_MAGIC

        .text
        .code32
        .globl  _start
_start:
        movl    $stack_end, %esp
        cmpl    $MULTIBOOT_MAGIC, %eax
        jne     finish
        movl    $text_32, %esi
        call    puts

# Three levels: one entry in each of the upper two, eight pages of 2 MiB in the third.
        movl    $pdpt + PRESENT_WRITE, pml4
        movl    $directory + PRESENT_WRITE, pdpt
        movl    $HUGE_PAGE + PRESENT_WRITE, %eax
        xorl    %ecx, %ecx
1:      movl    %eax, directory(, %ecx, 8)
        addl    $0x200000, %eax
        incl    %ecx
        cmpl    $8, %ecx
        jb      1b

# Long mode must be enabled before paging; CR0.PG then makes it active (32-bit code still, until CS changes).
        movl    %cr4, %eax
        orl     $CR4_PAE, %eax
        movl    %eax, %cr4
        movl    $pml4, %eax
        movl    %eax, %cr3
        movl    $MSR_EFER, %ecx
        rdmsr
        orl     $EFER_LME, %eax
        wrmsr
        movl    %cr0, %eax
        orl     $CR0_PG, %eax
        movl    %eax, %cr0
        lgdt    gdt_pointer
        ljmp    $CODE64, $long_mode

        .code64
long_mode:
        movl    $text_64, %esi
        call    puts
        movl    $1, %ebx
        shlq    $40, %rbx               # no 32-bit register holds this
        movq    %rbx, %rax
        shrq    $32, %rax
        call    put_hex
        movl    %ebx, %eax
        call    put_hex
        movb    $'\n', %al
        outb    %al, $KVMPY_PORT_CONSOLE
        jmp     finish

# Assembled for 64 bits. Of these routines only `puts` and `finish` are the same bytes in both modes.
#include "console.inc"

        .section .rodata
        .balign 8
gdt:    .quad   0
        .quad   0x00af9b000000ffff      # code, L=1
gdt_pointer:
        .word   gdt_pointer - gdt - 1
        .quad   gdt

text_32:
        .asciz  "multiboot, 32 bits\n"
text_64:
        .asciz  "64 bits: 1 << 40 is "

        .bss
        .balign 4096
pml4:   .skip   4096
pdpt:   .skip   4096
directory:
        .skip   4096
        .skip   256
stack_end:

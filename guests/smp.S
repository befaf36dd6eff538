# smp.S -- guest.img: every core says its name, and all memory above 4 GiB is touched
#
# Teaches:   a small kernel from the loader's first instruction to many cores in C; read smp.c next   (Multiboot 0.6.96)
# Mode:      multiboot 1, protected mode
# Run:       --cores 2 --mem 3.5G
# Memory:    0x8000 start of the other cores   0x100000 code   0x1000000 page directories, if there is RAM above 4 GiB
# Exits:     (IoIn port=0x3fd ; IoOut port=0x3f8) x293 ; IoOut port=0xf4 data=0x0
# Exits:     vcpu 1: (IoIn port=0x3fd ; IoOut port=0x3f8) x18
# Prints:    kvmpy guest, 2 cores
# Prints:    0000000000000000 + 000000000009fc00 ram
# Prints:    000000000009fc00 + 0000000000060400 reserved
# Prints:    0000000000100000 + 00000000bff00000 ram
# Prints:    00000000fffbc000 + 0000000000044000 reserved
# Prints:    0000000100000000 + 0000000020000000 ram
# Prints:    core 0: APIC id 0
# Prints:    core 1: APIC id 1
# Prints:    256 words above 4 GiB, sum 0000010ff0000000
# Exercise:  start all cores at once (ICR 0xc4500 and 0xc4608): what else must each have for its own, besides the lock?
#include "abi.h"
#include "ap.inc"

#define MULTIBOOT_HEADER_MAGIC  0x1badb002
#define MULTIBOOT_MEMORY_INFO   0x02            /* we need a memory map */
#define PRESENT_WRITE           0x03
#define HUGE_PAGE               0x83            /* present, writable, 2 MiB */
#define LOCAL_APIC              0xfee00000
#define CR4_PAE                 0x20
#define CR0_PG                  0x80000000
#define MSR_EFER                0xc0000080
#define EFER_LME                0x100

        .section .boot, "ax"
        .balign 4
        .long   MULTIBOOT_HEADER_MAGIC, MULTIBOOT_MEMORY_INFO, -(MULTIBOOT_HEADER_MAGIC + MULTIBOOT_MEMORY_INFO)

# %eax and %ebx come from the loader and are the arguments of smp_main. The page tables are ready in the file.
        .text
        .code32
        .globl  _start
_start:
        movl    $stack_end, %esp
        movl    %eax, %ebp
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
        ljmp    $AP_CODE64, $long_mode

        .code64
long_mode:
        movl    $AP_DATA, %eax
        movw    %ax, %ss
        call    prepare_trampoline
        movl    $ap_stack_end, ap_stack
        movl    %ebp, %edi
        movl    %ebx, %esi
        call    smp_main
        outb    %al, $KVMPY_PORT_EXIT   # what it returned is the status
1:      hlt
        jmp     1b

# One stack serves all the other cores, for they start one after another: a core is off it before it says so.
ap_main:
        call    smp_other_core
        movl    $1, other_core_done
2:      cli
        hlt
        jmp     2b

        .globl  prepare_trampoline, other_core_done, pdpt

        .data
gdt_pointer:
        .word   ap_gdt_end - ap_gdt - 1
        .long   ap_gdt

# The first GiB and the local APIC, one to one. smp.c adds what lies above 4 GiB.
        .balign 4096
pml4:   .quad   pdpt + PRESENT_WRITE
        .balign 4096
pdpt:   .quad   first_gib + PRESENT_WRITE, 0, 0, last_gib + PRESENT_WRITE
        .balign 4096
first_gib:
        .set    page, 0
        .rept   512
        .quad   page + HUGE_PAGE
        .set    page, page + 0x200000
        .endr
last_gib:
        .skip   (LOCAL_APIC - 0xc0000000) / 0x200000 * 8
        .quad   LOCAL_APIC + HUGE_PAGE
        .balign 4096

        .bss
other_core_done:
        .skip   4
        .balign 16
        .skip   4096
stack_end:
        .skip   4096
ap_stack_end:

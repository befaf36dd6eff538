# disk_guest.S -- boots by PVH under kvmpy and under QEMU's microvm, and goes down to CPL3, where disk_guest.c works
#
# The first GiB and the one that ends at 4 GiB are mapped one to one, for CPL3 too: the driver's loop and its device
# registers need no kernel. INT3 comes back here: what disk_guest.c left in `report` is printed, and the run ends.
#include "abi.h"
#include "idt.inc"
#include "user.inc"

#define XEN_ELFNOTE_PHYS32_ENTRY 18
#define COMMAND_LINE            0x18            /* hvm_start_info: u64 address */
#define TABLE                   0x07            /* present, writable, user */
#define HUGE_PAGE               0x87            /* the same, 2 MiB */
#define CR4_PAE                 0x20
#define CR0_PG                  0x80000000
#define MSR_EFER                0xc0000080
#define EFER_LME                0x100

        .section .note.Xen, "a", @note
        .balign 4
        .long   4, 4, XEN_ELFNOTE_PHYS32_ENTRY
        .asciz  "Xen"
        .long   _start

        .text
        .code32
        .globl  _start
_start:
        movl    $kernel_stack_end, %esp
        movl    COMMAND_LINE(%ebx), %eax
        movl    %eax, command_line
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
        lgdt    user_gdt_pointer
        ljmp    $KERNEL_CODE, $long_mode

        .code64
long_mode:
        call    user_setup
        movl    $pml4, %eax
        movq    %rax, %cr3
        gate    3, finished, USER
        load_idt
        movl    $user, %edi
        jmp     enter_user

user:   movl    $c_stack_end, %esp
        movl    command_line, %edi
        call    disk_main
        int3

finished:
        movl    $report, %esi
        call    puts
        jmp     finish

        .globl  command_line, report

#include "console.inc"

        .data
        .balign 4096
pml4:   .quad   pdpt + TABLE
        .balign 4096
pdpt:   .quad   first_gib + TABLE, 0, 0, last_gib + TABLE
        .balign 4096
first_gib:
        .set    page, 0
        .rept   512
        .quad   page + HUGE_PAGE
        .set    page, page + 0x200000
        .endr
last_gib:
        .set    page, 0xc0000000
        .rept   512
        .quad   page + HUGE_PAGE
        .set    page, page + 0x200000
        .endr
command_line:
        .long   0

        .bss
        .balign 16
report: .skip   256
        .skip   16384
c_stack_end:

# acpi_poweroff.S -- switch the machine off, as an operating system does
#
# Teaches:   RSDP, XSDT, FADT, and what a write to PM1a control does   (ACPI 6.5 sections 5.2.5 to 5.2.9, 4.8.3.2)
# Mode:      ELF64, long mode, CPL0
# Memory:    0x100000 code   0xe0000 to 0xfffff: where a BIOS puts the RSDP, on a boundary of 16
# Exits:     IoOut port=0xe9 x31 ; IoOut port=0x604 size=2 data=0x3400
# Prints:    power off by port 00000604
# Prints:    bye
# Exercise:  SLP_TYP for S5 is 5 on this board. Find \_S5 in the DSDT instead of knowing it.
#include "abi.h"

#define BIOS_AREA       0xe0000
#define BIOS_AREA_END   0x100000
#define RSDP_XSDT       24                      /* u64 */
#define SDT_LENGTH      4                       /* u32, the header included */
#define SDT_ENTRIES     36
#define FADT_PM1A_CONTROL 64                    /* u32, a port */
#define SLEEP           (KVMPY_ACPI_S5 << 10 | 1 << 13)

        .code64
        .globl  _start
_start:
        movl    $stack_end, %esp

        movq    $0x2052545020445352, %rax       # "RSD PTR "
        movl    $BIOS_AREA, %ebx
1:      cmpq    %rax, (%rbx)
        je      2f
        addl    $16, %ebx
        cmpl    $BIOS_AREA_END, %ebx
        jb      1b
        jmp     finish

# The XSDT: a header, then 64-bit addresses of further tables. The one named FACP is the FADT.
2:      movq    RSDP_XSDT(%rbx), %rbx
        movl    SDT_LENGTH(%rbx), %ecx
        addq    %rbx, %rcx
        addq    $SDT_ENTRIES, %rbx
3:      cmpq    %rcx, %rbx
        jae     finish
        movq    (%rbx), %rbp
        addq    $8, %rbx
        cmpl    $0x50434146, (%rbp)             # "FACP"
        jne     3b

        movl    $text_off, %esi
        call    puts
        movl    FADT_PM1A_CONTROL(%rbp), %eax
        call    put_hex
        movl    $text_bye, %esi
        call    puts

        movl    FADT_PM1A_CONTROL(%rbp), %edx
        movl    $SLEEP, %eax
        outw    %ax, %dx                        # the last exit
4:      hlt
        jmp     4b

        .section .rodata
text_off:
        .asciz  "power off by port "
text_bye:
        .asciz  "\nbye\n"
        .text

#include "console.inc"

        .bss
        .balign 16
        .skip   256
stack_end:

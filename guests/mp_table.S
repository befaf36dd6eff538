# mp_table.S -- how many processors does this board have?
#
# Teaches:   the MP floating pointer, and entries of two sizes   (MultiProcessor Specification 1.4, chapter 4)
# Mode:      ELF64, long mode, CPL0
# Run:       --cores 2
# Memory:    0x100000 code   0x9fc00 the extended BIOS data area, where the pointer is
# Exits:     IoOut port=0xe9 x48 ; IoOut port=0xf4
# Prints:    processor: APIC id 0, boot
# Prints:    processor: APIC id 1
# Exercise:  print the I/O interrupt entries (type 3) too: which pin of the IOAPIC belongs to IRQ 0?
#include "abi.h"

#define EBDA            0x9fc00
#define EBDA_SEARCHED   0x400                   /* its first KiB */
#define FLOATING_TABLE  4                       /* u32 */
#define TABLE_COUNT     34                      /* u16 */
#define TABLE_ENTRIES   44
#define ENTRY_PROCESSOR 0
#define PROCESSOR_APIC  1
#define PROCESSOR_FLAGS 3                       /* bit 0 usable, bit 1 the boot processor */
#define PROCESSOR_SIZE  20
#define OTHER_SIZE      8

        .code64
        .globl  _start
_start:
        movl    $stack_end, %esp
        movl    $EBDA, %ebx
1:      cmpl    $0x5f504d5f, (%rbx)             # "_MP_"
        je      2f
        addl    $16, %ebx
        cmpl    $EBDA + EBDA_SEARCHED, %ebx
        jb      1b
        jmp     finish

2:      movl    FLOATING_TABLE(%rbx), %ebx
        movzwl  TABLE_COUNT(%rbx), %ebp
        addl    $TABLE_ENTRIES, %ebx

# Each entry begins with its type; processors are 20 bytes, everything else is 8.
3:      subl    $1, %ebp
        jb      finish
        cmpb    $ENTRY_PROCESSOR, (%rbx)
        je      4f
        addl    $OTHER_SIZE, %ebx
        jmp     3b

4:      movl    $text_processor, %esi
        call    puts
        movzbl  PROCESSOR_APIC(%rbx), %eax
        call    put_dec
        testb   $2, PROCESSOR_FLAGS(%rbx)
        jz      5f
        movl    $text_boot, %esi
        call    puts
5:      movb    $'\n', %al
        outb    %al, $KVMPY_PORT_CONSOLE
        addl    $PROCESSOR_SIZE, %ebx
        jmp     3b

        .section .rodata
text_processor:
        .asciz  "processor: APIC id "
text_boot:
        .asciz  ", boot"
        .text

#include "console.inc"

        .bss
        .balign 16
        .skip   256
stack_end:

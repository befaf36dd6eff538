# pvh_hello.S -- the boot protocol that fits on a postcard
#
# Teaches:   an ELF note names the 32-bit entry; %ebx points to hvm_start_info   (Xen, public/arch-x86/hvm/start_info.h)
# Mode:      PVH, protected mode
# Run:       --append world
# Memory:    0x100000 code   %ebx the start information
# Exits:     IoOut port=0xe9 x31 ; IoOut port=0xf4
# Prints:    PVH says: world
# Prints:    map entries: 4
# Exercise:  let the ELF header's entry differ from the note's (ENTRY in elf.ld). Which one does kvmpy take?
#include "abi.h"

#define XEN_ELFNOTE_PHYS32_ENTRY 18
#define START_INFO_MAGIC        0x336ec578
#define COMMAND_LINE            0x18            /* u64 address */
#define MAP_ENTRY_COUNT         0x30            /* u32 */

        .section .note.Xen, "a", @note
        .balign 4
        .long   4, 4, XEN_ELFNOTE_PHYS32_ENTRY
        .asciz  "Xen"
        .long   _start

        .text
        .code32
        .globl  _start
_start:
        movl    $stack_end, %esp
        cmpl    $START_INFO_MAGIC, (%ebx)
        jne     finish
        movl    $text_says, %esi
        call    puts
        movl    COMMAND_LINE(%ebx), %esi
        call    puts
        movl    $text_entries, %esi
        call    puts
        movl    MAP_ENTRY_COUNT(%ebx), %eax
        call    put_dec
        movb    $'\n', %al
        outb    %al, $KVMPY_PORT_CONSOLE
        jmp     finish

        .section .rodata
text_says:
        .asciz  "PVH says: "
text_entries:
        .asciz  "\nmap entries: "
        .text

#include "console.inc"

        .bss
        .balign 16
        .skip   256
stack_end:

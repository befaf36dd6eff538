# memory_map.S -- where may a kernel put things? The loader says, by multiboot 2
#
# Teaches:   tags of 8-byte alignment, and a memory map with holes   (Multiboot2 2.0 section 3.6)
# Mode:      multiboot 2, protected mode
# Run:       --append hello
# Memory:    0x100000 code   %ebx the boot information
# Exits:     IoOut port=0xe9 x190 ; IoOut port=0xf4
# Prints:    command line: hello
# Prints:    0000000000000000 + 000000000009fc00 ram
# Prints:    000000000009fc00 + 0000000000060400 reserved
# Prints:    0000000000100000 + 0000000007f00000 ram
# Prints:    00000000fffbc000 + 0000000000044000 reserved
# Exercise:  run with --mem 3.5G. Which line is new, and how much RAM would a kernel lose that ignores it?
#include "abi.h"

#define MULTIBOOT2_HEADER_MAGIC 0xe85250d6
#define MULTIBOOT2_MAGIC        0x36d76289      /* in %eax */
#define ARCHITECTURE_I386       0
#define TAG_END                 0
#define TAG_COMMAND_LINE        1
#define TAG_MEMORY_MAP          6
#define TAG_SIZE                4               /* u32 */
#define COMMAND_LINE_TEXT       8
#define MAP_ENTRY_SIZE          8               /* u32 */
#define MAP_ENTRIES             16
#define ENTRY_TYPE              16              /* u32: 1 is RAM */

# The header: within the first 32 KiB of the file, 8-byte aligned, ended by an empty tag.
        .section .boot, "ax"
        .balign 8
header: .long   MULTIBOOT2_HEADER_MAGIC, ARCHITECTURE_I386, header_size
        .long   -(MULTIBOOT2_HEADER_MAGIC + ARCHITECTURE_I386 + header_size)
        .word   TAG_END, 0
        .long   8
        .set    header_size, . - header

        .text
        .code32
        .globl  _start
_start:
        movl    $stack_end, %esp
        cmpl    $MULTIBOOT2_MAGIC, %eax
        jne     finish
        addl    $8, %ebx                # total size, reserved; then the tags

next_tag:
        movl    (%ebx), %eax
        cmpl    $TAG_END, %eax
        je      finish
        cmpl    $TAG_COMMAND_LINE, %eax
        je      command_line
        cmpl    $TAG_MEMORY_MAP, %eax
        je      memory_map
skip_tag:
        movl    TAG_SIZE(%ebx), %eax
        addl    $7, %eax
        andl    $~7, %eax
        addl    %eax, %ebx
        jmp     next_tag

command_line:
        movl    $text_command_line, %esi
        call    puts
        leal    COMMAND_LINE_TEXT(%ebx), %esi
        call    puts
        movb    $'\n', %al
        outb    %al, $KVMPY_PORT_CONSOLE
        jmp     skip_tag

# The entry size is in the tag, for later versions may have longer ones.
memory_map:
        leal    MAP_ENTRIES(%ebx), %ebp
1:      movl    %ebp, %eax
        subl    %ebx, %eax
        cmpl    TAG_SIZE(%ebx), %eax
        jae     skip_tag
        movl    4(%ebp), %eax
        call    put_hex
        movl    (%ebp), %eax
        call    put_hex
        movl    $text_plus, %esi
        call    puts
        movl    12(%ebp), %eax
        call    put_hex
        movl    8(%ebp), %eax
        call    put_hex
        movl    $text_ram, %esi
        cmpl    $1, ENTRY_TYPE(%ebp)
        je      2f
        movl    $text_reserved, %esi
2:      call    puts
        addl    MAP_ENTRY_SIZE(%ebx), %ebp
        jmp     1b

        .section .rodata
text_command_line:
        .asciz  "command line: "
text_plus:
        .asciz  " + "
text_ram:
        .asciz  " ram\n"
text_reserved:
        .asciz  " reserved\n"
        .text

#include "console.inc"

        .bss
        .balign 16
        .skip   256
stack_end:

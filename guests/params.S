# params.S -- who am I? The parameter page
#
# Teaches:   a page that the VMM fills before the first instruction: name, cores, pairs, heartbeat   (guests/abi.h)
# Mode:      ELF64, long mode, CPL0
# Run:       --cores 2 --param colour=green --param legs=4
# Memory:    0x100000 code   0xe0000 the parameter page
# Exits:     IoOut port=0xe9 x56 ; IoOut port=0xf4
# Prints:    name: params
# Prints:    cores: 2
# Prints:    colour=green
# Prints:    legs=4
# Prints:    heartbeats: 3
# Exercise:  print the 16 bytes of the id as a UUID is written: 8-4-4-4-12 digits. Is it another one at each run?
#include "abi.h"

        .code64
        .globl  _start
_start:
        movl    $stack_end, %esp
        movl    $KVMPY_PARAMS, %ebx

# Another VMM has no such page: look before you read.
        movq    $KVMPY_PARAMS_MAGIC, %rax
        cmpq    %rax, KVMPY_PARAMS_OFF_MAGIC(%rbx)
        jne     finish

        movl    $text_name, %esi
        call    puts
        leal    KVMPY_PARAMS_OFF_NAME(%rbx), %esi
        call    puts
        movl    $text_cores, %esi
        call    puts
        movl    KVMPY_PARAMS_OFF_CORES(%rbx), %eax
        call    put_dec
        movb    $'\n', %al
        outb    %al, $KVMPY_PORT_CONSOLE

# The pairs: strings one behind the other, `key=value`, for as many bytes as the page says.
        leal    KVMPY_PARAMS_OFF_PAIRS(%rbx), %esi
        movl    KVMPY_PARAMS_OFF_PAIRS_LEN(%rbx), %ebp
        addl    %esi, %ebp
1:      cmpl    %ebp, %esi
        jae     2f
        call    puts                    # leaves %esi behind the NUL
        movb    $'\n', %al
        outb    %al, $KVMPY_PORT_CONSOLE
        jmp     1b

# Plain memory writes, so no exit: the host looks when it likes.
2:      incq    KVMPY_PARAMS_OFF_HEARTBEAT(%rbx)
        incq    KVMPY_PARAMS_OFF_HEARTBEAT(%rbx)
        incq    KVMPY_PARAMS_OFF_HEARTBEAT(%rbx)
        movl    $text_beats, %esi
        call    puts
        movl    KVMPY_PARAMS_OFF_HEARTBEAT(%rbx), %eax
        call    put_dec
        movb    $'\n', %al
        outb    %al, $KVMPY_PORT_CONSOLE
        jmp     finish

        .section .rodata
text_name:
        .asciz  "name: "
text_cores:
        .asciz  "\ncores: "
text_beats:
        .asciz  "heartbeats: "
        .text

#include "console.inc"

        .bss
        .balign 16
        .skip   256
stack_end:

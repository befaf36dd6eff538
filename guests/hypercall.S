# hypercall.S -- ask the hypervisor: who are you, and do you take a call from a user?
#
# Teaches:   CPUID leaf 0x40000000 names KVM; a hypercall from CPL3 gives -EPERM or a fault, as the host has it
# Mode:      ELF64, long mode, CPL0
# Memory:    0x100000 code   page tables, GDT and TSS: see user.inc
# Exits:     IoOut port=0xe9 x65 ; IoOut port=0xf4
# Prints:    hypervisor: KVMKVMKVM
# Prints:    vmcall: back
# Prints:    vmmcall: back
# Prints:    the guest lives
# Exercise:  print what came back. -1 is EPERM: not for this caller. Which vendor has which instruction?
#include "abi.h"
#include "idt.inc"

#define CPUID_HYPERVISOR 0x40000000
#define CALL_PUTS       1

        .globl  _start
_start:
        movl    $kernel_stack_end, %esp
        call    user_setup
        gate    3, system_call, USER
        gate    6, refused
        gate    13, refused_with_code
        load_idt

# Twelve letters in ebx, ecx, edx. Asked at CPL0, where a hypervisor can always answer.
        movl    $CPUID_HYPERVISOR, %eax
        cpuid
        movl    %ebx, name
        movl    %ecx, name + 4
        movl    %edx, name + 8
        movl    $text_name, %esi
        call    puts
        movb    $'\n', %al
        outb    %al, $KVMPY_PORT_CONSOLE
        movl    $user, %edi
        jmp     enter_user

# Intel has one of the two, AMD the other; each is three bytes. Some hosts answer the foreign one too.
user:
        movl    $~0, %eax               # no such call
        vmcall
        movl    $CALL_PUTS, %eax
        movl    $text_vmcall, %edi
        int3
        movl    $~0, %eax
        vmmcall
        movl    $CALL_PUTS, %eax
        movl    $text_vmmcall, %edi
        int3
        xorl    %eax, %eax
        int3
1:      jmp     1b

system_call:
        testl   %eax, %eax
        jz      1f
        movl    %edi, %esi
        call    puts
        iretq
1:      movl    $text_lives, %esi
        call    puts
        jmp     finish

# Not this instruction, or not at CPL3: step over it.
refused_with_code:
        addq    $8, %rsp
refused:
        addq    $3, (%rsp)
        iretq

        .data
text_name:
        .ascii  "hypervisor: "
name:   .skip   12
        .byte   0
text_vmcall:
        .asciz  "vmcall: back\n"
text_vmmcall:
        .asciz  "vmmcall: back\n"
text_lives:
        .asciz  "the guest lives\n"
        .text

#include "user.inc"
#include "console.inc"

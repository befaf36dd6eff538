/* native.c -- see native.h. */
#include "native.h"

#include <stddef.h>

#define FIELD(name, at) _Static_assert(offsetof(struct kvmpy_native, name) == at, "the offset below")
FIELD(rflags, 128); FIELD(code, 136); FIELD(xsave, 144); FIELD(mask, 152); FIELD(is_new, 160);

/* The initial state of all components (XSTATE_BV is 0), and MXCSR: what the FPU holds afterwards. */
__attribute__((used, aligned(64))) static const uint32_t initial[576 / 4] = {[24 / 4] = 0x1f80};

/* CPUID: new code was written through another mapping, so a serializing instruction comes before it (SDM vol. 3
 * §11.6). The stack is then: own MXCSR and x87 control word, the code, the struct (from the call on: guest's RDI). */
__asm__(".text\n.globl kvmpy_native\n.hidden kvmpy_native\n.type kvmpy_native, @function\nkvmpy_native:\n"
        "push %rbx; push %rbp; push %r12; push %r13; push %r14; push %r15\n"
        "cmpq $0, 160(%rdi); je 3f; xor %eax, %eax; cpuid; 3:\n"
        "push %rdi; pushq 136(%rdi); push %rax; stmxcsr (%rsp); fnstcw 4(%rsp)\n"
        "mov 144(%rdi), %rcx; mov 152(%rdi), %eax; mov 156(%rdi), %edx; jrcxz 1f; xrstor64 (%rcx)\n"
        "1: mov 128(%rdi), %rax; and $0x8d5, %eax; push %rax; popfq\n"
        "mov (%rdi), %rax; mov 8(%rdi), %rcx; mov 16(%rdi), %rdx; mov 24(%rdi), %rbx; mov 40(%rdi), %rbp\n"
        "mov 48(%rdi), %rsi; mov 64(%rdi), %r8; mov 72(%rdi), %r9; mov 80(%rdi), %r10; mov 88(%rdi), %r11\n"
        "mov 96(%rdi), %r12; mov 104(%rdi), %r13; mov 112(%rdi), %r14; mov 120(%rdi), %r15; mov 56(%rdi), %rdi\n"
        "call *8(%rsp); xchg %rdi, 16(%rsp); pushfq; popq 128(%rdi)\n"
        "mov %rax, (%rdi); mov %rcx, 8(%rdi); mov %rdx, 16(%rdi); mov %rbx, 24(%rdi); mov %rbp, 40(%rdi)\n"
        "mov %rsi, 48(%rdi); mov %r8, 64(%rdi); mov %r9, 72(%rdi); mov %r10, 80(%rdi); mov %r11, 88(%rdi)\n"
        "mov %r12, 96(%rdi); mov %r13, 104(%rdi); mov %r14, 112(%rdi); mov %r15, 120(%rdi)\n"
        "mov 16(%rsp), %rax; mov %rax, 56(%rdi); mov 144(%rdi), %rcx; jrcxz 2f\n"
        "mov 152(%rdi), %eax; mov 156(%rdi), %edx; xsave64 (%rcx); lea initial(%rip), %rcx; xrstor64 (%rcx)\n"
        "2: ldmxcsr (%rsp); fldcw 4(%rsp); add $24, %rsp\n"
        "pop %r15; pop %r14; pop %r13; pop %r12; pop %rbp; pop %rbx; ret\n"
        ".size kvmpy_native, . - kvmpy_native\n");

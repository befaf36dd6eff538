/* native_oracle.c -- execute instructions as they are, one by one, and say what each made of the processor's state.
 *
 * The oracle of kvmpy's native execution, and as unlike it as can be: a signal frame is given the registers, flags
 * and FPU state, and the trap flag; the kernel loads them all, the instruction runs at its own address with its own
 * operands, and the next signal's frame tells what it left: SIGTRAP, or which fault it raised. Records of struct
 * state go from standard input to standard output.
 */
#define _GNU_SOURCE
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#define CODE 0x120000
#define MEMORY 0x101000
#define LOW 0x100000
#define XSAVE 2688

struct state {
    uint64_t registers[16];
    uint64_t rflags;
    uint8_t code[16];
    uint64_t signal;
    uint8_t xsave[XSAVE];
    uint8_t memory[256];
};

/* The numbers of the registers in a signal frame, by those of the processor. */
static const int places[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                               REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
#define STATUS 0x8d5
#define TRAP 0x100
#define SOFTWARE 464 /* bytes from here to 512 are the kernel's */

static struct state state;
static gregset_t own;
static uint8_t own_xsave[XSAVE];
static int inside;

static void on_signal(int number, siginfo_t *info, void *frame)
{
    mcontext_t *machine = &((ucontext_t *)frame)->uc_mcontext;
    uint8_t *xsave = (uint8_t *)machine->fpregs;
    if (!inside) {
        memcpy(own, machine->gregs, sizeof own);
        memcpy(own_xsave, xsave, XSAVE);
        for (int i = 0; i < 16; i++)
            machine->gregs[places[i]] = state.registers[i];
        machine->gregs[REG_EFL] = (machine->gregs[REG_EFL] & ~STATUS) | (state.rflags & STATUS) | TRAP;
        machine->gregs[REG_RIP] = CODE;
        memcpy(xsave, state.xsave, SOFTWARE);
        memcpy(xsave + 512, state.xsave + 512, XSAVE - 512);
        inside = 1;
        return;
    }
    for (int i = 0; i < 16; i++)
        state.registers[i] = machine->gregs[places[i]];
    state.rflags = machine->gregs[REG_EFL] & STATUS;
    state.signal = number;
    memcpy(state.xsave, xsave, XSAVE);
    memcpy(machine->gregs, own, sizeof own);
    memcpy(xsave, own_xsave, SOFTWARE);
    memcpy(xsave + 512, own_xsave + 512, XSAVE - 512);
    inside = 0;
}

int main(void)
{
    static uint8_t stack[1 << 18];
    stack_t alternate = {.ss_sp = stack, .ss_size = sizeof stack};
    struct sigaction action = {.sa_sigaction = on_signal, .sa_flags = SA_SIGINFO | SA_ONSTACK};
    const int numbers[] = {SIGTRAP, SIGILL, SIGFPE, SIGSEGV, SIGBUS};
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE;
    sigaltstack(&alternate, NULL);
    for (unsigned i = 0; i < sizeof numbers / sizeof *numbers; i++)
        sigaction(numbers[i], &action, NULL);
    if (mmap((void *)LOW, 0x10000, PROT_READ | PROT_WRITE, flags, -1, 0) == MAP_FAILED ||
        mmap((void *)CODE, 0x1000, PROT_READ | PROT_WRITE | PROT_EXEC, flags, -1, 0) == MAP_FAILED)
        return 1;
    while (fread(&state, sizeof state, 1, stdin) == 1) {
        memcpy((void *)MEMORY, state.memory, sizeof state.memory);
        memset((void *)CODE, 0xcc, 64);
        memcpy((void *)CODE, state.code, sizeof state.code);
        __asm__ volatile("int3" ::: "memory");
        memcpy(state.memory, (void *)MEMORY, sizeof state.memory);
        fwrite(&state, sizeof state, 1, stdout);
    }
    return 0;
}

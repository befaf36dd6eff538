/* native.h -- one instruction of the guest, executed by the host's processor. Floor: machine.
 *
 * The caller answers for the instruction: it touches no memory but what its registers are known to point at, neither
 * the stack nor RSP, and raises no exception. Nothing here is shared between threads.
 */
#ifndef KVMPY_NATIVE_H
#define KVMPY_NATIVE_H

#include <stdint.h>

struct kvmpy_native {
    uint64_t registers[16]; /* by number; RSP is not loaded and keeps its value */
    uint64_t rflags;        /* CF PF AF ZF SF OF; the other flags are the host's */
    const void *code;       /* the instruction, and RET */
    void *xsave;            /* the guest's FPU state, as XSAVE has it, 64-byte aligned; NULL: the FPU is not touched */
    uint64_t mask;          /* which of its components */
    uint64_t is_new;        /* the code was written since the last call */
};

/* Load the registers, call the code, and put into the struct and the XSAVE area what it left. */
void kvmpy_native(struct kvmpy_native *native);

#endif

/* assist.h -- completes what KVM leaves undone on some hosts, where a way through Python would be felt. Floor: machine.
 *
 * Twins, which also say why: interrupts.py, integer.py and syscall.py in kvmpy/machine/assist/.
 */
#ifndef KVMPY_ASSIST_H
#define KVMPY_ASSIST_H

#include <stdbool.h>
#include <stdint.h>

struct kvmpy_loop;

/* One vCPU's. The MSRs of SYSCALL are as the guest wrote them. */
struct kvmpy_assist {
    const struct kvmpy_memory *memory;
    uint64_t page_fault_handler; /* where a breakpoint is: the guest's handler of vector 14; 0: there is none */
    uint64_t star, lstar, fmask;
    uint64_t int3, clac, stac, syscall, page_fault; /* how often each was completed */
};

/* Complete what made the exit in the run page; false: it is Python's. */
bool kvmpy_assist(struct kvmpy_loop *loop);

#endif

/* virtqueue.c -- see virtqueue.h. */
#include "kvmpy.h"

#include <unistd.h>

void kvmpy_interrupt_raise(struct kvmpy_interrupt *interrupt, uint64_t bits)
{
    __atomic_fetch_or(&interrupt->status, bits, __ATOMIC_SEQ_CST);
    uint64_t one = 1;
    ssize_t ignored = write(interrupt->fd, &one, sizeof one);
    (void)ignored;
}

void kvmpy_interrupt_acknowledge(struct kvmpy_interrupt *interrupt, uint64_t bits)
{
    __atomic_fetch_and(&interrupt->status, ~bits, __ATOMIC_SEQ_CST);
}

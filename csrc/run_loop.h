/* run_loop.h -- KVM_RUN until an exit that is for Python. Floor: kvm.
 *
 * Python gives a table of address ranges; the loop answers those marked for C and returns with everything else. It
 * allocates nothing, calls nothing back and owns nothing: every pointer in `struct kvmpy_loop` is the caller's.
 */
#ifndef KVMPY_RUN_LOOP_H
#define KVMPY_RUN_LOOP_H

#include <linux/kvm.h>
#include <stddef.h>
#include <stdint.h>
#include <time.h>

struct kvmpy_serial;
struct kvmpy_assist;

enum kvmpy_space { KVMPY_PIO, KVMPY_MMIO };

/* What the loop does with an access to a range. */
enum kvmpy_action {
    KVMPY_TO_PYTHON, /* return to the caller */
    KVMPY_CONSTANT,  /* read: the low bytes of `value` */
    KVMPY_SINK,      /* write: thrown away */
    KVMPY_COUNT,     /* write: `value` += 1; read: the low bytes of `value` */
    KVMPY_SERIAL,    /* write: the byte goes to `serial`; to Python when that is full */
    KVMPY_EXIT,      /* write: ends the run; the value written is in exit.data */
    KVMPY_WORD,      /* read of the whole range: `*word` */
    KVMPY_CLEAR,     /* write of the whole range: the bits written are cleared in `*word` */
};

/* [first, last] of one space; the table is sorted by (space, first) and does not overlap. */
struct kvmpy_range {
    uint64_t first, last;
    uint64_t value;
    struct kvmpy_serial *serial;
    uint64_t *word; /* other threads may change it at any time */
    uint8_t space, on_read, on_write;
};

struct kvmpy_range_count {
    uint64_t reads, writes;
};

/* Why kvmpy_run came back. */
enum kvmpy_stop {
    KVMPY_STOP_EXIT,      /* an exit for the caller: `exit` tells it */
    KVMPY_STOP_SIGNAL,    /* EINTR: some signal; call again */
    KVMPY_STOP_KICK,      /* kvmpy_kick */
    KVMPY_STOP_BUDGET,    /* `max_exits` reached */
    KVMPY_STOP_DEADLINE,  /* `deadline_ns` passed */
    KVMPY_STOP_EXIT_PORT, /* a range with KVMPY_EXIT was written */
    KVMPY_STOP_ERROR,     /* KVM_RUN failed: `error` is the errno */
    KVMPY_STOP_OUT,       /* as KVMPY_STOP_EXIT, and it is the commonest: one element written to a port */
};

#define KVMPY_LOOP_TO_PYTHON 1u /* flag: every exit goes to the caller (--trace) */
#define KVMPY_LOOP_TIMES 2u     /* flag: add up cycles_in_run */

#define KVMPY_NR_REASONS 64
#define KVMPY_RING 64 /* exits kept for post-mortems */

/* One exit as Python reads it, and as the ring keeps it. For PIO with count > 1 the data stay in the run page. */
struct kvmpy_exit {
    uint64_t number;  /* the exit's ordinal on this vCPU, from 1 */
    uint64_t rip;     /* from sync regs; 0 where the host has none */
    uint64_t address; /* port or guest physical address */
    uint64_t data;    /* little-endian; of a read answered in C: the reply */
    uint64_t size;    /* of one element, in bytes; wide because Python reads the struct by words */
    uint64_t buffer;  /* where the data are: bytes from the start of the run page */
    uint32_t reason;  /* KVM_EXIT_* */
    uint32_t count;
    uint8_t is_write;
};

struct kvmpy_loop {
    struct kvm_run *run;
    struct kvmpy_assist *assist;      /* what completes instructions that KVM could not, or NULL */
    struct kvmpy_range *ranges;
    struct kvmpy_range_count *counts; /* one for each range, this vCPU's own */
    uint64_t *stamps;                 /* TSC pairs (KVM_RUN entered, KVM_RUN returned), or NULL */
    uint64_t stamps_capacity, stamps_length; /* in pairs */
    uint64_t max_exits;               /* of exits_total; UINT64_MAX: none */
    uint64_t deadline_ns;             /* CLOCK_MONOTONIC; 0: none */
    uint64_t exits_total;
    uint64_t cycles_in_run;           /* TSC cycles inside KVM_RUN, with KVMPY_LOOP_TIMES */
    uint64_t exits[KVMPY_NR_REASONS]; /* by reason; the last also counts all above it */
    struct kvmpy_exit exit;           /* the last one */
    struct kvmpy_exit ring[KVMPY_RING]; /* exit n is at (n - 1) % KVMPY_RING */
    uint32_t nr_ranges;
    uint32_t flags;
    int32_t vcpu_fd;
    int32_t error;
    int32_t tid;      /* the thread inside kvmpy_run, or 0 */
    uint32_t kicked;
    uint32_t has_exit; /* kvmpy_complete met a new exit: the next kvmpy_run starts with it */
    int32_t timer_tid; /* the thread that `timer` signals, or 0 */
    timer_t timer;
};

/* Install the empty handler of the kick signal. Once a process; returns 0 or -errno. */
int kvmpy_install_kick_handler(void);

int kvmpy_run(struct kvmpy_loop *loop);

/* Count and answer the exit in the run page as the loop does, without entering the guest: kvmpy_stop, or -1 when C
 * has answered. What tests compare with the Python bus. */
int kvmpy_handle_exit(struct kvmpy_loop *loop);

/* Let KVM finish the last PIO or MMIO without running the guest: 0, or 1 when that made a new exit (the next
 * kvmpy_run returns it), or -errno. */
int kvmpy_complete(struct kvmpy_loop *loop);

/* Make a running kvmpy_run, or the next one, return KVMPY_STOP_KICK. From any thread. */
void kvmpy_kick(struct kvmpy_loop *loop);

/* Free the deadline timer. */
void kvmpy_loop_close(struct kvmpy_loop *loop);

/* ioctl(2): its result, or -errno. */
long kvmpy_ioctl(int fd, unsigned long request, void *argument);
long kvmpy_ioctl_value(int fd, unsigned long request, unsigned long argument);

/* Where KVM_CAP_SYNC_REGS keeps the general registers. */
struct kvm_regs *kvmpy_sync_regs(struct kvm_run *run);

#endif

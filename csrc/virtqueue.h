/* virtqueue.h -- the device's side of split and packed virtqueues. Floor: devices.
 *
 * The driver is hostile: each descriptor is copied once, checked, and only the copy is used.
 * Twins: kvmpy/devices/virtqueue.py and virtqueue_packed.py, which draw the rings. Source: virtio 1.2 §2.7, §2.8.
 */
#ifndef KVMPY_VIRTQUEUE_H
#define KVMPY_VIRTQUEUE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/uio.h>

/* What a driver did that breaks its queue: the device then says DEVICE_NEEDS_RESET. */
enum kvmpy_fault {
    KVMPY_FAULT_NONE,
    KVMPY_FAULT_RING_ADDRESS,           /* a ring is not aligned, or not inside RAM */
    KVMPY_FAULT_AVAIL_INDEX,            /* avail.idx is more than the queue's size ahead */
    KVMPY_FAULT_HEAD,                   /* a head beyond the descriptor table */
    KVMPY_FAULT_NEXT,                   /* a next beyond its table */
    KVMPY_FAULT_CHAIN_TOO_LONG,         /* more descriptors than the queue has: a loop, perhaps */
    KVMPY_FAULT_UNKNOWN_FLAGS,          /* descriptor flags that virtio does not define */
    KVMPY_FAULT_INDIRECT_NOT_NEGOTIATED,
    KVMPY_FAULT_INDIRECT_NESTED,        /* an indirect table inside an indirect table */
    KVMPY_FAULT_INDIRECT_AND_NEXT,
    KVMPY_FAULT_INDIRECT_LENGTH,        /* 0, no multiple of 16, or more than 65536 entries */
    KVMPY_FAULT_INDIRECT_ADDRESS,       /* an indirect table that is not inside RAM */
    KVMPY_FAULT_BUFFER_ADDRESS,         /* a buffer that is not inside RAM */
    KVMPY_FAULT_BUFFER_ORDER,           /* a device-readable buffer behind a device-writable one */
    KVMPY_FAULT_CHAIN_LENGTH,           /* more than 2^32 bytes in one chain */
    KVMPY_FAULT_BUFFER_ID,              /* packed: an id that the queue does not have */
    KVMPY_FAULT_PACKED_NOT_AVAILABLE,   /* packed: a chain runs on into a descriptor that is not available */
    KVMPY_NR_FAULTS,
};

/* The interrupt of one virtio device: InterruptStatus, and the eventfd that raises its GSI. */
struct kvmpy_interrupt {
    uint64_t status; /* read and cleared by the run loop too: KVMPY_WORD, KVMPY_CLEAR */
    int32_t fd;
};

/* Set `bits` of the status, then write the eventfd. */
void kvmpy_interrupt_raise(struct kvmpy_interrupt *interrupt, uint64_t bits);

/* Clear `bits` of the status. */
void kvmpy_interrupt_acknowledge(struct kvmpy_interrupt *interrupt, uint64_t bits);

/* A descriptor chain, copied and checked: first the device-readable segments, then the writable ones; none is empty. */
struct kvmpy_chain {
    struct iovec *segments;      /* the caller's; room for as many as the queue has descriptors */
    uint64_t readable, writable; /* bytes */
    uint32_t nr_readable, nr_segments;
    uint32_t count;              /* buffers, the empty ones too */
    uint16_t id;                 /* what the used entry carries: the head, or the packed ring's buffer id */
    uint16_t slots;              /* packed: descriptors of the ring that it takes */
    bool has_writable;           /* a writable buffer was met, be it empty */
};

/* One virtqueue; `size` is a power of two when it is split. */
struct kvmpy_ring {
    const struct kvmpy_memory *memory;
    uint8_t *descriptors, *driver, *device; /* the three areas, checked by the caller */
    uint64_t features;
    uint32_t size;
    uint32_t pushed;            /* used entries since the driver's wish was last looked at */
    uint16_t avail, used;       /* where we pop and push: split: running freely; packed: slots */
    bool avail_wrap, used_wrap; /* packed: true at first */
};

static inline bool kvmpy_has(const struct kvmpy_ring *ring, unsigned feature)
{
    return ring->features >> feature & 1;
}

/* Copy what the driver may change meanwhile: the compiler cannot look at `from` again behind the barrier. */
static inline void kvmpy_copy_once(void *to, const void *from, size_t size)
{
    memcpy(to, from, size);
    __asm__ volatile("" ::: "memory");
}

/* Copy the next chain: 0, KVMPY_RING_EMPTY, or the fault; then nothing was taken. */
#define KVMPY_RING_EMPTY (-1)
int kvmpy_ring_pop(struct kvmpy_ring *ring, struct kvmpy_chain *chain);

/* Give a chain back, `written` bytes of whose writable segments were written. */
void kvmpy_ring_push(struct kvmpy_ring *ring, const struct kvmpy_chain *chain, uint32_t written);

/* Tell whether the driver says that there is more. */
bool kvmpy_ring_available(const struct kvmpy_ring *ring);

/* Ask the driver to notify, or not to. After enabling, look whether something is available: it may have come before. */
void kvmpy_ring_disable_notifications(struct kvmpy_ring *ring);
void kvmpy_ring_enable_notifications(struct kvmpy_ring *ring);

/* Tell whether the driver wants an interrupt for what was pushed since this was last asked. */
bool kvmpy_ring_wants_interrupt(struct kvmpy_ring *ring);

#endif

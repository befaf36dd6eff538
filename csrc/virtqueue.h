/* virtqueue.h -- the device's side of split and packed virtqueues. Floor: devices.
 *
 * The driver is hostile: each descriptor is copied once, checked, and only the copy is used.
 * Twin: kvmpy/devices/virtqueue.py. Source: virtio 1.2 §2.7, §2.8.
 */
#ifndef KVMPY_VIRTQUEUE_H
#define KVMPY_VIRTQUEUE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

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

#endif

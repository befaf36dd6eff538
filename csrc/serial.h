/* serial.h -- bytes that the guest prints, from any vCPU thread to one reader. Floor: devices.
 *
 * A ring of `capacity` bytes (a power of two). `head` and `tail` run freely and are compared modulo 2^32. The event
 * descriptor is written when the ring stops being empty, so that a reader can sleep in poll().
 */
#ifndef KVMPY_SERIAL_H
#define KVMPY_SERIAL_H

#include <stddef.h>
#include <stdint.h>

struct kvmpy_serial {
    uint8_t *buffer;
    uint32_t capacity;
    uint32_t head; /* written by producers, under the lock */
    uint32_t tail; /* written by the reader */
    int32_t event_fd;
    uint32_t lock;
};

/* Append all of `size` bytes and return 0, or nothing and return -1 when they do not fit. */
int kvmpy_serial_push(struct kvmpy_serial *serial, const uint8_t *data, size_t size);

/* Move up to `size` bytes into `out` and return how many. One reader at a time. */
size_t kvmpy_serial_drain(struct kvmpy_serial *serial, uint8_t *out, size_t size);

#endif

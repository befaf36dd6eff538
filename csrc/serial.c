/* serial.c -- see serial.h. */
#include "serial.h"

#include <sched.h>
#include <unistd.h>

static void lock(struct kvmpy_serial *serial)
{
    while (__atomic_exchange_n(&serial->lock, 1, __ATOMIC_ACQUIRE))
        sched_yield();
}

static void unlock(struct kvmpy_serial *serial)
{
    __atomic_store_n(&serial->lock, 0, __ATOMIC_RELEASE);
}

int kvmpy_serial_push(struct kvmpy_serial *serial, const uint8_t *data, size_t size)
{
    lock(serial);
    uint32_t head = serial->head;
    uint32_t used = head - __atomic_load_n(&serial->tail, __ATOMIC_ACQUIRE);
    if (size > serial->capacity - used) {
        unlock(serial);
        return -1;
    }
    for (size_t i = 0; i < size; i++)
        serial->buffer[(head + i) & (serial->capacity - 1)] = data[i];
    /* Sequentially consistent: either the reader sees the new head, or we see its new tail and wake it. */
    __atomic_store_n(&serial->head, head + (uint32_t)size, __ATOMIC_SEQ_CST);
    uint32_t tail = __atomic_load_n(&serial->tail, __ATOMIC_SEQ_CST);
    unlock(serial);
    if (size && tail == head && serial->event_fd >= 0) {
        uint64_t one = 1;
        ssize_t ignored = write(serial->event_fd, &one, sizeof one);
        (void)ignored;
    }
    return 0;
}

size_t kvmpy_serial_drain(struct kvmpy_serial *serial, uint8_t *out, size_t size)
{
    uint32_t tail = serial->tail;
    uint32_t used = __atomic_load_n(&serial->head, __ATOMIC_SEQ_CST) - tail;
    size_t count = used < size ? used : size;
    for (size_t i = 0; i < count; i++)
        out[i] = serial->buffer[(tail + i) & (serial->capacity - 1)];
    __atomic_store_n(&serial->tail, tail + (uint32_t)count, __ATOMIC_SEQ_CST);
    return count;
}

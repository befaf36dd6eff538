/* block.c -- see block.h. Here: the life of a request in its queue. What it does to the disk: block_request.c.
 *
 * A request is popped, parsed, pays, is executed, and is completed. Where it has to wait for tokens, or for Python to
 * change the extents, kvmpy_block_serve returns, and its next call goes on with it.
 */
#include "kvmpy.h"

#include <sched.h>
#include <sys/epoll.h>
#include <time.h>
#include <x86intrin.h>

#define NSEC_PER_SEC 1000000000ull
#define BURSTS_PER_SEC 100
#define LONGEST_SILENCE_NS 50000 /* in a long batch, the driver hears of a completion after about so long */

enum stage { STAGE_NONE, STAGE_TO_PAY, STAGE_AT_EXIT };

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * NSEC_PER_SEC + now.tv_nsec;
}

static uint64_t start_clock(const struct kvmpy_block_queue *queue)
{
    return queue->disk->timed ? __rdtsc() : 0;
}

static void stop_clock(uint64_t *cycles, uint64_t start)
{
    *cycles += start ? __rdtsc() - start : 0;
}

static bool is_stopped(const struct kvmpy_block_queue *queue)
{
    return __atomic_load_n(&queue->stopped, __ATOMIC_ACQUIRE);
}

/* Interrupt the driver for what was completed since the last time, if it wants that. */
static void signal_driver(struct kvmpy_block_queue *queue)
{
    queue->completed_ns = 0;
    if (!kvmpy_ring_wants_interrupt(&queue->ring))
        return;
    uint64_t start = start_clock(queue);
    kvmpy_interrupt_raise(queue->interrupt, VIRTIO_MMIO_INT_VRING);
    stop_clock(&queue->counters.cycles_interrupt, start);
}

/* Fill the bucket: for how many nanoseconds it is in debt. */
static uint64_t fill(struct kvmpy_bucket *bucket, uint64_t now_ns)
{
    if (now_ns > bucket->filled_ns) { /* else another queue was here with a later clock */
        bucket->level += bucket->rate * (now_ns - bucket->filled_ns) / NSEC_PER_SEC;
        bucket->filled_ns = now_ns;
    }
    if (bucket->level > bucket->rate / BURSTS_PER_SEC)
        bucket->level = bucket->rate / BURSTS_PER_SEC;
    return bucket->level < 0 ? 1 + (uint64_t)(-bucket->level / bucket->rate * NSEC_PER_SEC) : 0;
}

uint64_t kvmpy_limits_take(struct kvmpy_limits *limits, uint64_t bytes, uint64_t now_ns)
{
    while (__atomic_exchange_n(&limits->lock, 1, __ATOMIC_ACQUIRE))
        sched_yield();
    uint64_t wait_ns = limits->requests.rate ? fill(&limits->requests, now_ns) : 0;
    uint64_t bytes_wait_ns = limits->bytes.rate && bytes ? fill(&limits->bytes, now_ns) : 0;
    wait_ns = wait_ns > bytes_wait_ns ? wait_ns : bytes_wait_ns;
    limits->requests.level -= !wait_ns;
    limits->bytes.level -= wait_ns ? 0 : bytes;
    __atomic_store_n(&limits->lock, 0, __ATOMIC_RELEASE);
    return wait_ns;
}

/* Pay for the pending request: false when it has to wait. */
static bool pay(struct kvmpy_block_queue *queue)
{
    struct kvmpy_limits *limits = &queue->disk->limits;
    bool is_free = queue->request.type == VIRTIO_BLK_T_FLUSH || queue->request.type == VIRTIO_BLK_T_GET_ID;
    if (is_free || (!limits->requests.rate && !limits->bytes.rate))
        return true;
    queue->wait_ns = kvmpy_limits_take(limits, queue->request.bytes, now_ns());
    return !queue->wait_ns;
}

static int execute(struct kvmpy_block_queue *queue)
{
    pthread_rwlock_rdlock(&queue->disk->lock);
    uint64_t start = start_clock(queue);
    int status = kvmpy_request_execute(queue);
    stop_clock(&queue->counters.cycles_file, start);
    pthread_rwlock_unlock(&queue->disk->lock);
    return status;
}

static void count(struct kvmpy_block_queue *queue, uint64_t moved)
{
    struct kvmpy_block_counters *counters = &queue->counters;
    bool is_in = queue->request.type == VIRTIO_BLK_T_IN, is_out = queue->request.type == VIRTIO_BLK_T_OUT;
    bool is_flush = queue->request.type == VIRTIO_BLK_T_FLUSH;
    *(is_in ? &counters->reads : is_out ? &counters->writes : is_flush ? &counters->flushes : &counters->others) += 1;
    counters->errors += queue->status != VIRTIO_BLK_S_OK;
    counters->bytes_read += is_in ? moved : 0;
    counters->bytes_written += is_out ? moved : 0;
}

/* The data is moved; now the status, then the used entry. */
static void complete(struct kvmpy_block_queue *queue)
{
    const struct kvmpy_request *request = &queue->request;
    uint64_t moved = queue->status == VIRTIO_BLK_S_OK ? request->bytes : 0;
    bool is_inward = request->type == VIRTIO_BLK_T_IN || request->type == VIRTIO_BLK_T_GET_ID;
    if (request->status)
        __atomic_store_n(request->status, queue->status, __ATOMIC_RELEASE);
    kvmpy_ring_push(&queue->ring, &queue->chain, request->status ? 1 + is_inward * moved : 0);
    queue->stage = STAGE_NONE;
    if (request->status)
        count(queue, moved);
    uint64_t now = now_ns();
    if (!queue->completed_ns)
        queue->completed_ns = now;
    else if (now - queue->completed_ns > LONGEST_SILENCE_NS)
        signal_driver(queue);
}

/* Bring the pending request to its end: KVMPY_BLOCK_IDLE, or why it cannot go on now. */
static int finish(struct kvmpy_block_queue *queue)
{
    if (queue->stage == STAGE_AT_EXIT) {
        if (queue->exit.answer == KVMPY_DISK_ASKED)
            return KVMPY_BLOCK_EXIT;
        if (queue->exit.answer == KVMPY_DISK_FAILED)
            queue->status = VIRTIO_BLK_S_IOERR;
        else if (queue->exit.operation == KVMPY_DISK_ZERO)
            queue->request.range++;
    } else if (queue->status == KVMPY_EXECUTE && !pay(queue)) {
        return KVMPY_BLOCK_IN_DEBT;
    }
    int status = queue->status == KVMPY_EXECUTE ? execute(queue) : queue->status;
    if (status == KVMPY_ASK) {
        queue->stage = STAGE_AT_EXIT;
        return KVMPY_BLOCK_EXIT;
    }
    queue->status = status;
    complete(queue);
    return KVMPY_BLOCK_IDLE;
}

/* Serve until nothing is available: KVMPY_BLOCK_IDLE, or why not. */
static int serve_batch(struct kvmpy_block_queue *queue)
{
    for (;;) {
        if (is_stopped(queue))
            return KVMPY_BLOCK_STOPPED;
        if (queue->stage == STAGE_NONE) {
            int fault = kvmpy_ring_pop(&queue->ring, &queue->chain);
            if (fault == KVMPY_RING_EMPTY)
                return KVMPY_BLOCK_IDLE;
            queue->fault = fault;
            if (fault)
                return KVMPY_BLOCK_BROKEN;
            queue->status = kvmpy_request_parse(queue);
            queue->stage = STAGE_TO_PAY;
        }
        int stop = finish(queue);
        if (stop != KVMPY_BLOCK_IDLE)
            return stop;
    }
}

/* Before sleeping, while the driver need not notify: tell whether there is a reason not to sleep. */
static bool look_for_more(struct kvmpy_block_queue *queue)
{
    uint64_t start = start_clock(queue), end = queue->spin_ns ? now_ns() + queue->spin_ns : 0;
    bool found = false;
    while (end && !found && now_ns() < end) {
        found = kvmpy_ring_available(&queue->ring) || is_stopped(queue);
        _mm_pause();
    }
    stop_clock(&queue->counters.cycles_spinning, start);
    return found;
}

/* Serve all that is available, and what comes meanwhile, with notifications off; then they are on again. */
static int serve_available(struct kvmpy_block_queue *queue, bool block)
{
    bool is_pending = queue->stage != STAGE_NONE; /* in the middle of a batch: they are off */
    bool more = is_pending || kvmpy_ring_available(&queue->ring);
    do {
        if (more && !is_pending)
            kvmpy_ring_disable_notifications(&queue->ring);
        is_pending = false;
        while (more) {
            int stop = serve_batch(queue);
            signal_driver(queue);
            if (stop != KVMPY_BLOCK_IDLE)
                return stop;
            more = block && look_for_more(queue);
        }
        kvmpy_ring_enable_notifications(&queue->ring);
        more = kvmpy_ring_available(&queue->ring);
    } while (more);
    return KVMPY_BLOCK_IDLE;
}

int kvmpy_block_serve(struct kvmpy_block_queue *queue, bool block)
{
    while (!queue->fault) {
        if (is_stopped(queue))
            return KVMPY_BLOCK_STOPPED;
        uint64_t start = start_clock(queue);
        int stop = serve_available(queue, block);
        stop_clock(&queue->counters.cycles_serving, start);
        if (stop != KVMPY_BLOCK_IDLE || !block)
            return stop;
        struct epoll_event ignored;
        epoll_wait(queue->wait_fd, &ignored, 1, -1);
    }
    return KVMPY_BLOCK_BROKEN;
}

/* block.h -- virtio-blk requests, from a ring to the extents of a disk and back. Floor: devices.
 *
 * One thread serves one queue; the queues of a device share a `struct kvmpy_disk`. What its extents do not cover is a
 * disk exit: Python changes the extents and calls again. Twins: kvmpy/devices/block_python.py, block_request.py,
 * extent_table.py. Source: virtio 1.2 §5.2.6.
 */
#ifndef KVMPY_BLOCK_H
#define KVMPY_BLOCK_H

#include "virtqueue.h"

#include <linux/virtio_blk.h>
#include <pthread.h>

#define KVMPY_SECTOR_SIZE 512
#define KVMPY_MAX_RANGES 16 /* of one DISCARD or WRITE_ZEROES */
#define KVMPY_MAX_RANGE_SECTORS (1u << 22)
#define KVMPY_ZEROS UINT32_MAX /* the file of an extent that has no bytes anywhere */

/* Why kvmpy_block_serve came back. */
enum kvmpy_block_stop {
    KVMPY_BLOCK_IDLE,    /* nothing is available; only when it was not to block */
    KVMPY_BLOCK_STOPPED, /* queue.stopped */
    KVMPY_BLOCK_IN_DEBT, /* a rate limit: call again when queue.wait_ns have passed */
    KVMPY_BLOCK_EXIT,    /* a disk exit: queue.exit; set its answer, call again */
    KVMPY_BLOCK_BROKEN,  /* queue.fault, for ever */
};

/* What Python is to do with a range before the pending request can go on. */
enum kvmpy_disk_operation { KVMPY_DISK_MAP_READ, KVMPY_DISK_MAP_WRITE, KVMPY_DISK_ZERO };
enum kvmpy_disk_answer { KVMPY_DISK_ASKED, KVMPY_DISK_DONE, KVMPY_DISK_FAILED };

struct kvmpy_file {
    int32_t fd, unaligned_fd; /* the second for transfers that are not aligned, where the first is O_DIRECT */
    uint32_t was_writable;    /* some extent of it has been, at some time: FLUSH is for this file too */
};

struct kvmpy_extent {
    uint64_t sector, sectors;
    uint64_t offset; /* bytes into the file */
    uint32_t file;   /* an index, or KVMPY_ZEROS */
    uint32_t writable;
};

/* A rate limit: what passes while there is no debt takes its whole price. The bucket holds 10 ms worth. */
struct kvmpy_bucket {
    double rate, level; /* tokens a second (0: no limit); tokens */
    uint64_t filled_ns; /* when `level` was right */
};

struct kvmpy_limits {
    struct kvmpy_bucket requests, bytes;
    uint32_t lock;
};

struct kvmpy_disk {
    pthread_rwlock_t lock;    /* read side: a request is executed; write side: what follows is changed */
    struct kvmpy_extent *extents; /* ascending, never overlapping, with gaps */
    struct kvmpy_file *files;
    uint64_t nr_extents, nr_files;
    uint64_t capacity;        /* sectors that the guest sees */
    uint64_t alignment;       /* what O_DIRECT wants, in bytes, a power of two; 1: nothing */
    uint32_t readonly;
    uint32_t writeback;       /* a completed write need not be durable; changes at any time */
    uint32_t timed;           /* add up the cycles in kvmpy_block_counters */
    uint32_t sync_failed;     /* the kernel forgets pages that it could not write: no later fdatasync is believed */
    pthread_mutex_t syncing;
    struct kvmpy_limits limits;
    uint8_t serial[VIRTIO_BLK_ID_BYTES];
};

/* Completed requests of a queue. Cycles are the TSC's; `cycles_serving` includes the other three. */
struct kvmpy_block_counters {
    uint64_t reads, writes, flushes, others, errors, bytes_read, bytes_written;
    uint64_t cycles_serving, cycles_spinning, cycles_file, cycles_interrupt;
};

struct kvmpy_request {
    uint64_t sector;
    uint64_t bytes;      /* of data; of a request that was refused, anything */
    struct iovec *data;  /* the segments still to be moved; begins and ends are cut off */
    uint8_t *status;     /* the last writable byte, or NULL */
    uint32_t type;
    uint32_t nr_ranges, range; /* `range`: the next to be zeroed */
    struct virtio_blk_discard_write_zeroes ranges[KVMPY_MAX_RANGES];
};

struct kvmpy_block_queue {
    struct kvmpy_ring ring;
    struct kvmpy_disk *disk;
    struct kvmpy_interrupt *interrupt;
    struct kvmpy_chain chain;      /* of the pending request */
    struct kvmpy_request request;  /* popped, and not completed */
    int32_t status;                /* what is known of its outcome */
    uint32_t stage;
    struct kvmpy_disk_exit {
        uint64_t sector, sectors;
        uint32_t operation, answer;
    } exit;
    struct kvmpy_block_counters counters;
    uint64_t spin_ns;              /* how long to look for more before sleeping */
    uint64_t wait_ns;              /* after KVMPY_BLOCK_IN_DEBT */
    uint64_t completed_ns;         /* when the first completion was that the driver has not been told of; 0: none */
    uint32_t fault;
    uint32_t stopped;              /* set by any thread, which then wakes wait_fd */
    int32_t wait_fd;               /* an epoll that wakes at each kick */
};

void kvmpy_disk_init(struct kvmpy_disk *disk);
void kvmpy_disk_lock(struct kvmpy_disk *disk); /* the write side; goes before requests that come later */
void kvmpy_disk_unlock(struct kvmpy_disk *disk);

/* The index of the first extent that ends behind `sector`. */
uint64_t kvmpy_disk_find(const struct kvmpy_disk *disk, uint64_t sector);

/* Find the first run of the range that no extent covers, or no writable one: its sectors, and its begin; or 0. */
uint64_t kvmpy_disk_missing(const struct kvmpy_disk *disk, uint64_t sector, uint64_t sectors, bool writable,
                            uint64_t *begin);

/* fdatasync all files that have been writable: a status. After a failure it fails for ever. */
int kvmpy_disk_sync(struct kvmpy_disk *disk);

/* Parse queue.chain into queue.request: a status, or KVMPY_EXECUTE when nothing is wrong. */
#define KVMPY_EXECUTE (-1)
int kvmpy_request_parse(struct kvmpy_block_queue *queue);

/* Move the data: a status, or KVMPY_ASK: queue.exit says for what. Under the read side; starts anew after an exit. */
#define KVMPY_ASK (-2)
int kvmpy_request_execute(struct kvmpy_block_queue *queue);

/* Take the price of a request of so many bytes: 0, or for how many nanoseconds a bucket is in debt; then nothing. */
uint64_t kvmpy_limits_take(struct kvmpy_limits *limits, uint64_t bytes, uint64_t now_ns);

/* Serve all that is available; with `block`, sleep until there is more, and so on: kvmpy_block_stop. */
int kvmpy_block_serve(struct kvmpy_block_queue *queue, bool block);

#endif

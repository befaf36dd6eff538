/* uring_loop.c -- would io_uring be faster? Random reads of one file by preadv, one by one, and by io_uring, in batches.
 *
 *   uring_loop FILE SPAN SIZE DEPTH COUNT DIRECT
 *
 * Prints the nanoseconds of one read by preadv and by io_uring. DIRECT (0 or 1): past the page cache. Exit status 2:
 * this kernel has no io_uring for us. Source: io_uring_setup(2), io_uring_enter(2).
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/io_uring.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static int fd;
static char *buffers;
static uint64_t state, places, size;
static unsigned depth, count;

static double now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1e9 + now.tv_nsec;
}

static uint64_t next_place(void)
{
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return (state >> 33) % places * size;
}

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

static double by_preadv(void)
{
    double started = now_ns();
    for (unsigned i = 0; i < count; i++) {
        struct iovec one = {buffers + i % depth * size, size};
        if (preadv(fd, &one, 1, next_place()) != (ssize_t)size)
            fail("preadv");
    }
    return (now_ns() - started) / count;
}

static double by_io_uring(void)
{
    struct io_uring_params params = {0};
    int ring = syscall(SYS_io_uring_setup, depth, &params);
    if (ring < 0)
        exit(2);
    int protection = PROT_READ | PROT_WRITE, flags = MAP_SHARED | MAP_POPULATE;
    char *sq = mmap(NULL, params.sq_off.array + params.sq_entries * 4, protection, flags, ring, IORING_OFF_SQ_RING);
    char *cq = mmap(NULL, params.cq_off.cqes + params.cq_entries * 16, protection, flags, ring, IORING_OFF_CQ_RING);
    struct io_uring_sqe *requests = mmap(NULL, params.sq_entries * sizeof *requests, protection, flags, ring,
                                         IORING_OFF_SQES);
    unsigned *tail = (unsigned *)(sq + params.sq_off.tail), *slots = (unsigned *)(sq + params.sq_off.array);
    unsigned *head = (unsigned *)(cq + params.cq_off.head), *end = (unsigned *)(cq + params.cq_off.tail);
    struct io_uring_cqe *answers = (struct io_uring_cqe *)(cq + params.cq_off.cqes);

    double started = now_ns();
    for (unsigned submitted = 0, completed = 0; completed < count;) {
        unsigned new = 0;
        for (; submitted - completed < depth && submitted < count; submitted++, new++) {
            unsigned slot = *tail & (params.sq_entries - 1);
            requests[slot] = (struct io_uring_sqe){.opcode = IORING_OP_READ, .fd = fd, .len = size, .off = next_place(),
                                                   .addr = (uintptr_t)(buffers + submitted % depth * size)};
            slots[slot] = slot;
            __atomic_store_n(tail, *tail + 1, __ATOMIC_RELEASE);
        }
        syscall(SYS_io_uring_enter, ring, new, 1, IORING_ENTER_GETEVENTS, NULL, 0);
        for (; *head != __atomic_load_n(end, __ATOMIC_ACQUIRE); completed++) {
            if (answers[*head & (params.cq_entries - 1)].res != (int)size)
                fail("io_uring");
            __atomic_store_n(head, *head + 1, __ATOMIC_RELEASE);
        }
    }
    double taken = (now_ns() - started) / count;
    close(ring);
    return taken;
}

int main(int argc, char **argv)
{
    if (argc != 7)
        return 1;
    fd = open(argv[1], O_RDONLY | (atoi(argv[6]) ? O_DIRECT : 0));
    size = strtoull(argv[3], NULL, 0);
    places = strtoull(argv[2], NULL, 0) / size;
    depth = atoi(argv[4]);
    count = atoi(argv[5]);
    buffers = aligned_alloc(4096, depth * size);
    if (fd < 0 || !buffers)
        fail(argv[1]);
    memset(buffers, 1, depth * size);
    double one = by_preadv();
    printf("%.1f %.1f\n", one, by_io_uring());
    return 0;
}

/* disk_loop.c -- the baseline of test_disk.py: preadv or pwritev on a file, one after another, and nothing else.
 *
 *   disk_loop FILE SPAN
 *
 * Each line of standard input says WRITE SIZE COUNT RANDOM (flags 0 or 1, SIZE in bytes); the answer is the
 * nanoseconds of one transfer. The places are those that disk_guest.c visits.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <time.h>

#define BUFFERS (8u << 20) /* bytes; as many as the guest's eight of 1 MiB */

static double now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1e9 + now.tv_nsec;
}

int main(int argc, char **argv)
{
    int fd = argc == 3 ? open(argv[1], O_RDWR) : -1;
    char *buffers = aligned_alloc(4096, BUFFERS);
    if (fd < 0 || !buffers) {
        perror("disk_loop FILE SPAN");
        return 1;
    }
    memset(buffers, 1, BUFFERS);
    uint64_t span = strtoull(argv[2], NULL, 0);
    unsigned write, size, count, random;
    while (scanf("%u %u %u %u", &write, &size, &count, &random) == 4) {
        uint64_t state = 1, places = span / size;
        double started = now_ns();
        for (unsigned i = 0; i < count; i++) {
            state = state * 6364136223846793005ull + 1442695040888963407ull;
            off_t at = (random ? (state >> 33) % places : i % places) * size;
            struct iovec transfer = {buffers + (uint64_t)i * size % BUFFERS, size};
            if ((write ? pwritev(fd, &transfer, 1, at) : preadv(fd, &transfer, 1, at)) != (ssize_t)size) {
                perror(argv[1]);
                return 1;
            }
        }
        printf("%.1f\n", (now_ns() - started) / count);
        fflush(stdout);
    }
    return 0;
}

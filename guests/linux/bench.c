/* bench.c -- what the kernel's services cost a process: one line each, `name value ns`, the mean of many.
 *
 * Each row is measured over as many calls as take a fifth of a second. Reads are of the file or disk that the first
 * argument with a slash names, else of /dev/vda; O_DIRECT, so that the page cache does not answer. Without a disk of
 * a MiB these two rows are missing. The same file runs on the host, for comparison.
 *
 * Prints:  bench: start
 *          getppid N ns            one system call that does nothing
 *          clock_gettime N ns      the system call, not the page that stands in for it
 *          page_fault N ns         first touch of an anonymous page
 *          pipe_round_trip N ns    a byte to another process and back: two context switches, four system calls
 *          fork_exit N ns          fork, exit of the child, wait
 *          read_4k_random N ns
 *          read_1m_sequential N ns
 *          bench: end
 */
#include "user.h"

#define LONG_ENOUGH_NS 200000000l
#define MOST_CALLS (1l << 22)
#define PAGES_AT_ONCE 256
#define PAGE 4096l
#define MiB (1l << 20)
#define SEEK_END 2

static char buffer[MiB] __attribute__((aligned(4096)));
static long disk, disk_size;

static long getppid_calls(long count)
{
    long start = now_ns();
    while (count--)
        CALL0(__NR_getppid);
    return now_ns() - start;
}

static long clock_calls(long count)
{
    long start = now_ns();
    while (count--)
        now_ns();
    return now_ns() - start;
}

static long page_faults(long count)
{
    long spent = 0, start;
    while (count > 0) {
        long size = (count < PAGES_AT_ONCE ? count : PAGES_AT_ONCE) * PAGE;
        volatile char *pages = (char *)call6(__NR_mmap, 0, size, PROT_READ_WRITE, MAP_PRIVATE_ANONYMOUS, -1, 0);
        start = now_ns();
        for (long at = 0; at < size; at += PAGE)
            pages[at] = 1;
        spent += now_ns() - start;
        CALL2(__NR_munmap, pages, size);
        count -= size / PAGE;
    }
    return spent;
}

static long child_of_pipes(int *there, int *back)
{
    char token;
    long child = CALL0(__NR_fork);
    if (child)
        return child;
    CALL1(__NR_close, there[1]);
    while (CALL3(__NR_read, there[0], &token, 1) == 1)
        CALL3(__NR_write, back[1], &token, 1);
    for (;;)
        CALL1(__NR_exit_group, 0);
}

static long pipe_round_trips(long count)
{
    int there[2], back[2];
    char token = 0;
    long child, start, spent;

    CALL1(__NR_pipe, there);
    CALL1(__NR_pipe, back);
    child = child_of_pipes(there, back);
    start = now_ns();
    while (count--) {
        CALL3(__NR_write, there[1], &token, 1);
        CALL3(__NR_read, back[0], &token, 1);
    }
    spent = now_ns() - start;
    for (int end = 0; end < 2; end++) {
        CALL1(__NR_close, there[end]);
        CALL1(__NR_close, back[end]);
    }
    CALL4(__NR_wait4, child, 0, 0, 0);
    return spent;
}

static long forks(long count)
{
    long start = now_ns();
    while (count--) {
        long child = CALL0(__NR_fork);
        if (child == 0)
            for (;;)
                CALL1(__NR_exit_group, 0);
        CALL4(__NR_wait4, child, 0, 0, 0);
    }
    return now_ns() - start;
}

static long random_reads(long count)
{
    static uint64_t state = 1;
    long start = now_ns();
    while (count--) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        CALL4(__NR_pread64, disk, buffer, PAGE, (long)((state >> 33) % (uint64_t)(disk_size / PAGE)) * PAGE);
    }
    return now_ns() - start;
}

static long sequential_reads(long count)
{
    static long at;
    long start = now_ns();
    while (count--) {
        if (at + MiB > disk_size)
            at = 0;
        CALL4(__NR_pread64, disk, buffer, MiB, at);
        at += MiB;
    }
    return now_ns() - start;
}

/* `run` makes `count` calls and returns the time that they took. */
static void row(const char *name, long (*run)(long count))
{
    long count = 4, spent = run(count);
    while (spent < LONG_ENOUGH_NS && count < MOST_CALLS) {
        count *= 4;
        spent = run(count);
    }
    text(name);
    text(" ");
    number(spent / count);
    say(" ns");
}

int main(int argc, char **argv)
{
    const char *path = "/dev/vda";
    for (int i = argc - 1; i > 0; i--)
        if (argv[i][0] == '/')
            path = argv[i];
    mount_devices();
    stay_on_one_processor();
    say("bench: start");
    row("getppid", getppid_calls);
    row("clock_gettime", clock_calls);
    row("page_fault", page_faults);
    row("pipe_round_trip", pipe_round_trips);
    row("fork_exit", forks);
    disk = CALL3(__NR_open, path, O_RDONLY | O_DIRECT, 0);
    disk_size = disk < 0 ? 0 : CALL3(__NR_lseek, disk, 0, SEEK_END);
    if (disk_size >= MiB && CALL4(__NR_pread64, disk, buffer, PAGE, 0) == PAGE) {
        row("read_4k_random", random_reads);
        row("read_1m_sequential", sequential_reads);
    }
    say("bench: end");
    return 0;
}

/* run_loop.c -- see run_loop.h.
 *
 * Signals and kicks. A kick is `immediate_exit` and a signal: the flag stops a vCPU that is about to enter the guest,
 * the signal one that is inside; either alone loses a race. The handler is empty: a delivered signal makes KVM_RUN
 * return EINTR, and that is all it is for. The flag is cleared before `kicked` is read, and kvmpy_kick writes them in
 * the other order, so a kick is at worst seen twice, never lost.
 */
#include "kvmpy.h"

#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <x86intrin.h>

#define NSEC_PER_SEC 1000000000ull

/* glibc hides the field that SIGEV_THREAD_ID needs behind this name. */
#ifndef sigev_notify_thread_id
#define sigev_notify_thread_id _sigev_un._tid
#endif

static void empty_handler(int signal) {}

int kvmpy_install_kick_handler(void)
{
    struct sigaction action = {.sa_handler = empty_handler}; /* no SA_RESTART: KVM_RUN must return */
    return sigaction(SIGRTMIN, &action, NULL) < 0 ? -errno : 0;
}

long kvmpy_ioctl(int fd, unsigned long request, void *argument)
{
    long result = ioctl(fd, request, argument);
    return result < 0 ? -errno : result;
}

long kvmpy_ioctl_value(int fd, unsigned long request, unsigned long argument)
{
    return kvmpy_ioctl(fd, request, (void *)argument);
}

struct kvm_regs *kvmpy_sync_regs(struct kvm_run *run)
{
    return &run->s.regs.regs;
}

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * NSEC_PER_SEC + now.tv_nsec;
}

/* Signal this thread at the deadline, and each millisecond after it: a signal that lands between the check and
 * KVM_RUN is lost, the next is not. */
static int arm_timer(struct kvmpy_loop *loop)
{
    if (loop->timer_tid != loop->tid) {
        kvmpy_loop_close(loop);
        struct sigevent event = {.sigev_notify = SIGEV_THREAD_ID, .sigev_signo = SIGRTMIN};
        event.sigev_notify_thread_id = loop->tid;
        if (timer_create(CLOCK_MONOTONIC, &event, &loop->timer) < 0)
            return -errno;
        loop->timer_tid = loop->tid;
    }
    struct itimerspec when = {
        .it_value = {loop->deadline_ns / NSEC_PER_SEC, loop->deadline_ns % NSEC_PER_SEC},
        .it_interval = {0, 1000000},
    };
    return timer_settime(loop->timer, TIMER_ABSTIME, &when, NULL) < 0 ? -errno : 0;
}

static void disarm_timer(struct kvmpy_loop *loop)
{
    struct itimerspec never = {0};
    timer_settime(loop->timer, 0, &never, NULL);
}

void kvmpy_loop_close(struct kvmpy_loop *loop)
{
    if (loop->timer_tid)
        timer_delete(loop->timer);
    loop->timer_tid = 0;
}

/* The range that holds all of [address, address+size), or NULL. Twin: Bus.find in kvmpy/machine/bus.py. */
static struct kvmpy_range *find(const struct kvmpy_loop *loop, uint8_t space, uint64_t address, uint32_t size)
{
    uint32_t low = 0, high = loop->nr_ranges;
    while (low < high) {
        uint32_t middle = (low + high) / 2;
        struct kvmpy_range *range = &loop->ranges[middle];
        if (range->space < space || (range->space == space && range->last < address))
            low = middle + 1;
        else
            high = middle;
    }
    if (low == loop->nr_ranges)
        return NULL;
    struct kvmpy_range *range = &loop->ranges[low];
    bool inside = range->space == space && range->first <= address && size - 1 <= range->last - address;
    return inside ? range : NULL;
}

static bool is_whole(const struct kvmpy_range *range, uint64_t size)
{
    return range->last - range->first + 1 == size;
}

/* Answer `count` reads of `size` bytes into `data`: -1 when done, else a kvmpy_stop. */
static int answer_read(struct kvmpy_loop *loop, struct kvmpy_range *range, uint8_t *data)
{
    uint32_t size = loop->exit.size;
    uint64_t value;
    if (range->on_read == KVMPY_WORD && is_whole(range, size))
        value = __atomic_load_n(range->word, __ATOMIC_SEQ_CST);
    else if (range->on_read == KVMPY_CONSTANT || range->on_read == KVMPY_COUNT)
        value = __atomic_load_n(&range->value, __ATOMIC_RELAXED);
    else
        return KVMPY_STOP_EXIT;
    for (uint32_t i = 0; i < loop->exit.count; i++)
        memcpy(data + i * size, &value, size);
    loop->exit.data = 0;
    memcpy(&loop->exit.data, data, size);
    return -1;
}

/* Take `count` writes of `size` bytes from `data`: -1 when done, else a kvmpy_stop. */
static int answer_write(struct kvmpy_loop *loop, struct kvmpy_range *range, const uint8_t *data)
{
    switch (range->on_write) {
    case KVMPY_SINK:
        return -1;
    case KVMPY_COUNT:
        __atomic_fetch_add(&range->value, loop->exit.count, __ATOMIC_RELAXED);
        return -1;
    case KVMPY_SERIAL:
        /* Only bytes: a wider access reaches other registers too, and those are Python's. */
        if (loop->exit.size != 1 || kvmpy_serial_push(range->serial, data, loop->exit.count) < 0)
            return KVMPY_STOP_EXIT;
        return -1;
    case KVMPY_EXIT:
        return KVMPY_STOP_EXIT_PORT;
    case KVMPY_CLEAR:
        if (!is_whole(range, loop->exit.size))
            return KVMPY_STOP_EXIT;
        __atomic_fetch_and(range->word, ~loop->exit.data, __ATOMIC_SEQ_CST);
        return -1;
    default:
        return KVMPY_STOP_EXIT;
    }
}

/* Fill loop->exit from the run page and return where the data are, or NULL for an exit without an address. */
static uint8_t *describe(struct kvmpy_loop *loop)
{
    struct kvm_run *run = loop->run;
    struct kvmpy_exit *exit = &loop->exit;
    *exit = (struct kvmpy_exit){.number = loop->exits_total, .reason = run->exit_reason};
    if (run->kvm_valid_regs & KVM_SYNC_X86_REGS)
        exit->rip = run->s.regs.regs.rip;
    uint8_t *data;
    if (run->exit_reason == KVM_EXIT_IO) {
        data = (uint8_t *)run + run->io.data_offset;
        exit->address = run->io.port;
        exit->size = run->io.size;
        exit->count = run->io.count;
        exit->is_write = run->io.direction == KVM_EXIT_IO_OUT;
    } else if (run->exit_reason == KVM_EXIT_MMIO) {
        data = run->mmio.data;
        exit->address = run->mmio.phys_addr;
        exit->size = run->mmio.len;
        exit->count = 1;
        exit->is_write = run->mmio.is_write;
    } else {
        return NULL;
    }
    exit->buffer = data - (uint8_t *)run;
    if (exit->is_write)
        memcpy(&exit->data, data, exit->size);
    return data;
}

int kvmpy_handle_exit(struct kvmpy_loop *loop)
{
    uint32_t reason = loop->run->exit_reason;
    loop->exits[reason < KVMPY_NR_REASONS ? reason : KVMPY_NR_REASONS - 1]++;
    loop->exits_total++;
    int stop = KVMPY_STOP_EXIT;
    uint8_t *data = describe(loop);
    if (data && !(loop->flags & KVMPY_LOOP_TO_PYTHON)) {
        struct kvmpy_exit *exit = &loop->exit;
        struct kvmpy_range *range = find(loop, reason == KVM_EXIT_MMIO, exit->address, exit->size);
        if (range) {
            stop = exit->is_write ? answer_write(loop, range, data) : answer_read(loop, range, data);
            struct kvmpy_range_count *count = &loop->counts[range - loop->ranges];
            if (stop != KVMPY_STOP_EXIT)
                *(exit->is_write ? &count->writes : &count->reads) += exit->count;
        }
    }
    loop->ring[(loop->exits_total - 1) % KVMPY_RING] = loop->exit;
    if ((reason == KVM_EXIT_DEBUG || reason == KVM_EXIT_INTERNAL_ERROR) && loop->assist &&
        !(loop->flags & KVMPY_LOOP_TO_PYTHON) && kvmpy_assist(loop))
        return -1;
    bool one_out = reason == KVM_EXIT_IO && loop->exit.is_write && loop->exit.count == 1;
    return stop == KVMPY_STOP_EXIT && one_out ? KVMPY_STOP_OUT : stop;
}

/* KVM_RUN failed with `error`: -1 to enter again, else a kvmpy_stop. */
static int handle_error(struct kvmpy_loop *loop, int error)
{
    if (error == EAGAIN) /* an AP that was just started: not an error, enter again (KVM API §4.10) */
        return -1;
    if (error != EINTR) {
        loop->error = error;
        return KVMPY_STOP_ERROR;
    }
    __atomic_store_n(&loop->run->immediate_exit, 0, __ATOMIC_SEQ_CST);
    return __atomic_exchange_n(&loop->kicked, 0, __ATOMIC_SEQ_CST) ? KVMPY_STOP_KICK : KVMPY_STOP_SIGNAL;
}

/* One KVM_RUN with its clocks: 0 or an errno. */
static int enter(struct kvmpy_loop *loop)
{
    uint64_t before = 0;
    bool stamped = loop->stamps && loop->stamps_length < loop->stamps_capacity;
    if (stamped || loop->flags & KVMPY_LOOP_TIMES)
        before = __rdtsc();
    int error = ioctl(loop->vcpu_fd, KVM_RUN, 0) < 0 ? errno : 0;
    if (before) {
        uint64_t after = __rdtsc();
        loop->cycles_in_run += after - before;
        if (stamped && !error) {
            uint64_t *pair = &loop->stamps[2 * loop->stamps_length++];
            pair[0] = before;
            pair[1] = after;
        }
    }
    return error;
}

static int run(struct kvmpy_loop *loop)
{
    if (loop->has_exit) {
        loop->has_exit = 0;
        int stop = kvmpy_handle_exit(loop);
        if (stop >= 0)
            return stop;
    }
    for (;;) {
        if (loop->exits_total >= loop->max_exits)
            return KVMPY_STOP_BUDGET;
        if (loop->deadline_ns && now_ns() >= loop->deadline_ns)
            return KVMPY_STOP_DEADLINE;
        int error = enter(loop);
        int stop = error ? handle_error(loop, error) : kvmpy_handle_exit(loop);
        if (stop == KVMPY_STOP_SIGNAL && loop->deadline_ns && now_ns() >= loop->deadline_ns)
            return KVMPY_STOP_DEADLINE;
        if (stop >= 0)
            return stop;
    }
}

static __thread int32_t this_tid; /* the system call is a tenth of a microsecond, at each exit to Python */

static void forget_tid(void)
{
    this_tid = 0;
}

/* In a child process the same thread has another number. */
__attribute__((constructor)) static void watch_forks(void)
{
    pthread_atfork(NULL, NULL, forget_tid);
}

/* Say that this thread uses the run page, unless the vCPU is closed: whoever closes it sets vcpu_fd to -1, then waits
 * until tid is 0, and only then unmaps the page. */
static bool hold(struct kvmpy_loop *loop)
{
    if (!this_tid)
        this_tid = (int32_t)syscall(SYS_gettid);
    __atomic_store_n(&loop->tid, this_tid, __ATOMIC_SEQ_CST);
    return __atomic_load_n(&loop->vcpu_fd, __ATOMIC_SEQ_CST) >= 0;
}

static void release(struct kvmpy_loop *loop)
{
    __atomic_store_n(&loop->tid, 0, __ATOMIC_SEQ_CST);
}

int kvmpy_run(struct kvmpy_loop *loop)
{
    loop->error = 0;
    int stop;
    if (!hold(loop)) {
        loop->error = EBADF;
        stop = KVMPY_STOP_ERROR;
    } else if (loop->deadline_ns) {
        int error = arm_timer(loop);
        if (error) {
            loop->error = -error;
            stop = KVMPY_STOP_ERROR;
        } else {
            stop = run(loop);
            disarm_timer(loop);
        }
    } else {
        stop = run(loop);
    }
    release(loop);
    return stop;
}

static int complete(struct kvmpy_loop *loop)
{
    if (loop->has_exit)
        return 1;
    __atomic_store_n(&loop->run->immediate_exit, 1, __ATOMIC_SEQ_CST);
    int error = ioctl(loop->vcpu_fd, KVM_RUN, 0) < 0 ? errno : 0;
    __atomic_store_n(&loop->run->immediate_exit, 0, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&loop->kicked, __ATOMIC_SEQ_CST))
        __atomic_store_n(&loop->run->immediate_exit, 1, __ATOMIC_SEQ_CST);
    loop->has_exit = !error;
    return error == EINTR || error == EAGAIN ? 0 : error ? -error : 1;
}

int kvmpy_complete(struct kvmpy_loop *loop)
{
    int result = hold(loop) ? complete(loop) : -EBADF;
    release(loop);
    return result;
}

void kvmpy_kick(struct kvmpy_loop *loop)
{
    __atomic_store_n(&loop->kicked, 1, __ATOMIC_SEQ_CST);
    __atomic_store_n(&loop->run->immediate_exit, 1, __ATOMIC_SEQ_CST);
    int tid = __atomic_load_n(&loop->tid, __ATOMIC_SEQ_CST);
    if (tid)
        syscall(SYS_tgkill, getpid(), tid, SIGRTMIN);
}

/* c_loop.c -- what an exit costs in plain C: the baseline of test_exits.py.
 *
 * A VM with 1 MiB of memory whose guest writes to a port for ever. For each number N on standard input: take N exits
 * and print the nanoseconds of one. Written as one would write it by hand from the KVM API document.
 */
#include <err.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>

#define MEMORY_SIZE (1 << 20)
#define ENTRY 0x1000

static const unsigned char guest[] = {0xe6, 0xe9, 0xeb, 0xfc}; /* 1: out %al, $0xe9; jmp 1b */

static double now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1e9 + now.tv_nsec;
}

int main(void)
{
    int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    int vm = ioctl(kvm, KVM_CREATE_VM, 0);
    unsigned char *memory = mmap(NULL, MEMORY_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    memcpy(memory + ENTRY, guest, sizeof guest);
    struct kvm_userspace_memory_region region = {.memory_size = MEMORY_SIZE, .userspace_addr = (unsigned long)memory};
    if (ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region) < 0)
        err(1, "KVM_SET_USER_MEMORY_REGION");
    int vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
    struct kvm_run *run = mmap(NULL, ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
    struct kvm_sregs sregs;
    ioctl(vcpu, KVM_GET_SREGS, &sregs);
    sregs.cs.base = sregs.cs.selector = 0;
    struct kvm_regs regs = {.rip = ENTRY, .rflags = 2};
    if (ioctl(vcpu, KVM_SET_SREGS, &sregs) < 0 || ioctl(vcpu, KVM_SET_REGS, &regs) < 0)
        err(1, "KVM_SET_SREGS or KVM_SET_REGS");
    for (long exits; scanf("%ld", &exits) == 1; fflush(stdout)) {
        double start = now_ns();
        for (long i = 0; i < exits; i++) {
            if (ioctl(vcpu, KVM_RUN, 0) < 0)
                err(1, "KVM_RUN");
            if (run->exit_reason != KVM_EXIT_IO || run->io.port != 0xe9)
                errx(1, "exit reason %u", run->exit_reason);
        }
        printf("%f\n", (now_ns() - start) / exits);
    }
    return 0;
}

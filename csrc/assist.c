/* assist.c -- see assist.h. */
#include "kvmpy.h"

#define PAGE 4096u
#define PRESENT 1u
#define LARGE (1u << 7)
#define ADDRESS 0x000ffffffffff000ull /* of a page-table entry (Intel SDM vol. 3 §4.5) */
#define VECTOR_BP 3
#define PF_USER 0x4     /* page-fault error code (Intel SDM vol. 3 §4.7): at CPL 3, */
#define PF_ANY_FETCH 0x11 /* of a page that is present or not; a fetch, where the processor tells */
#define DR6_BS (1u << 14)

static bool is(const uint8_t *code, uint32_t size, const char *wanted, uint32_t length)
{
    return size >= length && !memcmp(code, wanted, length);
}

static void advance(struct kvm_run *run, uint64_t bytes)
{
    run->s.regs.regs.rip += bytes;
    run->kvm_dirty_regs |= KVM_SYNC_X86_REGS;
}

/* Walk the page tables of long mode; rights are not looked at. Twin: `translate` in kvmpy/machine/paging.py. */
static uint8_t *find(const struct kvmpy_loop *loop, const struct kvm_sregs *sregs, uint64_t linear, uint64_t size)
{
    const struct kvmpy_memory *memory = loop->assist->memory;
    uint64_t entry = sregs->cr3;
    for (int shift = sregs->cr4 & X86_CR4_LA57 ? 48 : 39; shift >= 12; shift -= 9) {
        uint8_t *at = kvmpy_translate(memory, (entry & ADDRESS) + (linear >> shift & 511) * 8, 8);
        if (!at || !((entry = __atomic_load_n((uint64_t *)at, __ATOMIC_RELAXED)) & PRESENT))
            return NULL;
        if (shift == 12 || (shift < 39 && entry & LARGE)) {
            uint64_t offset = linear & ((1ull << shift) - 1);
            bool inside = linear % PAGE + size <= PAGE;
            return inside ? kvmpy_translate(memory, (entry & ADDRESS & ~((1ull << shift) - 1)) + offset, size) : NULL;
        }
    }
    return NULL;
}

/* Copy guest memory that lies within one page. */
static bool read_guest(const struct kvmpy_loop *loop, const struct kvm_sregs *sregs, uint64_t linear, void *to,
                       uint64_t size)
{
    const uint8_t *from = find(loop, sregs, linear, size);
    if (from)
        memcpy(to, from, size);
    return from;
}

static bool raise_breakpoint(const struct kvmpy_loop *loop)
{
    struct kvm_vcpu_events events;
    if (kvmpy_ioctl(loop->vcpu_fd, KVM_GET_VCPU_EVENTS, &events) < 0)
        return false;
    events.flags = 0; /* what else is on its way stays as it is */
    events.exception.injected = 1;
    events.exception.nr = VECTOR_BP;
    events.exception.has_error_code = events.exception.pending = 0;
    return kvmpy_ioctl(loop->vcpu_fd, KVM_SET_VCPU_EVENTS, &events) >= 0;
}

/* int3, clac, stac in 64-bit code at CPL 0. */
static bool complete_instruction(struct kvmpy_loop *loop, const struct kvm_sregs *sregs)
{
    struct kvm_run *run = loop->run;
    const uint8_t *code = run->emulation_failure.insn_bytes;
    uint32_t size = run->emulation_failure.insn_size;
    bool clac = is(code, size, "\x0f\x01\xca", 3), stac = is(code, size, "\x0f\x01\xcb", 3);
    if (sregs->ss.dpl || !sregs->cs.l)
        return false;
    if (clac || stac) {
        __u64 *flags = &run->s.regs.regs.rflags;
        *flags = clac ? *flags & ~X86_EFLAGS_AC : *flags | X86_EFLAGS_AC;
        *(clac ? &loop->assist->clac : &loop->assist->stac) += 1;
        advance(run, 3);
        return true;
    }
    if (!is(code, size, "\xcc", 1) || !raise_breakpoint(loop))
        return false;
    loop->assist->int3++;
    advance(run, 1);
    return true;
}

/* The handler's first instruction, on which we stopped and would stop again. */
static bool step_over(struct kvmpy_loop *loop, const struct kvm_sregs *sregs)
{
    uint8_t code[4];
    struct kvm_regs *regs = &loop->run->s.regs.regs;
    if (!read_guest(loop, sregs, regs->rip, code, sizeof(code)))
        return false;
    uint64_t size = is(code, 4, "\xf3\x0f\x1e\xfa", 4) ? 4 /* endbr64 */ : is(code, 3, "\x0f\x1f\x00", 3) ? 3 /* nop */
                  : is(code, 3, "\x0f\x01\xca", 3) ? 3 /* clac */ : is(code, 1, "\xfc", 1) ? 1 /* cld */ : 0;
    if (!size)
        return false;
    if (size == 3 && code[1] == 0x01)
        regs->rflags &= ~X86_EFLAGS_AC;
    if (size == 1)
        regs->rflags &= ~X86_EFLAGS_DF;
    loop->assist->page_fault++;
    advance(loop->run, size);
    return true;
}

static void set_flat(struct kvm_segment *segment, uint64_t selector, uint8_t type, uint8_t is_code)
{
    *segment = (struct kvm_segment){.selector = selector, .limit = UINT32_MAX, .type = type, .present = 1,
                                    .s = 1, .g = 1, .l = is_code, .db = !is_code};
}

/* A page fault's handler was entered: finish a SYSCALL that made it, or let the handler go on. */
static bool complete_syscall(struct kvmpy_loop *loop, struct kvm_sregs *sregs)
{
    struct kvm_run *run = loop->run;
    struct kvm_regs *regs = &run->s.regs.regs;
    struct kvmpy_assist *assist = loop->assist;
    uint64_t frame[6]; /* error code, RIP, CS, RFLAGS, RSP, SS */
    uint8_t code[2];
    if (!read_guest(loop, sregs, regs->rsp, frame, sizeof(frame)))
        return false;
    /* As SYSCALL leaves them, and no program that only jumps there can: R11 has the flags, RFLAGS those not masked. */
    bool masked = (frame[3] & ~X86_EFLAGS_RF) == (regs->r11 & ~(assist->fmask | X86_EFLAGS_RF));
    if ((frame[0] & ~PF_ANY_FETCH) != PF_USER || frame[1] != assist->lstar || (frame[2] & 3) != 3 || !masked)
        return step_over(loop, sregs);
    if (!read_guest(loop, sregs, regs->rcx - 2, code, 2) || !is(code, 2, "\x0f\x05", 2) || sregs->cr2 != assist->lstar)
        return false;
    set_flat(&sregs->cs, assist->star >> 32 & 0xfffc, 11, 1);
    set_flat(&sregs->ss, (assist->star >> 32 & 0xfffc) + 8, 3, 0);
    if (kvmpy_ioctl(loop->vcpu_fd, KVM_SET_SREGS, sregs) < 0)
        return false;
    regs->rip = assist->lstar;
    regs->rsp = frame[4];
    regs->rflags = frame[3] & ~(assist->fmask | X86_EFLAGS_RF);
    run->kvm_dirty_regs |= KVM_SYNC_X86_REGS;
    assist->syscall++;
    return true;
}

bool kvmpy_assist(struct kvmpy_loop *loop)
{
    const struct kvm_run *run = loop->run;
    bool debug = run->exit_reason == KVM_EXIT_DEBUG && run->debug.arch.pc == loop->assist->page_fault_handler &&
                 !(run->debug.arch.dr6 & DR6_BS);
    bool failure = run->exit_reason == KVM_EXIT_INTERNAL_ERROR &&
                   run->internal.suberror == KVM_INTERNAL_ERROR_EMULATION && run->internal.ndata >= 3 &&
                   run->internal.data[0] & KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES;
    struct kvm_sregs sregs;
    if (!(debug || failure) || !(run->kvm_valid_regs & KVM_SYNC_X86_REGS) ||
        kvmpy_ioctl(loop->vcpu_fd, KVM_GET_SREGS, &sregs) < 0)
        return false;
    return debug ? complete_syscall(loop, &sregs) : complete_instruction(loop, &sregs);
}

/* avx_pair.c -- do the AVX registers of a process survive when another one runs?
 *
 * Two processes on one processor. In each round each fills all sixteen YMM registers with its own pattern, wakes the
 * other, sleeps until that has done the same, and looks at its registers again. Nothing between the two asm blocks
 * uses a vector register: the file is compiled for general registers alone.
 *
 * Prints:  avx_pair: N of 300 rounds corrupt
 *          avx_pair: no AVX                          when the processor says so (status 2)
 *
 * With the word `anyway` it does not ask: where AVX works in spite of a kernel that has turned it off (`noxsave`),
 * nobody keeps the registers.
 */
#include "user.h"

#define ROUNDS 300
#define REGISTERS 16
#define WORDS 4 /* of 64 bits in one register */

#define CPUID_1_ECX_OSXSAVE (1u << 27)
#define CPUID_1_ECX_AVX (1u << 28)
#define XCR0_SSE_AVX 6u

static uint64_t pattern[REGISTERS][WORDS], seen[REGISTERS][WORDS];

static int has_avx(void)
{
    uint32_t eax = 1, ebx, ecx = 0, edx;
    __asm__ volatile("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
    if (~ecx & (CPUID_1_ECX_OSXSAVE | CPUID_1_ECX_AVX))
        return 0;
    __asm__ volatile("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
    return (eax & XCR0_SSE_AVX) == XCR0_SSE_AVX;
}

#define ALL "0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15"

static void fill(void)
{
    __asm__ volatile(".irp n," ALL "\n vmovdqu 32*\\n(%0), %%ymm\\n\n.endr" : : "r"(pattern) : "memory");
}

static void look(void)
{
    __asm__ volatile(".irp n," ALL "\n vmovdqu %%ymm\\n, 32*\\n(%0)\n.endr" : : "r"(seen) : "memory");
}

/* One side's rounds; `corrupt` has a byte for each, shared by both sides. */
static void side(int which, long from_other, long to_other, uint8_t *corrupt)
{
    for (int round = 0; round < ROUNDS; round++) {
        char token = 0;
        uint64_t *word = &pattern[0][0];
        for (int i = 0; i < REGISTERS * WORDS; i++)
            word[i] = 0x9e3779b97f4a7c15u * (uint64_t)((round * 2 + which) * REGISTERS * WORDS + i + 1);
        fill();
        CALL3(__NR_write, to_other, &token, 1);
        CALL0(__NR_sched_yield);
        if (CALL3(__NR_read, from_other, &token, 1) != 1)
            token = 1; /* the other side is gone: its rounds count as corrupt */
        look();
        for (int i = 0; i < REGISTERS * WORDS; i++)
            if ((&seen[0][0])[i] != word[i])
                token = 1;
        if (token)
            corrupt[round] = 1;
    }
}

int main(int argc, char **argv)
{
    int to_child[2], to_parent[2], rounds = 0, anyway = 0;
    long child;
    uint8_t *corrupt;

    for (int i = 1; i < argc; i++)
        anyway |= same(argv[i], "anyway");
    if (!anyway && !has_avx()) {
        say("avx_pair: no AVX");
        return 2;
    }
    stay_on_one_processor();
    corrupt = (uint8_t *)call6(__NR_mmap, 0, 4096, PROT_READ_WRITE, MAP_SHARED_ANONYMOUS, -1, 0);
    if (checked("avx_pair: mmap", (long)corrupt) < 0 || checked("avx_pair: pipe", CALL1(__NR_pipe, to_child)) < 0 ||
        checked("avx_pair: pipe", CALL1(__NR_pipe, to_parent)) < 0)
        return 1;
    child = checked("avx_pair: fork", CALL0(__NR_fork));
    if (child < 0)
        return 1;
    if (child == 0) {
        CALL1(__NR_close, to_child[1]);
        CALL1(__NR_close, to_parent[0]);
        side(1, to_child[0], to_parent[1], corrupt);
        for (;;)
            CALL1(__NR_exit_group, 0);
    }
    CALL1(__NR_close, to_child[0]);
    CALL1(__NR_close, to_parent[1]);
    side(0, to_parent[0], to_child[1], corrupt);
    CALL4(__NR_wait4, child, 0, 0, 0);
    for (int round = 0; round < ROUNDS; round++)
        rounds += corrupt[round];
    text("avx_pair: ");
    number(rounds);
    text(" of ");
    number(ROUNDS);
    say(" rounds corrupt");
    return rounds != 0;
}

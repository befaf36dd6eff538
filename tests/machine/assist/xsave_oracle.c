/* xsave_oracle.c -- load an FPU state, execute one of the XSAVE family on an area, and say what it made of both.
 *
 * First it writes what CPUID leaf 0xD tells (struct about). Then records of struct request come from standard input,
 * and each gives a struct answer on standard output. Components that the kernel gives a program on demand only (AMX)
 * are not touched.
 */
#define _GNU_SOURCE
#include <cpuid.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#define SIZE 4096
#define USED 0x2ff

struct about {
    uint64_t xcr0;
    uint64_t selectors; /* the 32-bit forms save FCS and FDS */
    uint32_t leaves[64][4];
};
struct request {
    uint64_t operation, mask;
    uint8_t state[SIZE], area[SIZE];
};
struct answer {
    uint64_t signal, xinuse;
    uint8_t image[SIZE], area[SIZE], after[SIZE];
};

static struct request request;
static struct answer answer;
static uint8_t own[SIZE] __attribute__((aligned(64))), state[SIZE] __attribute__((aligned(64)));
static uint8_t area[2 * SIZE] __attribute__((aligned(64))), image[SIZE] __attribute__((aligned(64)));
static uint8_t after[SIZE] __attribute__((aligned(64)));
static sigjmp_buf back;

static void on_signal(int number)
{
    siglongjmp(back, number);
}

/* No C between loading the state and having one's own again: the compiler may use any register. */
#define EXECUTE(instruction)                                                                                           \
    __asm__ volatile("mov %[used], %%eax; xor %%edx, %%edx; xsave64 (%[own]); xrstor64 (%[state]); xsave64 (%[image])" \
                     "\n mov $1, %%ecx; xgetbv; mov %%eax, %[xinuse]"                                                  \
                     "\n mov %[low], %%eax; mov %[high], %%edx; " instruction " (%[area])"                             \
                     "\n mov %[used], %%eax; xor %%edx, %%edx; xsave64 (%[after]); xrstor64 (%[own])"                  \
                     : [xinuse] "=&r"(xinuse)                                                                          \
                     : [used] "i"(USED), [own] "r"(own), [state] "r"(state), [image] "r"(image), [area] "r"(area),     \
                       [after] "r"(after), [low] "m"(low), [high] "m"(high)                                            \
                     : "rax", "rcx", "rdx", "memory")

static uint32_t execute(void)
{
    static uint32_t low, high;
    uint32_t xinuse = 0;
    low = request.mask, high = request.mask >> 32;
    switch (request.operation) {
    case 0: EXECUTE("xsave"); break;
    case 1: EXECUTE("xsave64"); break;
    case 2: EXECUTE("xsaveopt"); break;
    case 3: EXECUTE("xsaveopt64"); break;
    case 4: EXECUTE("xsavec"); break;
    case 5: EXECUTE("xsavec64"); break;
    case 6: EXECUTE("xrstor"); break;
    case 7: EXECUTE("xrstor64"); break;
    }
    return xinuse;
}

static void answer_request(void)
{
    int number;
    memset(image, 0, SIZE), memset(after, 0, SIZE), memset(own, 0, SIZE);
    memcpy(state, request.state, SIZE), memcpy(area, request.area, SIZE);
    number = sigsetjmp(back, 1);
    if (number)
        __asm__ volatile("xrstor64 (%0)" ::"r"(own), "a"(USED), "d"(0) : "memory");
    else
        answer.xinuse = execute();
    answer.signal = number;
    memcpy(answer.image, image, SIZE), memcpy(answer.area, area, SIZE), memcpy(answer.after, after, SIZE);
}

int main(void)
{
    static struct about about;
    uint32_t a, b, c, d;
    struct sigaction action = {.sa_handler = on_signal};
    sigaction(SIGSEGV, &action, NULL);
    __asm__ volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
    about.xcr0 = a | (uint64_t)d << 32;
    __cpuid_count(7, 0, a, b, c, d);
    about.selectors = !(b >> 13 & 1);
    for (int i = 0; i < 64; i++)
        __cpuid_count(13, i, about.leaves[i][0], about.leaves[i][1], about.leaves[i][2], about.leaves[i][3]);
    fwrite(&about, sizeof about, 1, stdout);
    while (fread(&request, sizeof request, 1, stdin) == 1) {
        answer_request();
        fwrite(&answer, sizeof answer, 1, stdout);
    }
    return 0;
}

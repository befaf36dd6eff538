/* user.h -- what a program needs when there is no C library below it: system calls, lines of text, a start, an end.
 *
 * Included by each program of this folder, which is one file. All is compiled for general registers alone: no program
 * touches a vector register that it does not name itself, and none needs more of a processor than x86-64 has.
 *
 * As process 1 a program ends with a reset of the machine; with the word `poweroff` among its arguments (on the
 * kernel's command line behind `--`) with a power-off.
 */
#include <asm/unistd.h>
#include <linux/fcntl.h>
#include <linux/reboot.h>
#include <stdint.h>

#define UNUSED __attribute__((unused))
#define EEXIST 17
#define CLOCK_MONOTONIC 1
#define PROT_READ_WRITE 3
#define MAP_SHARED_ANONYMOUS 0x21
#define MAP_PRIVATE_ANONYMOUS 0x22
#define SIGCHLD 17

/* What Linux calls a negative errno is returned as it is. */
static long call6(long number, long a, long b, long c, long d, long e, long f)
{
    long result;
    register long r10 __asm__("r10") = d;
    register long r8 __asm__("r8") = e;
    register long r9 __asm__("r9") = f;
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    return result;
}

#define CALL0(number) call6(number, 0, 0, 0, 0, 0, 0)
#define CALL1(number, a) call6(number, (long)(a), 0, 0, 0, 0, 0)
#define CALL2(number, a, b) call6(number, (long)(a), (long)(b), 0, 0, 0, 0)
#define CALL3(number, a, b, c) call6(number, (long)(a), (long)(b), (long)(c), 0, 0, 0)
#define CALL4(number, a, b, c, d) call6(number, (long)(a), (long)(b), (long)(c), (long)(d), 0, 0)
#define CALL5(number, a, b, c, d, e) call6(number, (long)(a), (long)(b), (long)(c), (long)(d), (long)(e), 0)

/* The compiler writes calls of these two for loops and for large structures. */
UNUSED void *memcpy(void *to, const void *from, unsigned long size)
{
    void *end = to;
    __asm__ volatile("rep movsb" : "+D"(end), "+S"(from), "+c"(size) : : "memory");
    return to;
}

UNUSED void *memset(void *to, int value, unsigned long size)
{
    void *end = to;
    __asm__ volatile("rep stosb" : "+D"(end), "+c"(size) : "a"(value) : "memory");
    return to;
}

UNUSED static unsigned long length_of(const char *text)
{
    unsigned long length = 0;
    while (text[length])
        length++;
    return length;
}

UNUSED static int same(const char *one, const char *other)
{
    while (*one && *one == *other)
        one++, other++;
    return *one == *other;
}

UNUSED static long number_in(const char *text)
{
    long value = 0;
    while (*text >= '0' && *text <= '9')
        value = value * 10 + *text++ - '0';
    return value;
}

/* --- a line is put together, then written at once: two processes do not mix theirs ----------------------------- */

static char line[256];
static unsigned long line_length;

UNUSED static void text(const char *words)
{
    while (*words && line_length < sizeof line - 1)
        line[line_length++] = *words++;
}

UNUSED static void number(long value)
{
    char digits[21];
    unsigned long at = sizeof digits - 1, rest = value < 0 ? -(unsigned long)value : (unsigned long)value;
    digits[at] = 0;
    do
        digits[--at] = (char)('0' + rest % 10);
    while (rest /= 10);
    if (value < 0)
        digits[--at] = '-';
    text(digits + at);
}

UNUSED static void hex(unsigned long value, int digits)
{
    while (digits--)
        text((char[]){"0123456789abcdef"[value >> digits * 4 & 15], 0});
}

UNUSED static void end_line(void)
{
    line[line_length++] = '\n';
    CALL3(__NR_write, 1, line, line_length);
    line_length = 0;
}

UNUSED static void say(const char *words)
{
    text(words);
    end_line();
}

/* Return `result`; a refused system call is named on a line of its own. */
UNUSED static long checked(const char *what, long result)
{
    if (result < 0) {
        text(what);
        text(": errno ");
        number(-result);
        end_line();
    }
    return result;
}

/* --- time and processors ---------------------------------------------------------------------------------------- */

UNUSED static long now_ns(void)
{
    long time[2];
    CALL2(__NR_clock_gettime, CLOCK_MONOTONIC, time);
    return time[0] * 1000000000 + time[1];
}

/* From here on this process and its children run on the first processor only. */
UNUSED static void stay_on_one_processor(void)
{
    unsigned long first = 1;
    CALL3(__NR_sched_setaffinity, 0, sizeof first, &first);
}

/* As process 1 of an initramfs: make /dev/vda and its like appear. On a disk the kernel has done it. */
UNUSED static void mount_devices(void)
{
    if (CALL0(__NR_getpid) == 1)
        CALL5(__NR_mount, "devtmpfs", "/dev", "devtmpfs", 0, 0);
}

/* --- start and end ---------------------------------------------------------------------------------------------- */

int main(int argc, char **argv);

__attribute__((noreturn)) static void finish(int status, int argc, char **argv)
{
    long how = LINUX_REBOOT_CMD_RESTART;
    if (CALL0(__NR_getpid) == 1) {
        for (int i = 1; i < argc; i++)
            if (same(argv[i], "poweroff"))
                how = LINUX_REBOOT_CMD_POWER_OFF;
        if (status) {
            text("init: status ");
            number(status);
            end_line();
        }
        CALL0(__NR_sync);
        CALL3(__NR_reboot, LINUX_REBOOT_MAGIC1, LINUX_REBOOT_MAGIC2, how);
    }
    for (;;)
        CALL1(__NR_exit_group, status);
}

/* The stack as the kernel leaves it: argc, then argv (System V ABI for x86-64, section 3.4.1). */
__asm__(".globl _start\n"
        "_start:\n"
        "    xorl %ebp, %ebp\n"
        "    movq %rsp, %rdi\n"
        "    andq $-16, %rsp\n"
        "    call begin\n");

__attribute__((noreturn, used)) void begin(long *stack)
{
    int argc = (int)stack[0];
    char **argv = (char **)(stack + 1);
    finish(main(argc, argv), argc, argv);
}

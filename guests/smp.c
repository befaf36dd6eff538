/* smp.c -- the SMP guest behind its entry in smp.S: memory map, cores, and one word in each 2 MiB above 4 GiB.
 *
 * Kept short in what it executes: on hosts that emulate a guest's kernel an instruction costs a microsecond.
 */
#include <stdint.h>

#include "abi.h"

#define GiB (1ull << 30)
#define HUGE_PAGE_SIZE 0x200000ull
#define PRESENT_WRITE 0x03
#define HUGE_PAGE 0x83

/* Multiboot 0.6.96 section 3.3 */
#define MULTIBOOT_MAGIC 0x2badb002
#define MULTIBOOT_HAS_MAP (1u << 6)
#define MAP_RAM 1

struct multiboot_info {
    uint32_t flags, mem_lower, mem_upper, boot_device, command_line, modules[2], symbols[4], map_length, map_address;
};

struct map_entry {
    uint32_t size; /* of what follows */
    uint64_t base, length;
    uint32_t type;
} __attribute__((packed));

/* In smp.S */
extern uint64_t pdpt[512];
extern volatile uint32_t other_core_done;

static volatile uint32_t *const apic = (volatile uint32_t *)0xfee00000;
static uint64_t *const directories = (uint64_t *)0x1000000;
static uint32_t print_lock, x2apic;

static void outb(uint16_t port, uint8_t value)
{
    __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port));
}

static uint8_t inb(uint16_t port)
{
    uint8_t value;
    __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

static uint64_t rdmsr(uint32_t msr)
{
    uint32_t low, high;
    __asm__ volatile("rdmsr" : "=a"(low), "=d"(high) : "c"(msr));
    return (uint64_t)high << 32 | low;
}

static void wrmsr(uint32_t msr, uint64_t value)
{
    __asm__ volatile("wrmsr" : : "a"((uint32_t)value), "d"((uint32_t)(value >> 32)), "c"(msr) : "memory");
}

/* COM1, polled. */

#define LINE_STATUS (KVMPY_PORT_SERIAL + 5)
#define THRE 0x20

static void put(const char *text)
{
    for (; *text; text++) {
        while (!(inb(LINE_STATUS) & THRE))
            ;
        outb(KVMPY_PORT_SERIAL, *text);
    }
}

static void put_dec(uint32_t value)
{
    char digits[11], *p = digits + 10;
    *p = 0;
    do
        *--p = '0' + value % 10;
    while (value /= 10);
    put(p);
}

static void put_hex(uint64_t value)
{
    char digits[17];
    for (int i = 0; i < 16; i++, value <<= 4)
        digits[i] = "0123456789abcdef"[value >> 60];
    digits[16] = 0;
    put(digits);
}

/* The local APIC: by MSR where the processor has an x2APIC (ids of 32 bits, and cheaper), else by memory. */

#define MSR_APIC_BASE 0x1b
#define APIC_BASE_X2APIC (1u << 10)
#define MSR_X2APIC_ID 0x802
#define MSR_X2APIC_ICR 0x830
#define APIC_ID (0x20 / 4)
#define APIC_ICR_LOW (0x300 / 4)
#define APIC_ICR_HIGH (0x310 / 4)
#define ICR_INIT 0x4500
#define ICR_STARTUP 0x4608 /* vector 8: the page 0x8000 */

static void apic_enable(void)
{
    uint32_t eax = 1, ebx, ecx, edx;
    __asm__ volatile("cpuid" : "+a"(eax), "=b"(ebx), "=c"(ecx), "=d"(edx));
    x2apic = ecx >> 21 & 1;
    if (x2apic)
        wrmsr(MSR_APIC_BASE, rdmsr(MSR_APIC_BASE) | APIC_BASE_X2APIC);
}

static uint32_t apic_id(void)
{
    return x2apic ? (uint32_t)rdmsr(MSR_X2APIC_ID) : apic[APIC_ID] >> 24;
}

static void apic_send(uint32_t id, uint32_t command)
{
    if (x2apic) {
        wrmsr(MSR_X2APIC_ICR, (uint64_t)id << 32 | command);
    } else {
        apic[APIC_ICR_HIGH] = id << 24;
        apic[APIC_ICR_LOW] = command;
    }
}

/* Cores */

static void introduce(uint32_t core)
{
    while (__atomic_exchange_n(&print_lock, 1, __ATOMIC_ACQUIRE))
        __builtin_ia32_pause();
    put("core ");
    put_dec(core);
    put(": APIC id ");
    put_dec(apic_id());
    put("\n");
    __atomic_store_n(&print_lock, 0, __ATOMIC_RELEASE);
}

static uint32_t core_now; /* the number of the core that starts */

void smp_other_core(void)
{
    apic_enable();
    introduce(core_now);
}

/* INIT, then the start-up IPI. KVM needs no pause between them, real hardware 10 ms. */
static void start_core(uint32_t core, uint32_t id)
{
    core_now = core;
    other_core_done = 0;
    apic_send(id, ICR_INIT);
    apic_send(id, ICR_STARTUP);
    while (!other_core_done)
        __builtin_ia32_pause();
}

/* MultiProcessor Specification 1.4 section 4: the ids of the usable processors but this one; returns how many. */

#define EBDA 0x9fc00
#define MP_SIGNATURE 0x5f504d5f /* "_MP_" */
#define MAX_IDS 256

static uint8_t ids[MAX_IDS];

static uint32_t read_mp_table(void)
{
    uint32_t found = 0;
    for (uintptr_t at = EBDA; at < EBDA + 1024; at += 16) {
        if (*(uint32_t *)at != MP_SIGNATURE)
            continue;
        uint8_t *table = (uint8_t *)(uintptr_t) * (uint32_t *)(at + 4), *entry = table + 44;
        for (uint32_t n = *(uint16_t *)(table + 34); n; n--, entry += entry[0] ? 8 : 20)
            if (entry[0] == 0 && (entry[3] & 3) == 1 && found < MAX_IDS)
                ids[found++] = entry[1];
        break;
    }
    return found;
}

static uint64_t parameter_cores(void)
{
    const uint8_t *page = (const uint8_t *)KVMPY_PARAMS;
    if (*(uint64_t *)(page + KVMPY_PARAMS_OFF_MAGIC) != KVMPY_PARAMS_MAGIC)
        return 0;
    return *(uint32_t *)(page + KVMPY_PARAMS_OFF_CORES);
}

/* Memory */

static uint64_t print_map(const struct multiboot_info *info)
{
    uint64_t end = 0;
    uintptr_t at = info->map_address, map_end = at + info->map_length;
    while (at < map_end) {
        const struct map_entry *entry = (const struct map_entry *)at;
        put_hex(entry->base);
        put(" + ");
        put_hex(entry->length);
        put(entry->type == MAP_RAM ? " ram\n" : " reserved\n");
        if (entry->type == MAP_RAM && entry->base == 4 * GiB)
            end = entry->base + entry->length;
        at += entry->size + 4;
    }
    return end;
}

/* Page directories for [4 GiB, end), up to the 512 GiB of one PDPT. Who has RAM there has RAM at 16 MiB for them. */
static void map_high(uint64_t end)
{
    for (uint64_t at = 4 * GiB; at < end; at += HUGE_PAGE_SIZE) {
        uint64_t *directory = directories + (at / GiB - 4) * 512;
        pdpt[at / GiB] = (uintptr_t)directory | PRESENT_WRITE;
        directory[at / HUGE_PAGE_SIZE % 512] = at | HUGE_PAGE;
    }
}

/* Each word holds its own address, so a word in a wrong place shows in the sum. */
static void touch_high(uint64_t end)
{
    uint64_t sum = 0;
    uint32_t words = 0;
    map_high(end);
    for (uint64_t at = 4 * GiB; at < end; at += HUGE_PAGE_SIZE)
        *(volatile uint64_t *)at = at;
    for (uint64_t at = 4 * GiB; at < end; at += HUGE_PAGE_SIZE, words++)
        sum += *(volatile uint64_t *)at;
    put_dec(words);
    put(" words above 4 GiB, sum ");
    put_hex(sum);
    put("\n");
}

/* Return the status of the run. */
int smp_main(uint32_t magic, const struct multiboot_info *info)
{
    put("kvmpy guest, ");
    uint32_t cores = parameter_cores(), others = cores ? cores - 1 : read_mp_table();
    put_dec(others + 1);
    put(others ? " cores\n" : " core\n");
    if (magic != MULTIBOOT_MAGIC || !(info->flags & MULTIBOOT_HAS_MAP)) {
        put("no multiboot memory map\n");
        return 1;
    }
    uint64_t end = print_map(info);
    apic_enable();
    introduce(0);
    for (uint32_t i = 0; i < others; i++)
        start_core(i + 1, cores ? i + 1 : ids[i]);
    touch_high(end < 512 * GiB ? end : 512 * GiB);
    return 0;
}

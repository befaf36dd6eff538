/* disk_guest.c -- drives the first virtio-blk device with prepared descriptors, at CPL3, and tells where time went.
 *
 * The command line says what to do (write=, size=, depth=, count=, span=, random=, interrupts=), and where devices are
 * (virtio_mmio.device=SIZE@ADDRESS:IRQ, as Linux reads it). The used ring is polled. Without interrupts= the device is
 * told to raise none; with it, it raises them at a processor that masks them, and each batch is acknowledged.
 *
 * Reports TSC cycles: of the whole loop, of its writes to QueueNotify, of its waiting for the used ring.
 */
#include <stdint.h>

#define QUEUE_SIZE 256
#define MOST_DEPTH 64
#define DATA 0x2000000ull /* the buffers, from 32 MiB on */
#define SECTOR_SIZE 512

/* virtio 1.2 §4.2.2 */
enum { INTERRUPT_STATUS = 0x60, INTERRUPT_ACK = 0x64, MAGIC = 0x00, DEVICE_ID = 0x08, DRIVER_FEATURES = 0x20, DRIVER_FEATURES_SEL = 0x24, QUEUE_SEL = 0x30,
       QUEUE_NUM = 0x38, QUEUE_READY = 0x44, QUEUE_NOTIFY = 0x50, STATUS = 0x70, QUEUE_DESC = 0x80,
       QUEUE_DRIVER = 0x90, QUEUE_DEVICE = 0xa0 };
enum { MAGIC_VALUE = 0x74726976, BLOCK_DEVICE = 2, STATUS_DRIVER = 3, FEATURES_OK = 8, DRIVER_OK = 4,
       FEATURE_FLUSH = 1 << 9, FEATURE_VERSION_1 = 1 << 0, NO_NOTIFY = 1, NO_INTERRUPT = 1, NEXT = 1, WRITE = 2 };

struct descriptor { uint64_t address; uint32_t length; uint16_t flags, next; };
struct used_element { uint32_t id, length; };
struct header { uint32_t type, reserved; uint64_t sector; };

static struct descriptor table[QUEUE_SIZE] __attribute__((aligned(4096)));
static struct { uint16_t flags, index, ring[QUEUE_SIZE], event; } available __attribute__((aligned(4096)));
static volatile struct { uint16_t flags, index; struct used_element ring[QUEUE_SIZE]; uint16_t event; } used
    __attribute__((aligned(4096)));
static struct header headers[MOST_DEPTH];
static volatile uint8_t statuses[MOST_DEPTH];
extern char report[256];

static uint64_t rdtsc(void)
{
    uint32_t low, high;
    __asm__ volatile("rdtsc" : "=a"(low), "=d"(high));
    return (uint64_t)high << 32 | low;
}

static const char *behind(const char *text, const char *word)
{
    for (; *text; text++) {
        const char *a = text, *b = word;
        while (*b && *a == *b)
            a++, b++;
        if (!*b)
            return a;
    }
    return 0;
}

static uint64_t number(const char *text)
{
    uint64_t value = 0, base = 10;
    if (text[0] == '0' && text[1] == 'x')
        base = 16, text += 2;
    for (;; text++) {
        uint64_t digit = *text >= 'a' ? *text - 'a' + 10u : *text <= '9' ? *text - '0' + 0u : base;
        if (digit >= base)
            return value;
        value = value * base + digit;
    }
}

static uint64_t option(const char *line, const char *word)
{
    const char *at = behind(line, word);
    return at ? number(at) : 0;
}

static char *put(char *at, const char *text, uint64_t value)
{
    while (*text)
        *at++ = *text++;
    char digits[20];
    int n = 0;
    do
        digits[n++] = '0' + value % 10;
    while (value /= 10);
    while (n)
        *at++ = digits[--n];
    return at;
}

static volatile uint32_t *find_device(const char *line)
{
    while ((line = behind(line, "virtio_mmio.device="))) {
        const char *at = behind(line, "@");
        volatile uint32_t *registers = (volatile uint32_t *)number(at ? at : "0");
        if (at && registers[MAGIC / 4] == MAGIC_VALUE && registers[DEVICE_ID / 4] == BLOCK_DEVICE)
            return registers;
    }
    return 0;
}

static void set_address(volatile uint32_t *registers, int offset, const volatile void *address)
{
    registers[offset / 4] = (uint32_t)(uintptr_t)address;
    registers[offset / 4 + 1] = 0;
}

static int set_up(volatile uint32_t *registers)
{
    registers[STATUS / 4] = 0;
    registers[STATUS / 4] = STATUS_DRIVER;
    registers[DRIVER_FEATURES_SEL / 4] = 0;
    registers[DRIVER_FEATURES / 4] = FEATURE_FLUSH;
    registers[DRIVER_FEATURES_SEL / 4] = 1;
    registers[DRIVER_FEATURES / 4] = FEATURE_VERSION_1;
    registers[STATUS / 4] = STATUS_DRIVER | FEATURES_OK;
    registers[QUEUE_SEL / 4] = 0;
    registers[QUEUE_NUM / 4] = QUEUE_SIZE;
    set_address(registers, QUEUE_DESC, table);
    set_address(registers, QUEUE_DRIVER, &available);
    set_address(registers, QUEUE_DEVICE, &used);
    registers[QUEUE_READY / 4] = 1;
    registers[STATUS / 4] = STATUS_DRIVER | FEATURES_OK | DRIVER_OK;
    return registers[STATUS / 4] == (STATUS_DRIVER | FEATURES_OK | DRIVER_OK);
}

static void prepare(int slots, uint32_t size, int is_write)
{
    for (int i = 0; i < slots; i++) {
        headers[i].type = is_write;
        uint64_t data = DATA + (uint64_t)i * size;
        for (uint64_t at = 0; at < size; at += 8)
            *(uint64_t *)(data + at) = data + at;
        table[3 * i] = (struct descriptor){(uintptr_t)&headers[i], sizeof headers[i], NEXT, 3 * i + 1};
        table[3 * i + 1] = (struct descriptor){data, size, NEXT | (is_write ? 0 : WRITE), 3 * i + 2};
        table[3 * i + 2] = (struct descriptor){(uintptr_t)&statuses[i], 1, WRITE, 0};
    }
}

void disk_main(const char *line)
{
    uint32_t size = option(line, "size="), depth = option(line, "depth="), count = option(line, "count=");
    uint64_t places = option(line, "span=") / size, random = option(line, "random="), place = 0, state = 1;
    volatile uint32_t *registers = find_device(line);
    if (!registers || !set_up(registers)) {
        put(report, "no device, error ", 1);
        return;
    }
    prepare(depth, size, option(line, "write="));

    uint8_t free_slots[MOST_DEPTH];
    uint32_t free = depth, submitted = 0, errors = 0, notifications = 0;
    uint16_t seen = 0;
    int interrupts = option(line, "interrupts=");
    available.flags = interrupts ? 0 : NO_INTERRUPT;
    uint64_t notifying = 0, waiting = 0, started = rdtsc();
    for (uint32_t i = 0; i < depth; i++)
        free_slots[i] = i;
    for (uint32_t completed = 0; completed < count;) {
        for (; free && submitted < count; submitted++) {
            uint8_t slot = free_slots[--free];
            state = state * 6364136223846793005ull + 1442695040888963407ull;
            place = random ? (state >> 33) % places : submitted % places;
            headers[slot].sector = place * (size / SECTOR_SIZE);
            statuses[slot] = 0xff;
            available.ring[(uint16_t)submitted % QUEUE_SIZE] = 3 * slot;
        }
        __atomic_store_n(&available.index, (uint16_t)submitted, __ATOMIC_RELEASE);
        __asm__ volatile("mfence" : : : "memory");
        uint64_t before = rdtsc();
        if (!(used.flags & NO_NOTIFY)) {
            registers[QUEUE_NOTIFY / 4] = 0;
            notifications++;
        }
        uint64_t middle = rdtsc();
        while (used.index == seen)
            __asm__ volatile("pause");
        notifying += middle - before;
        waiting += rdtsc() - middle;
        if (interrupts)
            registers[INTERRUPT_ACK / 4] = registers[INTERRUPT_STATUS / 4];
        for (; seen != used.index; seen++, completed++) {
            uint8_t slot = used.ring[seen % QUEUE_SIZE].id / 3;
            errors += statuses[slot] != 0;
            free_slots[free++] = slot;
        }
    }
    uint64_t total = rdtsc() - started;
    registers[STATUS / 4] = 0;
    char *at = put(report, "total=", total);
    at = put(at, " notifying=", notifying);
    at = put(at, " waiting=", waiting);
    at = put(at, " notifications=", notifications);
    at = put(at, " errors=", errors);
    *at++ = '\n';
    *at = 0;
}

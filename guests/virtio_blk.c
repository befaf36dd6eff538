/* virtio_blk.c -- the driver behind virtio_blk.S: find the device, agree, and send it requests one by one.
 *
 * A request is a chain of descriptors: a header that the device reads, the data, and a byte in which the device says
 * how it went. The head of the chain goes into the available ring; the device gives it back in the used ring.
 *
 *     descriptor table      available ring            used ring
 *     0 header  -> 1        flags idx [0] [0] ...     flags idx {0, length} ...
 *     1 data    -> 2              |                          |
 *     2 status                    we write: "head 0"         the device writes: "done with head 0"
 */
#include <stdint.h>

#include "abi.h"

#define QUEUE_SIZE 8
#define SECTOR_SIZE 512

/* Registers: virtio 1.2 §4.2.2, in bytes from the device's base */
enum {
    MAGIC_VALUE = 0x00, VERSION = 0x04, DEVICE_ID = 0x08, DRIVER_FEATURES = 0x20, DRIVER_FEATURES_SEL = 0x24,
    QUEUE_SEL = 0x30, QUEUE_NUM_MAX = 0x34, QUEUE_NUM = 0x38, QUEUE_READY = 0x44, QUEUE_NOTIFY = 0x50,
    STATUS = 0x70, QUEUE_DESC = 0x80, QUEUE_DRIVER = 0x90, QUEUE_DEVICE = 0xa0, CAPACITY = 0x100,
};
enum { MAGIC = 0x74726976, BLOCK_DEVICE = 2 }; /* "virt" */
enum { ACKNOWLEDGE = 1, DRIVER = 2, DRIVER_OK = 4, FEATURES_OK = 8 };
enum { FEATURE_FLUSH = 1 << 9, FEATURE_VERSION_1 = 1 << 0 /* of the second word */ };
enum { NEXT = 1, WRITE = 2 }; /* descriptor flags; WRITE: by the device */
enum { READ_REQUEST = 0, WRITE_REQUEST = 1, FLUSH_REQUEST = 4 };

struct descriptor { uint64_t address; uint32_t length; uint16_t flags, next; };
struct available { uint16_t flags, index, ring[QUEUE_SIZE]; };
struct used_element { uint32_t id, length; };
struct used { uint16_t flags, index; struct used_element ring[QUEUE_SIZE]; };
struct header { uint32_t type, reserved; uint64_t sector; };

/* In virtio_blk.S */
void wait_for_interrupt(void);
void put_text(const char *text);
void put_number(uint32_t value); /* up to ten digits */

static struct descriptor table[QUEUE_SIZE] __attribute__((aligned(16)));
static volatile struct available available __attribute__((aligned(2)));
static volatile struct used used __attribute__((aligned(4)));
static volatile struct header header;
static volatile uint8_t status;
static volatile uint32_t sector_data[SECTOR_SIZE / 4];

static volatile uint32_t *const registers = (volatile uint32_t *)KVMPY_VIRTIO_MMIO;

static uint32_t get(int offset)
{
    return registers[offset / 4];
}

static void set(int offset, uint32_t value)
{
    registers[offset / 4] = value;
}

static void set_address(int offset, const volatile void *address)
{
    set(offset, (uint32_t)(uintptr_t)address);
    set(offset + 4, 0);
}

/* The order of these steps is the specification's (§3.1.1): a device may refuse at FEATURES_OK. */
static int set_up(void)
{
    if (get(MAGIC_VALUE) != MAGIC || get(VERSION) != 2 || get(DEVICE_ID) != BLOCK_DEVICE)
        return 0;
    set(STATUS, 0);
    set(STATUS, ACKNOWLEDGE | DRIVER);
    set(DRIVER_FEATURES_SEL, 0);
    set(DRIVER_FEATURES, FEATURE_FLUSH);
    set(DRIVER_FEATURES_SEL, 1);
    set(DRIVER_FEATURES, FEATURE_VERSION_1);
    set(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    if (!(get(STATUS) & FEATURES_OK))
        return 0;
    set(QUEUE_SEL, 0);
    if (get(QUEUE_NUM_MAX) < QUEUE_SIZE)
        return 0;
    set(QUEUE_NUM, QUEUE_SIZE);
    set_address(QUEUE_DESC, table);
    set_address(QUEUE_DRIVER, &available);
    set_address(QUEUE_DEVICE, &used);
    set(QUEUE_READY, 1);
    set(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    return 1;
}

/* Send one request with `length` bytes of data and wait for its end. Returns its status: 0 is success. */
static int request(uint32_t type, uint64_t sector, uint32_t length)
{
    header.type = type;
    header.sector = sector;
    status = 0xff;
    uint16_t after_header = length ? 1 : 2;
    table[0] = (struct descriptor){(uintptr_t)&header, sizeof header, NEXT, after_header};
    table[1] = (struct descriptor){(uintptr_t)sector_data, length, NEXT | (type == READ_REQUEST ? WRITE : 0), 2};
    table[2] = (struct descriptor){(uintptr_t)&status, 1, WRITE, 0};
    available.ring[available.index % QUEUE_SIZE] = 0;
    __atomic_thread_fence(__ATOMIC_SEQ_CST); /* the device must not see the index before the entry */
    available.index++;
    set(QUEUE_NOTIFY, 0); /* no exit to the VMM: the kernel turns this write into an event */
    wait_for_interrupt();
    return used.index == available.index ? status : -1;
}

int driver_main(void)
{
    if (!set_up())
        return 1;
    put_text("the disk has ");
    put_number(get(CAPACITY));
    put_text(" sectors\n");

    if (request(READ_REQUEST, 0, SECTOR_SIZE))
        return 2;
    uint32_t starts = sector_data[0];
    put_text("starts before this one: ");
    put_number(starts);
    put_text("\n");

    sector_data[0] = starts + 1;
    sector_data[SECTOR_SIZE / 4 - 1] = ~starts;
    if (request(WRITE_REQUEST, 0, SECTOR_SIZE))
        return 3;
    if (request(FLUSH_REQUEST, 0, 0)) /* only now is it safe from a power cut */
        return 4;
    sector_data[0] = sector_data[SECTOR_SIZE / 4 - 1] = 0;
    if (request(READ_REQUEST, 0, SECTOR_SIZE) || sector_data[0] != starts + 1 ||
        sector_data[SECTOR_SIZE / 4 - 1] != ~starts)
        return 5;
    put_text("written, flushed, verified\n");
    return 0;
}

/* virtqueue.c -- see virtqueue.h. */
#include "kvmpy.h"

#include <unistd.h>

#define MAX_TABLE_ENTRIES 65536
#define MAX_CHAIN_BYTES (1ull << 32)
#define KNOWN_FLAGS (VRING_DESC_F_NEXT | VRING_DESC_F_WRITE | VRING_DESC_F_INDIRECT)

typedef struct vring_packed_desc packed_desc;
typedef struct vring_packed_desc_event packed_event;
#define AVAIL (1u << VRING_PACKED_DESC_F_AVAIL)
#define USED (1u << VRING_PACKED_DESC_F_USED)
#define WRAP (1u << VRING_PACKED_EVENT_F_WRAP_CTR)

void kvmpy_interrupt_raise(struct kvmpy_interrupt *interrupt, uint64_t bits)
{
    __atomic_fetch_or(&interrupt->status, bits, __ATOMIC_SEQ_CST);
    uint64_t one = 1;
    ssize_t ignored = write(interrupt->fd, &one, sizeof one);
    (void)ignored;
}

void kvmpy_interrupt_acknowledge(struct kvmpy_interrupt *interrupt, uint64_t bits)
{
    __atomic_fetch_and(&interrupt->status, ~bits, __ATOMIC_SEQ_CST);
}

static uint16_t load16(const uint8_t *from)
{
    return __atomic_load_n((const uint16_t *)from, __ATOMIC_ACQUIRE);
}

static void store16(uint8_t *to, uint16_t value)
{
    __atomic_store_n((uint16_t *)to, value, __ATOMIC_RELEASE);
}

static bool is_packed(const struct kvmpy_ring *ring)
{
    return kvmpy_has(ring, VIRTIO_F_RING_PACKED);
}

static bool has_event_idx(const struct kvmpy_ring *ring)
{
    return kvmpy_has(ring, VIRTIO_RING_F_EVENT_IDX);
}

/* --- where things are --- */

static uint8_t *avail_idx(const struct kvmpy_ring *ring)
{
    return ring->driver + offsetof(struct vring_avail, idx);
}

static uint8_t *avail_ring(const struct kvmpy_ring *ring, uint32_t i) /* i = size: used_event */
{
    return ring->driver + offsetof(struct vring_avail, ring) + i * sizeof(uint16_t);
}

static uint8_t *used_ring(const struct kvmpy_ring *ring, uint32_t i) /* i = size: avail_event */
{
    return ring->device + offsetof(struct vring_used, ring) + i * sizeof(struct vring_used_elem);
}

static uint8_t *packed_slot(const struct kvmpy_ring *ring, uint32_t slot)
{
    return ring->descriptors + slot * sizeof(packed_desc);
}

static uint16_t packed_flags(const struct kvmpy_ring *ring, uint32_t slot)
{
    return load16(packed_slot(ring, slot) + offsetof(packed_desc, flags));
}

static bool is_available(uint16_t flags, bool wrap)
{
    return !!(flags & AVAIL) == wrap && !!(flags & USED) != wrap;
}

static void move_on(const struct kvmpy_ring *ring, uint16_t *slot, bool *wrap, uint32_t slots)
{
    uint32_t moved = *slot + slots;
    *wrap ^= moved >= ring->size;
    *slot = moved < ring->size ? moved : moved - ring->size;
}

/* --- chains --- */

/* Add one buffer to the chain: 0 or a fault. */
static int add(const struct kvmpy_ring *ring, struct kvmpy_chain *chain, uint64_t gpa, uint32_t size, uint16_t flags)
{
    bool is_writable = flags & VRING_DESC_F_WRITE;
    if (!is_writable && chain->has_writable)
        return KVMPY_FAULT_BUFFER_ORDER;
    uint8_t *hva = size ? kvmpy_translate(ring->memory, gpa, size) : NULL;
    if (size && !hva)
        return KVMPY_FAULT_BUFFER_ADDRESS;
    *(is_writable ? &chain->writable : &chain->readable) += size;
    if (chain->readable + chain->writable > MAX_CHAIN_BYTES)
        return KVMPY_FAULT_CHAIN_LENGTH;
    chain->count++;
    chain->has_writable |= is_writable;
    if (size) {
        chain->segments[chain->nr_segments++] = (struct iovec){hva, size};
        chain->nr_readable += !is_writable;
    }
    return 0;
}

/* Check a descriptor that refers to an indirect table: 0 and where the table is, or a fault. */
static int find_table(const struct kvmpy_ring *ring, uint64_t gpa, uint32_t size, uint16_t flags, uint8_t **table)
{
    if (!kvmpy_has(ring, VIRTIO_RING_F_INDIRECT_DESC))
        return KVMPY_FAULT_INDIRECT_NOT_NEGOTIATED;
    if (flags & VRING_DESC_F_NEXT)
        return KVMPY_FAULT_INDIRECT_AND_NEXT;
    uint32_t entries = size / sizeof(struct vring_desc);
    if (!entries || size % sizeof(struct vring_desc) || entries > MAX_TABLE_ENTRIES)
        return KVMPY_FAULT_INDIRECT_LENGTH;
    *table = kvmpy_translate(ring->memory, gpa, size);
    return *table ? 0 : KVMPY_FAULT_INDIRECT_ADDRESS;
}

static int walk_split(const struct kvmpy_ring *ring, struct kvmpy_chain *chain)
{
    uint8_t *table = ring->descriptors;
    uint32_t entries = ring->size, index = chain->id;
    bool is_indirect = false;
    for (;;) {
        if (chain->count == ring->size)
            return KVMPY_FAULT_CHAIN_TOO_LONG;
        struct vring_desc desc;
        kvmpy_copy_once(&desc, table + index * sizeof desc, sizeof desc);
        if (desc.flags & ~KNOWN_FLAGS)
            return KVMPY_FAULT_UNKNOWN_FLAGS;
        if (desc.flags & VRING_DESC_F_INDIRECT) {
            if (is_indirect)
                return KVMPY_FAULT_INDIRECT_NESTED;
            int fault = find_table(ring, desc.addr, desc.len, desc.flags, &table);
            if (fault)
                return fault;
            is_indirect = true;
            entries = desc.len / sizeof desc;
            index = 0;
            continue;
        }
        int fault = add(ring, chain, desc.addr, desc.len, desc.flags);
        if (fault || !(desc.flags & VRING_DESC_F_NEXT))
            return fault;
        if (desc.next >= entries)
            return KVMPY_FAULT_NEXT;
        index = desc.next;
    }
}

/* The entries of a packed ring's indirect table follow each other, without NEXT. */
static int walk_table(const struct kvmpy_ring *ring, struct kvmpy_chain *chain, const uint8_t *table, uint32_t entries)
{
    int fault = 0;
    for (uint32_t i = 0; i < entries && !fault; i++) {
        if (chain->count == ring->size)
            return KVMPY_FAULT_CHAIN_TOO_LONG;
        packed_desc desc;
        kvmpy_copy_once(&desc, table + i * sizeof desc, sizeof desc);
        if (desc.flags & VRING_DESC_F_INDIRECT)
            return KVMPY_FAULT_INDIRECT_NESTED;
        fault = add(ring, chain, desc.addr, desc.len, desc.flags);
    }
    return fault;
}

static int walk_packed(const struct kvmpy_ring *ring, struct kvmpy_chain *chain)
{
    uint16_t slot = ring->avail;
    bool wrap = ring->avail_wrap;
    for (;;) {
        if (chain->count == ring->size)
            return KVMPY_FAULT_CHAIN_TOO_LONG;
        uint16_t flags = packed_flags(ring, slot); /* first: they say that the rest is there */
        if (!is_available(flags, wrap))
            return chain->slots ? KVMPY_FAULT_PACKED_NOT_AVAILABLE : KVMPY_RING_EMPTY;
        packed_desc desc;
        kvmpy_copy_once(&desc, packed_slot(ring, slot), sizeof desc);
        if (flags & ~(KNOWN_FLAGS | AVAIL | USED))
            return KVMPY_FAULT_UNKNOWN_FLAGS;
        chain->slots++;
        chain->id = desc.id;
        if (flags & VRING_DESC_F_INDIRECT) {
            uint8_t *table;
            int fault = find_table(ring, desc.addr, desc.len, flags, &table);
            return fault ? fault : walk_table(ring, chain, table, desc.len / sizeof desc);
        }
        int fault = add(ring, chain, desc.addr, desc.len, flags);
        if (fault || !(flags & VRING_DESC_F_NEXT))
            return fault;
        move_on(ring, &slot, &wrap, 1);
    }
}

static int pop_packed(struct kvmpy_ring *ring, struct kvmpy_chain *chain)
{
    int fault = walk_packed(ring, chain);
    if (!fault && chain->id >= ring->size)
        fault = KVMPY_FAULT_BUFFER_ID;
    if (!fault)
        move_on(ring, &ring->avail, &ring->avail_wrap, chain->slots);
    return fault;
}

int kvmpy_ring_pop(struct kvmpy_ring *ring, struct kvmpy_chain *chain)
{
    *chain = (struct kvmpy_chain){.segments = chain->segments};
    if (is_packed(ring))
        return pop_packed(ring, chain);
    uint16_t pending = load16(avail_idx(ring)) - ring->avail;
    if (!pending)
        return KVMPY_RING_EMPTY;
    if (pending > ring->size)
        return KVMPY_FAULT_AVAIL_INDEX;
    chain->id = load16(avail_ring(ring, ring->avail % ring->size));
    if (chain->id >= ring->size)
        return KVMPY_FAULT_HEAD;
    int fault = walk_split(ring, chain);
    ring->avail += !fault;
    return fault;
}

static void push_packed(struct kvmpy_ring *ring, const struct kvmpy_chain *chain, uint32_t written)
{
    uint8_t *slot = packed_slot(ring, ring->used);
    memcpy(slot + offsetof(packed_desc, len), &written, sizeof written);
    memcpy(slot + offsetof(packed_desc, id), &chain->id, sizeof chain->id);
    uint16_t flags = (ring->used_wrap ? AVAIL | USED : 0) | (written ? VRING_DESC_F_WRITE : 0);
    store16(slot + offsetof(packed_desc, flags), flags); /* last: they hand the descriptor over */
    move_on(ring, &ring->used, &ring->used_wrap, chain->slots);
    ring->pushed += chain->slots;
}

void kvmpy_ring_push(struct kvmpy_ring *ring, const struct kvmpy_chain *chain, uint32_t written)
{
    if (is_packed(ring)) {
        push_packed(ring, chain, written);
        return;
    }
    struct vring_used_elem element = {chain->id, written};
    memcpy(used_ring(ring, ring->used % ring->size), &element, sizeof element);
    store16(ring->device + offsetof(struct vring_used, idx), ++ring->used); /* last: it covers the element */
    ring->pushed++;
}

/* --- who wants to be told --- */

bool kvmpy_ring_available(const struct kvmpy_ring *ring)
{
    if (is_packed(ring))
        return is_available(packed_flags(ring, ring->avail), ring->avail_wrap);
    return load16(avail_idx(ring)) != ring->avail;
}

void kvmpy_ring_disable_notifications(struct kvmpy_ring *ring)
{
    if (is_packed(ring))
        store16(ring->device + offsetof(packed_event, flags), VRING_PACKED_EVENT_FLAG_DISABLE);
    else if (!has_event_idx(ring)) /* with it, an avail_event that is behind says so */
        store16(ring->device, VRING_USED_F_NO_NOTIFY);
}

void kvmpy_ring_enable_notifications(struct kvmpy_ring *ring)
{
    if (is_packed(ring)) {
        if (has_event_idx(ring))
            store16(ring->device, ring->avail | (ring->avail_wrap ? WRAP : 0));
        store16(ring->device + offsetof(packed_event, flags),
                has_event_idx(ring) ? VRING_PACKED_EVENT_FLAG_DESC : VRING_PACKED_EVENT_FLAG_ENABLE);
    } else if (has_event_idx(ring)) {
        store16(used_ring(ring, ring->size), ring->avail);
    } else {
        store16(ring->device, 0);
    }
    /* Either the driver sees this, or the caller sees what the driver has made available. */
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

static bool packed_wants_interrupt(const struct kvmpy_ring *ring, uint32_t pushed)
{
    packed_event wish;
    kvmpy_copy_once(&wish, ring->driver, sizeof wish);
    if (wish.flags == VRING_PACKED_EVENT_FLAG_DISABLE)
        return false;
    uint32_t offset = wish.off_wrap & (WRAP - 1);
    if (wish.flags != VRING_PACKED_EVENT_FLAG_DESC || !has_event_idx(ring) || offset >= ring->size)
        return true;
    /* Slots of two turns: the first has wrap counter 1, the second 0. */
    uint32_t awaited = offset + (wish.off_wrap & WRAP ? 0 : ring->size);
    uint32_t now = ring->used + (ring->used_wrap ? 0 : ring->size);
    return (now + 2 * ring->size - awaited - 1) % (2 * ring->size) < pushed;
}

bool kvmpy_ring_wants_interrupt(struct kvmpy_ring *ring)
{
    uint32_t pushed = ring->pushed;
    ring->pushed = 0;
    if (!pushed)
        return false;
    __atomic_thread_fence(__ATOMIC_SEQ_CST); /* either the driver sees the used entry, or we its wish */
    if (is_packed(ring))
        return packed_wants_interrupt(ring, pushed);
    if (!has_event_idx(ring))
        return !(load16(ring->driver) & VRING_AVAIL_F_NO_INTERRUPT);
    uint16_t used_event = load16(avail_ring(ring, ring->size));
    return (uint16_t)(ring->used - used_event - 1) < pushed; /* it is one of those that were pushed */
}

/* memory.c -- see memory.h. */
#include "kvmpy.h"

uint8_t *kvmpy_translate(const struct kvmpy_memory *memory, uint64_t gpa, uint64_t size)
{
    for (uint32_t i = 0; i < memory->nr_regions; i++) {
        const struct kvmpy_region *region = &memory->regions[i];
        uint64_t offset = gpa - region->gpa; /* of a gpa below the region: more than any region has */
        if (offset < region->size && size <= region->size - offset)
            return region->hva + offset;
    }
    return NULL;
}

#define PAGE_MASK (~4095ull)
#define ADDRESS 0x000ffffffffff000ull /* of a page-table entry (Intel SDM vol. 3 §4.5) */
#define PRESENT 1u
#define LARGE (1u << 7)
#define MOST_TABLES 4096

static bool leads_to(const struct kvmpy_memory *memory, uint64_t table, int level, uint64_t page, int *left)
{
    if (table == page || --*left < 0)
        return true;
    const uint64_t *entries = (const uint64_t *)kvmpy_translate(memory, table, 4096);
    for (int i = 0; entries && level > 1 && i < 512; i++) {
        uint64_t entry = __atomic_load_n(&entries[i], __ATOMIC_RELAXED);
        if (!(entry & PRESENT) || (level < 4 && entry & LARGE))
            continue;
        if (level == 2 ? (entry & ADDRESS) == page : leads_to(memory, entry & ADDRESS, level - 1, page, left))
            return true;
    }
    return false;
}

bool kvmpy_is_table(const struct kvmpy_memory *memory, uint64_t cr3, int levels, uint64_t gpa)
{
    int left = MOST_TABLES;
    return leads_to(memory, cr3 & ADDRESS, levels, gpa & PAGE_MASK, &left);
}

bool kvmpy_exchange(uint64_t *word, uint64_t old, uint64_t new)
{
    return __atomic_compare_exchange_n(word, &old, new, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
}

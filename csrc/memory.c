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

bool kvmpy_exchange(uint64_t *word, uint64_t old, uint64_t new)
{
    return __atomic_compare_exchange_n(word, &old, new, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
}

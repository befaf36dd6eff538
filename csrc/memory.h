/* memory.h -- guest RAM as C sees it, filled in by GuestMemory (kvmpy/machine/memory.py). Floor: machine. */
#ifndef KVMPY_MEMORY_H
#define KVMPY_MEMORY_H

#include <stdbool.h>
#include <stdint.h>

/* Each region is contiguous for the guest and for us. */
#define KVMPY_MAX_REGIONS 4
struct kvmpy_memory {
    struct kvmpy_region {
        uint64_t gpa, size;
        uint8_t *hva;
    } regions[KVMPY_MAX_REGIONS];
    uint32_t nr_regions;
};

/* Where [gpa, gpa+size) is, or NULL when it is not wholly inside one region. */
uint8_t *kvmpy_translate(const struct kvmpy_memory *memory, uint64_t gpa, uint64_t size);

/* Whether the page at `gpa` is a table of the long-mode page tables with `levels` levels at `cr3`; also true when these
 * are too many to tell. KVM shadows tables, and sees only what the guest itself writes to them. */
bool kvmpy_is_table(const struct kvmpy_memory *memory, uint64_t cr3, int levels, uint64_t gpa);

/* Put `new` into a word of guest RAM, which vCPUs change too, if it is still `old`; true: it was. */
bool kvmpy_exchange(uint64_t *word, uint64_t old, uint64_t new);

#endif

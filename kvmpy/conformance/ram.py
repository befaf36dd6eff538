"""Guest memory in pieces: neighbouring slots, and slots with holes between them, in a few MiB."""

from collections.abc import Iterator, Sequence

from kvmpy.machine.memory import GuestMemory, MemoryRegion, region_table
from kvmpy.units import GiB, KiB

HOLED = ((0, 1024 * KiB), (1024 * KiB, 512 * KiB), (4 * GiB, 512 * KiB))
"""Two slots side by side, the hole, and one behind it: a buffer may lie in any of them, and in no two."""


def memory_in_regions(regions: Sequence[tuple[int, int]]) -> GuestMemory:
    """Return guest memory with just these regions, as (gpa, bytes), where a real machine has at most two."""
    memory = GuestMemory(sum(size for _, size in regions))
    memory.regions = tuple(_regions(memory, regions))
    memory.table = region_table(memory.regions)
    return memory


def _regions(memory: GuestMemory, regions: Sequence[tuple[int, int]]) -> Iterator[MemoryRegion]:
    whole = memory.regions[0]
    offset = 0
    for gpa, size in regions:
        yield MemoryRegion(gpa, size, whole.offset + offset, memory.hva + offset, whole.mapping)
        offset += size

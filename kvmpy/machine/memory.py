"""Guest memory: RAM of any size, lazily populated, with checked access by guest physical address.

One mapping on the host, laid out in the guest as the regions that `layout.ram_ranges` draws: RAM up to the hole
below 4 GiB, the rest above it. Needs no KVM: `map_into` gives the regions to a VM as memory slots.

The guest writes here while we read. Every accessor copies once and checks address and size together; nobody keeps
a view of guest RAM and parses it twice.
"""

import mmap
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol, Self

from kvmpy._shim import ffi, lib
from kvmpy.errors import GuestMemoryError, ImageError
from kvmpy.machine import layout
from kvmpy.units import PAGE_SIZE, MiB, format_size

HUGE_PAGE_SIZE = 2 * MiB
MINIMUM_SIZE = 1 * MiB


class SlotOwner(Protocol):
    """What takes memory slots: a `kvmpy.kvm.Vm`."""

    def set_user_memory_region(
        self, *, slot: int, guest_phys_addr: int, memory: "MemoryRegion", flags: int = 0
    ) -> None: ...


class MemoryRegion(NamedTuple):
    """A run of guest RAM that is contiguous for the guest and for the host."""

    gpa: int
    size: int
    offset: int
    """Bytes from the start of the mapping (and of its memfd)."""
    hva: int
    mapping: mmap.mmap
    """Held, that it lives as long as a slot made of this region."""


def region_table(regions: Sequence[MemoryRegion]) -> Any:
    """Return ``regions`` as a ``struct kvmpy_memory *``."""
    table = ffi.new("struct kvmpy_memory *", {"nr_regions": len(regions)})
    for i, region in enumerate(regions):
        table.regions[i] = (region.gpa, region.size, ffi.cast("uint8_t *", region.hva))
    return table


class GuestMemory:
    """``size`` bytes of guest RAM; a multiple of 4 KiB, at least 1 MiB.

    Nothing is populated until it is touched: a 3.5 GiB guest costs what it uses. The memory is a memfd, shared, so
    that it can be snapshotted and cloned; with ``hugepages`` it is backed by transparent huge pages, for which it
    becomes anonymous memory where the host gives none to shared memory (`backing` says which).

    Raises:
        ValueError: the size is out of range.
        OSError: the host refused the mapping.
    """

    def __init__(self, size: int, *, hugepages: bool = False) -> None:
        if size < MINIMUM_SIZE or size % PAGE_SIZE:
            raise ValueError(f"memory of {size} bytes: allowed is a multiple of 4096 from 1 MiB")
        self.size = size
        self.fd = -1
        shared = not hugepages or _shared_hugepages()
        # A guest's 2 MiB page needs 2 MiB alignment on the host; mmap promises 4 KiB.
        slack = HUGE_PAGE_SIZE if hugepages else 0
        if shared:
            self.fd = os.memfd_create("kvmpy-ram", os.MFD_CLOEXEC)
        try:
            self._mmap = self._map(size + slack)
        except BaseException:
            self._close_fd()
            raise
        if hugepages:
            self._mmap.madvise(mmap.MADV_HUGEPAGE)
        self._mmap.madvise(mmap.MADV_DONTDUMP)
        base = int(ffi.cast("uintptr_t", ffi.from_buffer(self._mmap)))
        start = -base % HUGE_PAGE_SIZE if hugepages else 0
        self.hva = base + start
        self._view = memoryview(self._mmap)
        self.backing = ("memfd" if shared else "anonymous memory") + (", 2 MiB pages" if hugepages else "")
        self.regions: tuple[MemoryRegion, ...] = tuple(self._regions(start))
        self.table = region_table(self.regions)
        """The same for C; whoever gives it to C keeps it alive."""

    def _map(self, length: int) -> mmap.mmap:
        if self.fd < 0:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | lib.MAP_NORESERVE
            return mmap.mmap(-1, length, flags=flags)
        os.ftruncate(self.fd, length)
        return mmap.mmap(self.fd, length, flags=mmap.MAP_SHARED | lib.MAP_NORESERVE)

    def _regions(self, start: int) -> Iterator[MemoryRegion]:
        offset = start
        for gpa, size in layout.ram_ranges(self.size):
            yield MemoryRegion(gpa, size, offset, self.hva + offset - start, self._mmap)
            offset += size

    def map_into(self, vm: SlotOwner, *, first_slot: int = 0) -> None:
        """Give each region to ``vm`` as a memory slot, from ``first_slot`` on."""
        for slot, region in enumerate(self.regions, first_slot):
            vm.set_user_memory_region(slot=slot, guest_phys_addr=region.gpa, memory=region)

    def region_at(self, gpa: int, size: int) -> MemoryRegion:
        """Return the region that holds all of [gpa, gpa+size).

        Raises:
            GuestMemoryError: some byte of the range is not RAM.
        """
        for region in self.regions:
            if region.gpa <= gpa and gpa + size <= region.gpa + region.size and size >= 0:
                return region
        raise GuestMemoryError(gpa, size, format_size(self.size))

    def contains(self, gpa: int, size: int) -> bool:
        """Tell whether all of [gpa, gpa+size) is RAM."""
        return any(r.gpa <= gpa and gpa + size <= r.gpa + r.size for r in self.regions) and size >= 0

    def view(self, gpa: int, size: int) -> memoryview:
        """Return the live bytes of [gpa, gpa+size): for moving data, never for parsing. Raises GuestMemoryError."""
        region = self.region_at(gpa, size)
        start = region.offset + gpa - region.gpa
        return self._view[start : start + size]

    def read(self, gpa: int, size: int) -> bytes:
        """Copy ``size`` bytes out of the guest. Raises GuestMemoryError."""
        return bytes(self.view(gpa, size))

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Copy ``data`` into the guest. Raises GuestMemoryError; then nothing was written."""
        self.view(gpa, len(data))[:] = data

    def fill(self, gpa: int, size: int, byte: int = 0) -> None:
        """Set ``size`` bytes to ``byte``: the VMM clears, never the guest. Raises GuestMemoryError."""
        lib.memset(ffi.from_buffer(self.view(gpa, size)), byte, size)

    def clear(self) -> None:
        """Make all of it zeros; what is not locked goes back to the host. No vCPU and no device uses it meanwhile."""
        try:
            self._mmap.madvise(mmap.MADV_REMOVE if self.fd >= 0 else mmap.MADV_DONTNEED)
        except OSError:  # EINVAL: it is locked
            for region in self.regions:
                self.fill(region.gpa, region.size)

    def populate(self) -> None:
        """Back all of it with host memory now. Raises OSError (ENOMEM)."""
        self._mmap.madvise(lib.MADV_POPULATE_WRITE)

    def lock(self) -> None:
        """Keep all of it in host memory: it is never swapped out.

        Raises:
            OSError: ENOMEM or EPERM: above RLIMIT_MEMLOCK, or more than there is.
        """
        if lib.mlock(ffi.cast("void *", self.hva), self.size):
            raise OSError(ffi.errno, os.strerror(ffi.errno))

    def load(self, path: str | os.PathLike[str], *, gpa: int) -> int:
        """Read the whole file into the guest at ``gpa`` and return its size in bytes.

        Raises:
            ImageError: it cannot be read, is no regular file, or does not fit.
        """
        try:
            if not os.path.isfile(path) and os.path.exists(path):
                raise ImageError("not a regular file", path=str(path))
            with open(path, "rb") as file, self.view(gpa, os.fstat(file.fileno()).st_size) as target:
                return file.readinto(target)
        except OSError as error:
            raise ImageError(error.strerror or str(error), path=str(path)) from error
        except GuestMemoryError as error:
            raise ImageError(str(error), path=str(path)) from error

    def close(self) -> None:
        """Unmap the memory. The VM that uses it must be closed first. Closing twice is harmless."""
        if not self._mmap.closed:
            self._view.release()
            self._mmap.close()
            self._close_fd()

    def _close_fd(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __del__(self) -> None:
        """Close the memfd of a memory that nobody closed: it alone would keep the RAM. The mapping goes by itself."""
        if hasattr(self, "fd"):  # it has not where the size was refused
            self._close_fd()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"GuestMemory({format_size(self.size)}, {self.backing})"


def _shared_hugepages() -> bool:
    """Tell whether this host backs shared memory with huge pages when madvised."""
    try:
        with open("/sys/kernel/mm/transparent_hugepage/shmem_enabled") as file:
            modes = file.read()
    except OSError:
        return False
    return any(f"[{mode}]" in modes for mode in ("always", "within_size", "advise", "force"))

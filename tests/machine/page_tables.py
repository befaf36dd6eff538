"""Page tables by hand, for the tests of the page walker: one linear address, one table a level."""

from dataclasses import dataclass, field

from kvmpy.machine.memory import GuestMemory
from kvmpy.machine.paging import Paging

PG, WP = 1 << 31, 1 << 16
PSE, PAE, LA57, SMEP, SMAP = 1 << 4, 1 << 5, 1 << 12, 1 << 20, 1 << 21
LMA, NXE = 1 << 10, 1 << 11
AC = 1 << 18
P, RW, US, A, D, PS, XD = 1, 2, 4, 1 << 5, 1 << 6, 1 << 7, 1 << 63

FIRST_TABLE, PAGE = 0x10_000, 0x20_000


@dataclass
class Tables:
    """A path to ``page`` for ``linear``: the table of level n is at FIRST_TABLE + 0x1000 * n.

    ``bits`` are those of each entry by level, besides the address; a ``leaf`` above 1 is a large page.
    """

    memory: GuestMemory
    mode: str
    linear: int
    page: int = PAGE
    leaf: int = 1
    bits: dict[int, int] = field(default_factory=dict)

    @property
    def levels(self) -> int:
        return {"32-bit": 2, "PAE": 3, "4-level": 4, "5-level": 5}[self.mode]

    @property
    def entry_size(self) -> int:
        return 4 if self.mode == "32-bit" else 8

    def entry_gpa(self, level: int) -> int:
        """Where the entry is: the index is what the manual's figures 4-2 to 4-11 cut out of the address."""
        index_bits = 10 if self.mode == "32-bit" else 9
        index = self.linear >> (12 + index_bits * (level - 1)) & ((1 << index_bits) - 1)
        return FIRST_TABLE + 0x1000 * level + index * self.entry_size

    def write(self) -> "Tables":
        """Write every entry, and zeros around."""
        self.memory.fill(FIRST_TABLE, 0x6000)
        for level in range(self.levels, self.leaf - 1, -1):
            target = self.page if level == self.leaf else FIRST_TABLE + 0x1000 * (level - 1)
            rights = P if (self.mode, level) == ("PAE", 3) else P | RW | US
            large = PS if level == self.leaf > 1 else 0
            self.set(level, target | self.bits.get(level, rights) | large)
        return self

    def set(self, level: int, entry: int) -> None:
        self.memory.write(self.entry_gpa(level), entry.to_bytes(self.entry_size, "little"))

    def entry(self, level: int) -> int:
        return int.from_bytes(self.memory.read(self.entry_gpa(level), self.entry_size), "little")

    def entries(self) -> dict[int, int]:
        return {level: self.entry(level) for level in range(self.levels, self.leaf - 1, -1)}

    def paging(self, *, cr0: int = WP, cr4: int = 0, efer: int = NXE, rflags: int = 2, width: int = 52) -> Paging:
        """Return the registers of the mode, with these bits besides."""
        cr4 |= {"32-bit": PSE, "PAE": PAE, "4-level": PAE, "5-level": PAE | LA57}[self.mode]
        efer |= LMA if self.levels > 3 else 0
        return Paging(cr0 | PG | 1, FIRST_TABLE + 0x1000 * self.levels, cr4, efer, rflags, width)

"""A small disk made of every kind of extent there is, on real files, with guards around it.

::

    sector   0        8        16       24
             | OWN    | SHARED | ZERO   | OWN ...              one run of CHUNK sectors after the other
    file 0   [guard][ own bytes of the first half  ][guard]
    file 1   [guard][ own bytes of the second half ][guard]
    file 2   [guard][ what is shared: never written ][guard]

Byte x of the disk has its place at GUARD + x of file 2, and at the same distance from the start of its half in file
0 or 1. A write to what is SHARED or ZERO copies whole chunks there first, as a page blob would. FULL is on /dev/full:
it reads as zeros and takes no write. The table may hide chunks; to read those the image is asked too. The guards, and
all of file 2, stay what they were for ever.

Nothing is made durable: that is for real images.
"""

import os
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Self

from kvmpy.storage.disk import SECTOR_SIZE, ZEROS, Extent

CHUNK = 8
"""Sectors that are copied together."""
GUARD = 4096
"""Bytes in each file before and behind what is the disk's."""
GUARD_BYTES = b"\xa5" * GUARD
SHARED_FILE, FULL_FILE = 2, 3


class State(IntEnum):
    """What a sector is."""

    OWN = 0
    SHARED = 1
    ZERO = 2
    FULL = 3


def pattern(sector: int) -> bytes:
    """Return what a sector holds at first: no two are alike, and none is another one shifted."""
    return ((sector + 1) * 0x9E3779B97F4A7C15 % 2**64).to_bytes(8, "little") * (SECTOR_SIZE // 8)


def memory_file(name: str) -> int:
    """Return the descriptor of a new file that is nowhere but in memory."""
    return os.memfd_create(name, os.MFD_CLOEXEC)


class PatchworkImage:
    """A `DiskImage` whose chunks have the states of ``chunks``, in turn; the table hides those whose indexes are in
    ``hidden``. Two that are made alike and asked alike stay alike.

    ``on_ask`` is called at the beginning of each `map` and `zero`; where ``failing`` is set, they raise it. ``asked``
    counts them. ``make_file`` makes the empty files. ``alignment`` is what it says of itself: its files take anything.
    """

    def __init__(
        self,
        chunks: Sequence[State],
        *,
        hidden: Sequence[int] = (),
        readonly: bool = False,
        alignment: int = 1,
        make_file: Callable[[str], int] = memory_file,
    ) -> None:
        self.readonly, self.alignment = readonly, alignment
        self.size = len(chunks) * CHUNK * SECTOR_SIZE
        self.failing: Exception | None = None
        self.on_ask: Callable[[], None] | None = None
        self.asked = 0
        self._half = len(chunks) // 2 * CHUNK
        self._states = bytearray(state for state in chunks for _ in range(CHUNK))
        self._known = bytearray(chunk not in hidden for chunk in range(len(chunks)) for _ in range(CHUNK))
        sectors = len(self._states)
        self._fds = [make_file(f"disk{number}") for number in range(3)]
        self._fill(0, range(self._half), State.OWN)
        self._fill(1, range(self._half, sectors), State.OWN)
        self._fill(SHARED_FILE, range(sectors), State.SHARED)
        self._shared_at_first = self.dump()[SHARED_FILE]
        self._fds.append(os.open("/dev/full", os.O_RDWR | os.O_CLOEXEC))

    def _fill(self, number: int, sectors: range, state: State) -> None:
        body = b"".join(pattern(each) if self._states[each] == state else bytes(SECTOR_SIZE) for each in sectors)
        os.pwrite(self._fds[number], GUARD_BYTES + body + GUARD_BYTES, 0)

    # --- DiskImage ----------------------------------------------------------------------------------------------

    def table(self) -> list[Extent]:
        """Return the extents of all that is not hidden."""
        return [extent for extent in self._extents(0, self.size // SECTOR_SIZE) if self._known[extent.sector]]

    def map(self, sector: int, sectors: int, *, write: bool) -> list[Extent]:
        """Return the extents of the chunks around the range; with ``write`` they can be written first."""
        self._ask()
        start, end = sector // CHUNK * CHUNK, -(-(sector + sectors) // CHUNK) * CHUNK
        end = min(end, self.size // SECTOR_SIZE)
        if write:
            for each in range(start, end):
                self._take_over(each)
        self._known[start:end] = bytes([True]) * (end - start)
        return self._extents(start, end)

    def zero(self, sector: int, sectors: int) -> list[Extent]:
        """Zero what is OWN in place, make the rest ZERO, and return the extents of just the range."""
        self._ask()
        for each in range(sector, sector + sectors):
            if self._states[each] == State.OWN:
                fd, offset = self._place(each)
                os.pwrite(fd, bytes(SECTOR_SIZE), offset)
            elif self._states[each] == State.SHARED:
                self._states[each] = State.ZERO
        self._known[sector : sector + sectors] = bytes([True]) * sectors
        return self._extents(sector, sector + sectors)

    def close(self) -> None:
        """Close the files. Closing twice is harmless."""
        while self._fds:
            os.close(self._fds.pop())

    # --- the test's side ----------------------------------------------------------------------------------------

    def dump(self) -> list[bytes]:
        """Return the three files whole, guards too, and the state of each sector."""
        files = [os.pread(fd, os.fstat(fd).st_size, 0) for fd in self._fds[:FULL_FILE]]
        return [*files, bytes(self._states)]

    def contents(self) -> bytes:
        """Return the disk as a guest would read it."""
        return b"".join(self._read(each) for each in range(self.size // SECTOR_SIZE))

    def is_intact(self) -> bool:
        """Tell whether all that nobody may write is as it was: the guards, the sizes, the shared file."""
        own, own_too, shared, states = self.dump()
        sizes = (self._half * SECTOR_SIZE, (len(states) - self._half) * SECTOR_SIZE)
        return shared == self._shared_at_first and all(
            len(file) == size + 2 * GUARD and file.startswith(GUARD_BYTES) and file.endswith(GUARD_BYTES)
            for file, size in zip((own, own_too), sizes, strict=True)
        )

    def truncate(self, sectors: int) -> list[bytes]:
        """Cut both files of what is OWN down to so many sectors each, as somebody on the host might.

        Returns what they held, for `restore`.
        """
        held = self.dump()[:2]
        for fd in self._fds[:2]:
            os.ftruncate(fd, GUARD + sectors * SECTOR_SIZE)
        return held

    def restore(self, held: Sequence[bytes]) -> None:
        """Give both files back the bytes that they held."""
        for fd, data in zip(self._fds, held, strict=False):
            os.pwrite(fd, data, 0)

    def heal(self) -> None:
        """Put a file that has room, and that can be synced, where /dev/full was."""
        fd = memory_file("healed")
        os.dup2(fd, self._fds[FULL_FILE], inheritable=False)
        os.close(fd)

    def resize(self, sectors: int) -> None:
        """Show a guest so many sectors, at most as many as there were at first."""
        self.size = sectors * SECTOR_SIZE

    # --- inside -------------------------------------------------------------------------------------------------

    def _ask(self) -> None:
        self.asked += 1
        if self.on_ask is not None:
            self.on_ask()
        if self.failing is not None:
            raise self.failing

    def _place(self, sector: int) -> tuple[int, int]:
        """Return the descriptor and offset of a sector that is OWN."""
        number = int(sector >= self._half)
        return self._fds[number], GUARD + (sector - number * self._half) * SECTOR_SIZE

    def _read(self, sector: int) -> bytes:
        match self._states[sector]:
            case State.OWN:
                fd, offset = self._place(sector)
                return os.pread(fd, SECTOR_SIZE, offset)
            case State.SHARED:
                return os.pread(self._fds[SHARED_FILE], SECTOR_SIZE, GUARD + sector * SECTOR_SIZE)
        return bytes(SECTOR_SIZE)

    def _take_over(self, sector: int) -> None:
        if self._states[sector] in (State.SHARED, State.ZERO):
            fd, offset = self._place(sector)
            os.pwrite(fd, self._read(sector), offset)
            self._states[sector] = State.OWN

    def _extents(self, start: int, end: int) -> list[Extent]:
        """Return [start, end) as extents: another one where the state, the file, or what the table tells changes."""
        edges = [start]
        for each in range(start + 1, end):
            before = each - 1
            alike = self._states[each] == self._states[before] and self._known[each] == self._known[before]
            if not alike or each == self._half:
                edges.append(each)
        return [self._extent(first, next_ - first) for first, next_ in zip(edges, [*edges[1:], end], strict=True)]

    def _extent(self, sector: int, sectors: int) -> Extent:
        match self._states[sector]:
            case State.ZERO:
                return Extent(sector, sectors, ZEROS)
            case State.SHARED:
                fd = self._fds[SHARED_FILE]
                return Extent(sector, sectors, fd, GUARD + sector * SECTOR_SIZE, unaligned_fd=fd)
            case State.FULL:
                fd, offset = self._fds[FULL_FILE], 0
            case _:
                fd, offset = self._place(sector)
        return Extent(sector, sectors, fd, offset, writable=not self.readonly, unaligned_fd=fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

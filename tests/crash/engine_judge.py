"""What a guest's disk may hold after a power cut, sector by sector.

A sector holds what it held at the last promise (a FLUSH that was acknowledged; with writethrough, the completion of
each write), or anything that was submitted since. Nothing tells in which order a device takes what is in flight.

The image has promised more than the guest hears of: what it allocates, and what it makes zeros itself, is durable
when it returns (`DiskImage.map`, `DiskImage.zero`).
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from engine_story import IMAGE, PROMISES, REQUESTS, ZEROS, Setup, pattern

from kvmpy.devices.virtio_blk import Cache
from kvmpy.storage.blob import PageBlob
from kvmpy.storage.convert import check_disk
from kvmpy.storage.disk import SECTOR_SIZE, DiskImage
from kvmpy.storage.disk import ZEROS as NOWHERE
from kvmpy.storage.extents import copy_nonzero
from kvmpy.storage.open import open_disk
from kvmpy.storage.vhd_dynamic import DynamicVhd

BY_IMAGE = ("shared discard", "image zero")
CHANGES = ("write", "discard", "zero", "unmap", *BY_IMAGE)
NEVER = 1 << 60

Tags = Mapping[int, set[int]]
"""Sector -> the tags that it may have. Others hold zeros."""


class Log:
    """What the marks tell: when each request was submitted and done, as positions among them."""

    def __init__(self, marks: Iterable[str]) -> None:
        self.submitted: dict[int, int] = {}
        self.done: dict[int, int] = {}
        self.mapped: list[range] = []
        self.zeroed: list[range] = []
        self.is_open = False
        for position, mark in enumerate(marks):
            word, *numbers = mark.split()
            match word:
                case "open":
                    self.is_open = True
                case "submit" | "done":
                    {"submit": self.submitted, "done": self.done}[word][int(numbers[0])] = position
                case "map" | "zero":
                    start, count = map(int, numbers)
                    {"map": self.mapped, "zero": self.zeroed}[word].append(range(start, start + count))

    def durable(self, setup: Setup) -> set[int]:
        """Return the numbers of the requests that were promised to be durable."""
        zeroed = {i for i in self.submitted if REQUESTS[i].what in BY_IMAGE and REQUESTS[i].range(setup) in self.zeroed}
        if setup.cache is Cache.WRITETHROUGH:
            return zeroed | set(self.done)
        promised = max((self.submitted[i] for i in self.done if REQUESTS[i].what in PROMISES), default=-1)
        return zeroed | {i for i, position in self.done.items() if position < promised}

    def changes(self) -> Iterator[tuple[int, int]]:
        """Yield (position, number) of the requests that change sectors and are done, in the order of that."""
        return ((position, i) for i, position in self.done.items() if REQUESTS[i].what in CHANGES)


def judge(setup: Setup, folder: Path, marks: list[str]) -> str | None:
    """Return what of the promises does not hold in ``folder``, or None."""
    log = Log(marks)
    path = folder / setup.name / IMAGE
    allowed = allowed_tags(setup, log)
    with open_disk(path, format=setup.format, readonly=True) as image:
        problem = _judge_sectors(image, allowed)
        if isinstance(image, PageBlob):
            problem = problem or _judge_snapshots(image, setup, log)
        if isinstance(image, DynamicVhd):
            problem = problem or _judge_places(image, log)
    if problem is None and log.is_open:
        problem = "; ".join(check_disk(str(path), format=setup.format)) or None
    return problem or _take_over(setup, path, allowed)


def allowed_tags(setup: Setup, log: Log) -> Tags:
    """Return what each sector may hold."""
    durable = log.durable(setup)
    covering: dict[int, list[int]] = {}
    for i in log.submitted:
        if REQUESTS[i].what in CHANGES:
            for sector in REQUESTS[i].range(setup):
                covering.setdefault(sector, []).append(i)
    allowed = {sector: {tag} for sector, tag in setup.initial().items()}
    for sector, requests in covering.items():
        settled = max((log.submitted[i] for i in requests if i in durable), default=-1)
        # What was done when a durable one was submitted is overwritten for ever.
        tags = {REQUESTS[i].tag for i in requests if log.done.get(i, NEVER) > settled}
        allowed[sector] = tags if settled >= 0 else tags | allowed.get(sector, {ZEROS})
    return allowed


def _judge_sectors(image: DiskImage, allowed: Tags) -> str | None:
    unseen = dict(allowed)
    wrong = []

    def look(offset: int, data: memoryview) -> None:
        for at in range(0, len(data), SECTOR_SIZE):
            sector = (offset + at) // SECTOR_SIZE
            found = bytes(data[at : at + SECTOR_SIZE])
            if found not in [pattern(tag, sector) for tag in unseen.pop(sector, {ZEROS})]:
                wrong.append(f"sector {sector} holds {found[:8].hex()}, allowed: {allowed.get(sector)}")

    copy_nonzero(image, look)
    wrong += [f"sector {sector} holds zeros, allowed: {tags}" for sector, tags in unseen.items() if ZEROS not in tags]
    return wrong[0] if wrong else None


def _judge_snapshots(blob: PageBlob, setup: Setup, log: Log) -> str | None:
    """The first is what was there before the guest; the second what was done when it was asked for."""
    submitted = next((position for i, position in log.submitted.items() if REQUESTS[i].what == "snapshot"), None)
    is_done = any(REQUESTS[i].what == "snapshot" for i in log.done)
    if len(blob.snapshots) not in (1 + is_done, 1 + (submitted is not None)):
        return f"{len(blob.snapshots)} snapshots"
    tags = setup.initial()
    for snapshot in blob.snapshots:
        with PageBlob.open(blob.path, snapshot=snapshot.id) as image:
            problem = _judge_sectors(image, {sector: {tag} for sector, tag in tags.items()})
        if problem:
            return f"snapshot {snapshot.id}: {problem}"
        tags = tags | {
            sector: REQUESTS[i].tag
            for position, i in log.changes()
            if position < (submitted or 0)
            for sector in REQUESTS[i].range(setup)
        }
    return None


def _judge_places(image: DiskImage, log: Log) -> str | None:
    """What was mapped for writing has a place in the file."""
    for sectors in log.mapped:
        if any(extent.fd == NOWHERE for extent in image.map(sectors.start, len(sectors), write=False)):
            return f"nothing is allocated for sector {sectors.start}"
    return None


def _take_over(setup: Setup, path: Path, allowed: Tags) -> str | None:
    """The next writer finds a disk that it can go on with, and the same bytes when all of it was made writable."""
    with open_disk(path, format=setup.format) as image:
        image.map(0, image.size // SECTOR_SIZE, write=True)
        problem = _judge_sectors(image, allowed)
    return problem or "; ".join(check_disk(str(path), format=setup.format)) or None

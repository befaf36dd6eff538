"""Processes that fight for one disk: each opens it for writing, adds one to a counter in its first sector, closes it.

Run as ``storm.py PATH FORMAT INCREMENTS SEED``. Now and then one of them is killed, wherever it is just then, and
another takes its place. Prints, in JSON, the values that were reported as written, how many processes were killed, and
what the counter holds at the end. With ``without-lock`` behind these, nobody takes the writer's lock.

Adding one is no single step: between reading and writing it each process lets the others run.
"""

import fcntl
import json
import os
import select
import signal
import struct
import sys
import time
import traceback
from random import Random

from kvmpy.errors import LeaseError
from kvmpy.storage.disk import SECTOR_SIZE, DiskImage, Extent
from kvmpy.storage.open import open_disk

PROCESSES = 3
TURNS = 2
"""How often a process lets others run between reading and writing the counter."""
TIME_LIMIT = 60.0
"""Seconds without a report."""
COUNTER = struct.Struct("<Q")
FAILED = 2**64 - 1
"""What a process reports that meets anything but another writer."""


def extent_of(image: DiskImage, *, write: bool) -> Extent:
    """Return the extent that has the first sector."""
    return next(extent for extent in image.map(0, 1, write=write) if extent.sector == 0)


def read_counter(image: DiskImage) -> int:
    extent = extent_of(image, write=False)
    data = bytes(SECTOR_SIZE) if extent.fd < 0 else os.pread(extent.fd, SECTOR_SIZE, extent.offset)
    (value,) = COUNTER.unpack_from(data)
    assert data == COUNTER.pack(value) * (SECTOR_SIZE // COUNTER.size), "half a write"
    return value


def increment(image: DiskImage) -> int:
    """Add one, as a guest does, and return the new value."""
    value = read_counter(image) + 1
    for _ in range(TURNS):
        os.sched_yield()
    extent = extent_of(image, write=True)
    os.pwrite(extent.fd, COUNTER.pack(value) * (SECTOR_SIZE // COUNTER.size), extent.offset)
    return value


def fight(path: str, format: str, reports: int, parent: int) -> None:
    """Add one, again and again, whenever the disk can be had."""
    while os.getppid() == parent:
        try:
            image = open_disk(path, format=format)
        except LeaseError:
            continue
        value = increment(image)
        image.close()
        os.write(reports, COUNTER.pack(value))


class Storm:
    """The processes, and what they report."""

    def __init__(self, path: str, format: str, seed: int) -> None:
        self._path, self._format = path, format
        self._random = Random(seed)
        self._reports, self._write_end = os.pipe()
        self._pids: list[int] = []
        self.killed = 0
        self.reported: list[int] = []

    def rage(self, increments: int) -> None:
        """Go on until so many were reported, or one of them twice; at the end nobody is left."""
        try:
            self._pids = [self._start() for _ in range(PROCESSES)]
            while len(self.reported) < increments and len(set(self.reported)) == len(self.reported):
                self._wait_for_reports(self._random.randrange(1, 20))
                self._kill(self._random.randrange(PROCESSES))
                self._pids.append(self._start())
        finally:
            while self._pids:
                self._kill(0)
        os.close(self._write_end)
        while data := os.read(self._reports, COUNTER.size):
            self._hear(data)

    def _start(self) -> int:
        parent = os.getpid()
        pid = os.fork()
        if not pid:
            try:
                fight(self._path, self._format, self._write_end, parent)
            except Exception:
                traceback.print_exc()
                os.write(self._write_end, COUNTER.pack(FAILED))
            finally:
                os._exit(1)
        return pid

    def _wait_for_reports(self, count: int) -> None:
        deadline = time.monotonic() + TIME_LIMIT
        for _ in range(count):
            assert select.select([self._reports], [], [], deadline - time.monotonic())[0], "nobody gets the disk"
            self._hear(os.read(self._reports, COUNTER.size))

    def _hear(self, data: bytes) -> None:
        (value,) = COUNTER.unpack(data)
        assert value != FAILED, "a process has failed"
        self.reported.append(value)

    def _kill(self, index: int) -> None:
        pid = self._pids.pop(index)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        self.killed += 1


def main(path: str, format: str, increments: str, seed: str, *options: str) -> None:
    if "without-lock" in options:
        fcntl.flock = lambda fd, operation: None
    storm = Storm(path, format, int(seed))
    storm.rage(int(increments))
    with open_disk(path, format=format) as image:  # at once: all who held it are dead
        count = read_counter(image)
    json.dump({"reported": storm.reported, "killed": storm.killed, "count": count}, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])

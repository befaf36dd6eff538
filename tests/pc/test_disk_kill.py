"""A write that was flushed survives kill -9 of the process that runs the machine, at any moment.

The guest writes ascending numbers in turn into eight sectors, flushes after each, and reports what was flushed on the
debug console. It is killed somewhere; the disk is opened, at once, and holds all that was reported; the next guest
goes on from there. Between two guests the blob is snapshotted, so that each of them begins with shared pages.
"""

import os
import select
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pytest
from disk_guests import DATA, DRIVER, IOAPIC, MMIO
from guest_code import assemble

from kvmpy.storage.blob import PageBlob
from kvmpy.storage.convert import check_disk, create
from kvmpy.storage.disk import SECTOR_SIZE, DiskImage
from kvmpy.storage.open import open_disk
from kvmpy.units import MiB

KILLS = 1000 if "KVMPY_CAMPAIGN" in os.environ else 12
"""Of the guests on each kind of disk."""
SEED = int(os.environ.get("KVMPY_SEED", "20261120"))
SLOTS, SPACING = 8, 256
"""Sectors that the guest writes, and how far they are from each other: no two are allocated, or copied, together."""
MOST_REPORTS = 30
TIME_LIMIT = 30.0
"""Seconds that a guest may take to its next report."""
SNAPSHOTS_KEPT = 2

COUNT = f"""
        .set SLOTS, {SLOTS} ; .set SPACING, {SPACING} ; .set DATA, {DATA}
        movl $0x80000, %esp
        call wires
        lidt idtr
        movl $start_device, %ebx
        call each
        xorl %r12d, %r12d                       # the newest number on the disk
        xorl %r13d, %r13d
1:      movl %r13d, %edx
        movl $0, %eax ; movl $3, %ecx           # IN
        call request
        cmpl DATA, %r12d
        jae 2f
        movl DATA, %r12d
2:      incl %r13d
        cmpl $SLOTS, %r13d
        jne 1b

next:   incl %r12d
        movl $DATA, %edi ; movl $128, %ecx ; movl %r12d, %eax
        rep stosl
        movl %r12d, %edx
        movl $1, %eax ; movl $1, %ecx           # OUT
        call request
        movl $4, %eax ; movl $1, %ecx           # FLUSH
        xorl %edx, %edx
        call request
        movl $8, %ecx                           # the number is safe: report it, in hex
3:      roll $4, %r12d
        movl %r12d, %eax
        andb $15, %al
        cmpb $10, %al
        jb 4f
        addb $39, %al
4:      addb $'0', %al
        outb %al, $KVMPY_PORT_CONSOLE
        decl %ecx
        jnz 3b
        movb $10, %al
        outb %al, $KVMPY_PORT_CONSOLE
        jmp next

request:                                        # eax type, ecx flags of the data, edx the number, whose slot it is
        andl $SLOTS - 1, %edx
        imull $SPACING, %edx
        xorl %esi, %esi
        call place
        call submit
        incl steps
1:      cli
        xorl %esi, %esi
        call place
        movw steps, %ax
        cmpw %ax, USED_AT + 2(%rbp)
        je 2f
        sti
        hlt
        jmp 1b
2:      cmpb $0, STATUS_AT(%rbp) ; jne fail
        ret
"""


@pytest.fixture
def guest(tmp_path: Path) -> Path:
    """The guest's image."""
    image = tmp_path / "count.bin"
    image.write_bytes(assemble(MMIO + COUNT + DRIVER + IOAPIC, "long"))
    return image


class Victim:
    """``kvmpy run`` of the guest, until it is killed; ``reported`` is what the guest said."""

    def __init__(self, guest: Path, disk: Path, format: str, engine: str) -> None:
        option = f"{disk},engine={engine}" + (f",format={format}" if format != "blob" else "")
        command = [sys.executable, "-m", "kvmpy", "run", guest, "--disk", option, "--mem", "4M"]
        command += ["--format", "flat", "--mode", "long", "--serial", "none"]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        self._output = self._process.stdout.fileno()
        self._text = b""

    @property
    def reported(self) -> list[int]:
        whole, _, _ = self._text.rpartition(b"\n")
        return [int(line, 16) for line in whole.split()]

    def wait_for_reports(self, count: int) -> None:
        """Return soon after so many."""
        deadline = time.monotonic() + TIME_LIMIT
        while len(self.reported) < count:
            assert select.select([self._output], [], [], deadline - time.monotonic())[0], "the guest is silent"
            data = os.read(self._output, 1 << 16)
            assert data, f"it ended by itself, with status {self._process.wait(TIME_LIMIT)}"
            self._text += data

    def kill(self) -> None:
        """Kill it, wait for its end, and hear what it said until then."""
        self._process.kill()
        self._process.wait(TIME_LIMIT)
        while data := os.read(self._output, 1 << 16):
            self._text += data
        assert self._process.stdout is not None
        self._process.stdout.close()


def numbers_on(image: DiskImage) -> list[int]:
    """Return the number in each slot."""
    found = []
    for slot in range(SLOTS):
        sector = slot * SPACING
        (extent,) = (e for e in image.map(sector, 1, write=False) if e.sector <= sector < e.end)
        data = bytes(SECTOR_SIZE)
        if extent.fd >= 0:
            data = os.pread(extent.fd, SECTOR_SIZE, extent.offset + (sector - extent.sector) * SECTOR_SIZE)
        assert data == data[:4] * (SECTOR_SIZE // 4), f"slot {slot} holds half a number"
        found.append(int.from_bytes(data[:4], "little"))
    return found


def check_numbers(found: list[int], newest: int) -> None:
    """No number up to ``newest`` is lost; what the guest wrote after its last report is there without a gap too."""
    last = max(found)
    assert last >= newest
    assert sorted(found) == [max(number, 0) for number in range(last - SLOTS + 1, last + 1)]
    assert all(number % SLOTS == slot for slot, number in enumerate(found) if number)


def test_lost_number_is_seen() -> None:
    """The planted defect: one slot holds what it held before."""
    sound = [24, 17, 18, 19, 20, 21, 22, 23]
    check_numbers(sound, 23)
    for slot in range(SLOTS):
        with pytest.raises(AssertionError):
            check_numbers([number - SLOTS * (i == slot) for i, number in enumerate(sound)], 24)


@pytest.mark.kvm
@pytest.mark.parametrize("format", ["blob", "vhd", "raw"])
def test_flushed_write_survives_kill(format: str, guest: Path, tmp_path: Path) -> None:
    """Nothing that was reported is lost, no snapshot changes, and the next guest goes on."""
    disk, random = tmp_path / "disk", Random(f"{SEED} {format}")
    create(str(disk), 1 * MiB, format="vhd-dynamic" if format == "vhd" else format)
    newest = 0
    kept: dict[str, list[int]] = {}
    for turn in range(KILLS):
        victim = Victim(guest, disk, format, engine=("c", "python")[turn % 2])
        try:
            victim.wait_for_reports(random.randrange(1, MOST_REPORTS))
        finally:
            victim.kill()
        newest = _newest(victim.reported, newest)
        assert check_disk(str(disk), format=format) == []
        with open_disk(disk, format=format) as image:
            found = numbers_on(image)
            check_numbers(found, newest)
            newest = max(found)
            if isinstance(image, PageBlob):
                _check_and_keep_snapshots(image, kept, found)
    print(f"\nseed {SEED}: {KILLS} kills, {newest} numbers")


def _newest(reported: list[int], newest: int) -> int:
    """The guest begins where the last one ended, and counts."""
    assert reported == list(range(newest + 1, newest + 1 + len(reported)))
    return reported[-1]


def _check_and_keep_snapshots(blob: PageBlob, kept: dict[str, list[int]], found: list[int]) -> None:
    """The snapshots hold what they held; the oldest goes, and there is another one."""
    assert [snapshot.id for snapshot in blob.snapshots] == list(kept)
    for snapshot, numbers in kept.items():
        with PageBlob.open(blob.path, snapshot=snapshot) as image:
            assert numbers_on(image) == numbers
    if len(kept) == SNAPSHOTS_KEPT:
        oldest = next(iter(kept))
        blob.delete_snapshot(oldest)
        del kept[oldest]
    kept[blob.snapshot().id] = found

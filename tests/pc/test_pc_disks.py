"""Disks of a running PC: real guests that read, write and flush, and the handle by which the host has a disk."""

import fcntl
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from disk_guests import DATA, IOAPIC, PICS, guest, watch_capacity

from kvmpy import Disk, DiskError
from kvmpy.machine import layout
from kvmpy.machine.bus import Mode
from kvmpy.pc import Pc, RunResult
from kvmpy.pc.disk import Cache, Engine
from kvmpy.pc.disks import SPIN_NS, spin_ns
from kvmpy.storage.blob import PageBlob
from kvmpy.units import KiB, MiB

pytestmark = pytest.mark.kvm

SECTOR = 512
LINES = "{0}\n{0}\n{0}\n"
"""What the guest prints: status 0 of each disk, after reading, writing and flushing."""
FINISH = "xorl %eax, %eax\n outb %al, $KVMPY_PORT_EXIT\n hlt"
PYTHON = {"engine": Engine.PYTHON}
MakePc = Callable[..., Pc]


def sectors(disk: Any) -> tuple[bytes, bytes]:
    """Return the first two sectors of a disk's file."""
    data = Path(disk.path).read_bytes()
    return data[:SECTOR], data[SECTOR : 2 * SECTOR]


def uses(result: RunResult) -> tuple[int, int]:
    """Return reads and writes of all registers of all disks."""
    found = [(use.reads, use.writes) for use in result.ranges if use.name == "disk"]
    return sum(reads for reads, _ in found), sum(writes for _, writes in found)


# --- real guests ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", Engine)
@pytest.mark.parametrize(("wires", "count"), [(PICS, 8), (IOAPIC, 8), (IOAPIC, 16)], ids=["PICs", "IOAPIC", "all"])
def test_disks_serve_a_guest_at_once(make_disk_pc: MakePc, wires: str, count: int, engine: Engine) -> None:
    """virtio 1.2 §3.1, §4.2, §5.2: found, negotiated, read, written and flushed; each disk has its own bytes.

    All interrupts come, also from the pins that only the I/O APIC has: the guest halts until they do.
    """
    pc = make_disk_pc(count, code=guest(wires), disk={"engine": engine})
    result = pc.run(timeout=20.0)
    assert (result.debugcon, result.status) == (LINES.format("0" * count), 0)
    for i, (disk, use) in enumerate(zip(pc.spec.disks, result.disks, strict=True)):
        first, second = sectors(disk)
        assert first == second == bytes([i + 1]) * SECTOR
        assert use.path == disk.path
        assert use.counters == (1, 1, 1, 0, 0, SECTOR, SECTOR)


@pytest.mark.parametrize("engine", Engine)
@pytest.mark.parametrize("cache", Cache)
def test_every_cache_mode_serves(make_disk_pc: MakePc, cache: Cache, engine: Engine) -> None:
    pc = make_disk_pc(1, disk={"cache": cache, "engine": engine})
    assert pc.run(timeout=20.0).debugcon == LINES.format(0)
    assert sectors(pc.spec.disks[0])[1] == b"\1" * SECTOR


@pytest.mark.parametrize("cache", Cache)
def test_page_cache_is_passed_by_only_with_cache_direct(make_disk_pc: MakePc, cache: Cache) -> None:
    """open(2), O_DIRECT."""
    pc = make_disk_pc(1, disk={"cache": cache, "engine": Engine.PYTHON})
    opened = [fd for fd in os.listdir("/proc/self/fd") if is_open(fd, pc.spec.disks[0].path)]
    direct = [fd for fd in opened if fcntl.fcntl(int(fd), fcntl.F_GETFL) & os.O_DIRECT]
    assert opened
    assert bool(direct) == (cache is Cache.DIRECT)


def is_open(fd: str, path: str) -> bool:
    try:
        return os.readlink(f"/proc/self/fd/{fd}") == path
    except FileNotFoundError:  # the one by which the folder was listed
        return False


@pytest.mark.parametrize("engine", Engine)
def test_guest_reads_the_serial_number(make_disk_pc: MakePc, engine: Engine) -> None:
    """virtio 1.2 §5.2.6, VIRTIO_BLK_T_GET_ID (8): 20 bytes, padded with NULs."""
    code = guest(IOAPIC).replace("movl $0, %eax", "movl $8, %eax", 1)
    pc = make_disk_pc(code=code, disk={"serial": "KV-0001", "engine": engine})
    assert pc.run(timeout=20.0).debugcon == LINES.format(0)
    assert pc.memory.read(DATA, 21) == b"KV-0001".ljust(21, b"\0")


@pytest.mark.parametrize("engine", Engine)
def test_readonly_disk_refuses_writes_and_stays_as_it_is(make_disk_pc: MakePc, engine: Engine) -> None:
    """virtio 1.2 §5.2.6.2: a write to a read-only device is IOERR (1), and the flush is not."""
    pc = make_disk_pc(1, disk={"readonly": True, "engine": engine})
    assert pc.run(timeout=20.0).debugcon == "0\n1\n0\n"
    assert sectors(pc.spec.disks[0])[1] == bytes(SECTOR)


@pytest.mark.parametrize("mode", [Mode.PYTHON, Mode.TRACE])
def test_registers_in_python_give_the_same_and_show_each_notification(make_disk_pc: MakePc, mode: Mode) -> None:
    """In C a QueueNotify exits to nobody: three for each disk are what Python sees more."""
    in_c, result = (run_and_close(make_disk_pc(2, disk=PYTHON, device_modes=modes)) for modes in ({}, {"disk": mode}))
    assert result.debugcon == in_c.debugcon == LINES.format("00")
    # How often the guest is interrupted, and so reads and acknowledges, depends on who was faster.
    interrupts = [uses(run)[0] for run in (in_c, result)]
    assert uses(result)[1] - interrupts[1] == uses(in_c)[1] - interrupts[0] + 2 * 3


def run_and_close(pc: Pc) -> RunResult:
    with pc:
        return pc.run(timeout=20.0)


@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize("engine", Engine)
def test_last_of_four_queues_serves(make_disk_pc: MakePc, engine: Engine, cores: int) -> None:
    """virtio 1.2 §5.2.3, VIRTIO_BLK_F_MQ (bit 12): each queue has a notification and a thread of its own."""
    code = guest(IOAPIC).replace("$0, QUEUE_SEL", "$3, QUEUE_SEL").replace("$0, NOTIFY", "$3, NOTIFY")
    code = code.replace("$0x200, DRIVER_FEATURES", "$0x1200, DRIVER_FEATURES")
    pc = make_disk_pc(2, code=code, disk={"queues": 4, "engine": engine}, cores=cores)
    assert pc.run(timeout=20.0).debugcon == LINES.format("00")


def test_guest_without_disks_finds_none(run_guest: Callable[..., RunResult]) -> None:
    """Nobody answers at the windows: all ones."""
    result = run_guest("movl $KVMPY_VIRTIO_MMIO, %edi\n movl (%rdi), %ebx\n" + FINISH, "long")
    assert (result.registers[0]["rbx"], result.unmapped_reads, result.disks) == (0xFFFF_FFFF, 1, ())


# --- the handle -------------------------------------------------------------------------------------------------


def test_handle_knows_its_disk(make_disk_pc: MakePc) -> None:
    first, second = make_disk_pc(2, disk=PYTHON).disks
    assert (first.size, first.readonly) == (64 * KiB, False)
    assert [disk.window for disk in (first, second)] == list(layout.virtio_windows(2))
    assert first.counters() == (0,) * 7


def test_image_is_lent_while_requests_wait_and_not_after_the_end(make_disk_pc: MakePc) -> None:
    pc = make_disk_pc(1, disk=PYTHON)
    with pc.disks[0].exclusive() as image:
        assert image.size == 64 * KiB
    pc.run(timeout=20.0)
    pc.close()
    with pytest.raises(ValueError, match="disk0 is closed"), pc.disks[0].exclusive():
        pass
    assert pc.disks[0].counters().reads == 1


def test_raw_disk_has_its_size_for_good(make_disk_pc: MakePc) -> None:
    with pytest.raises(DiskError, match=r"disk0: .* size for good"):
        make_disk_pc(1, disk=PYTHON).disks[0].resize(1 * MiB)


@pytest.mark.parametrize("engine", Engine)
def test_guest_hears_of_another_size(make_disk_pc: MakePc, tmp_path: Path, engine: Engine) -> None:
    """virtio 1.2 §5.2.5, §4.2.2: a configuration change notification, and the new capacity behind it."""
    PageBlob.create(tmp_path / "blob", ord("A") * SECTOR).close()

    def grow(printed: bytes) -> None:
        if printed == b"A":
            pc.disks[0].resize(ord("B") * SECTOR)

    pc = make_disk_pc(disks=[Disk(tmp_path / "blob", engine=engine)], code=watch_capacity(), debugcon=grow)
    assert pc.run(timeout=20.0).debugcon == "AB"
    assert pc.disks[0].size == ord("B") * SECTOR


@pytest.mark.parametrize("engine", Engine)
def test_requests_wait_while_the_image_is_lent(make_disk_pc: MakePc, engine: Engine) -> None:
    """No request executes inside: the guest's read stays open until the image is given back."""
    pc = make_disk_pc(1, disk={"engine": engine})
    disk, results = pc.disks[0], []
    runner = threading.Thread(target=lambda: results.append(pc.run(timeout=20.0)))
    with disk.exclusive():
        runner.start()
        runner.join(0.3)
        assert runner.is_alive()
        assert disk.counters().reads == 0
    runner.join(20.0)
    assert results[0].debugcon == LINES.format(0)


def test_workers_look_for_more_only_on_a_cpu_to_spare() -> None:
    """Where each host CPU has a vCPU, a worker that spins takes its time from one."""
    host_cpus = len(os.sched_getaffinity(0))
    assert spin_ns(host_cpus) == spin_ns(host_cpus + 1) == 0
    if host_cpus > 1:
        assert spin_ns(host_cpus - 1) == SPIN_NS


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two host CPUs")
def test_workers_of_a_pinned_vcpu_run_anywhere(make_disk_pc: MakePc) -> None:
    """A thread begins where its maker may run, and a vCPU's thread makes the workers."""
    allowed = os.sched_getaffinity(0)
    seen: list[set[int]] = []

    def look(_: bytes) -> None:
        workers = [thread for thread in threading.enumerate() if thread.name == "disk0-queue0"]
        seen.extend(os.sched_getaffinity(worker.native_id or 0) for worker in workers)
        pc.stop()

    code = guest(IOAPIC).replace("outb %al, $KVMPY_PORT_EXIT", "1: jmp 1b", 1)  # the disks live until they are seen
    pc = make_disk_pc(code=code, disk=PYTHON, pin=[min(allowed)], debugcon=look)
    pc.run(timeout=20.0)
    assert seen
    assert all(cpus == allowed for cpus in seen)

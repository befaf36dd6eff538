"""The guest of test_disk.py, built from ``disk_guest.S`` and ``.c``, and how it is run here and under QEMU."""

import importlib.util
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import OUTPUT, ROOT

from kvmpy import Disk, Kvm, MachineSpec, MiB, Pc
from kvmpy.devices.block_c import BlockCycles
from kvmpy.machine.boot.plan import BootOptions
from kvmpy.pc.disk import Engine

HERE = Path(__file__).parent
IMAGE = OUTPUT / "disk_guest.elf"
MEMORY = 256  # MiB
QEMU_SUCCESS = 1  # isa-debug-exit makes (v << 1) | 1 of the guest's v
REPORT = re.compile(r"total=(\d+) notifying=(\d+) waiting=(\d+) notifications=(\d+) errors=0\n")


class Workload(NamedTuple):
    """What the guest asks for: ``count`` transfers of ``size`` bytes, ``depth`` of them in flight, within ``span``."""

    name: str
    size: int
    depth: int
    count: int
    span: int
    write: bool = False
    random: bool = True
    interrupts: bool = False

    @property
    def words(self) -> str:
        """The guest's command line."""
        return (
            f"write={int(self.write)} size={self.size} depth={self.depth} count={self.count} "
            f"span={self.span} random={int(self.random)} interrupts={int(self.interrupts)}"
        )

    @property
    def transfers(self) -> str:
        """The same for ``disk_loop.c``."""
        return f"{self.write:d} {self.size} {self.count} {self.random:d}"


class Times(NamedTuple):
    """Microseconds of one request, on average: in all, the guest's writes to QueueNotify, and its waiting."""

    total: float
    notifying: float
    waiting: float

    @property
    def guest(self) -> float:
        """What the guest's own loop took."""
        return self.total - self.notifying - self.waiting

    @property
    def host(self) -> float:
        """What is not the guest's."""
        return self.total - self.guest


class Shares(NamedTuple):
    """Microseconds of one request in the worker of the C engine: at the rings, in the file, raising the interrupt."""

    queue: float
    file: float
    interrupt: float


def build() -> None:
    """Make the image, with the compiler's options of the lessons."""
    spec = importlib.util.spec_from_file_location("guests_build", ROOT / "guests" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    lessons = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(lessons)
    OUTPUT.mkdir(parents=True, exist_ok=True)
    objects = []
    for source, options in ((HERE / "disk_guest.S", []), (HERE / "disk_guest.c", lessons.FREESTANDING)):
        objects.append(OUTPUT / f"{source.name}.o")
        lessons.run(*lessons.COMPILE, *options, source, "-o", objects[-1])
    lessons.run(*lessons.LINK, "-T", ROOT / "guests" / "elf.ld", *objects, "-o", IMAGE)


@cache
def tsc_mhz() -> float:
    """Return the time-stamp counter's cycles in a microsecond: the guest's is the host's."""
    with Kvm() as kvm, kvm.create_vm() as vm:
        return vm.create_vcpu(0).get_tsc_khz() / 1000


def times(report: str, workload: Workload) -> Times:
    """Return what the guest measured."""
    found = REPORT.fullmatch(report)
    assert found is not None, f"the guest said {report!r}"
    return Times(*(int(found[i]) / tsc_mhz() / workload.count for i in (1, 2, 3)))


def run_kvmpy(
    disk: Path, workload: Workload, *, engine: Engine = Engine.C, format: str | None = "raw"
) -> tuple[Times, Shares | None]:
    """Run the guest here; the shares are the C engine's."""
    spec = MachineSpec(
        str(IMAGE),
        memory=MEMORY * MiB,
        hugepages=True,  # as QEMU's are
        boot_options=BootOptions(append=workload.words),
        disks=[Disk(disk, format=format, engine=engine)],
        measure_time=True,
    )
    with Pc(spec) as pc:
        result = pc.run(timeout=60)
        assert result.status == 0, result.message
        cycles = pc.disks[0].cycles()
        return times(result.debugcon, workload), None if cycles is None else shares(cycles, workload)


def shares(cycles: BlockCycles, workload: Workload) -> Shares:
    """Return what the worker's time stamps say."""
    scale = tsc_mhz() * workload.count
    queue = cycles.serving - cycles.spinning - cycles.file - cycles.interrupt
    return Shares(queue / scale, cycles.file / scale, cycles.interrupt / scale)


def run_qemu(disk: Path, workload: Workload) -> Times:
    """Run the same guest under QEMU's microvm, with the same cache mode."""
    qemu = shutil.which("qemu-system-x86_64")
    if qemu is None:
        pytest.skip("qemu-system-x86_64 is not installed: apt install qemu-system-x86")
    # Without ACPI microvm tells the guest on its command line where the disk is. Some KVM refuses arch-capabilities.
    options = (
        f"-M microvm,acpi=off -m {MEMORY}M -accel kvm -cpu host,-arch-capabilities -nodefaults -no-user-config "
        "-global virtio-mmio.force-legacy=false -nographic -chardev stdio,id=c "
        "-device isa-debugcon,iobase=0xe9,chardev=c -device isa-debug-exit,iobase=0xf4 "
        f"-drive file={disk},if=none,id=d,format=raw,cache=writeback -device virtio-blk-device,drive=d"
    )
    command = [qemu, *options.split(), "-kernel", str(IMAGE), "-append", workload.words]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    assert done.returncode == QEMU_SUCCESS, done.stderr
    return times(done.stdout, workload)

"""How disks of a PC end: one writer, nothing left open, errors that are told, and no thread behind the last vCPU."""

import fcntl
import gc
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from kvmpy import Disk, DiskError, ImageError
from kvmpy.devices.python_queue import PythonQueue
from kvmpy.errors import LeaseError
from kvmpy.machine.boot.plan import BootOptions
from kvmpy.machine.machine import EndReason
from kvmpy.pc import ExitStatus, Pc
from kvmpy.pc.disk import Engine
from kvmpy.storage.raw import RawDisk

pytestmark = pytest.mark.kvm

PYTHON = {"engine": Engine.PYTHON}
MakePc = Callable[..., Pc]


def is_locked(path: Path) -> bool:
    """Tell whether somebody holds the writer's lock of a raw disk."""
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_disk_has_one_writer_until_its_pc_is_closed(make_disk_pc: MakePc) -> None:
    pc = make_disk_pc(1, disk=PYTHON)
    path = Path(pc.spec.disks[0].path)
    assert is_locked(path)
    with pytest.raises(LeaseError, match="disk0"):
        Pc(pc.spec)
    pc.close()
    assert not is_locked(path)


def test_one_disk_cannot_be_attached_twice(make_disk_pc: MakePc, disk_images: Callable[[int], list[Path]]) -> None:
    (path,) = disk_images(1)
    with pytest.raises(LeaseError, match="disk0"):
        make_disk_pc(disks=[Disk(path, format="raw", engine="python")] * 2)
    assert not is_locked(path)
    make_disk_pc(disks=[Disk(path, format="raw", engine="python", readonly=True)] * 2)


def test_what_was_opened_is_closed_when_a_later_step_fails(make_disk_pc: MakePc, tmp_path: Path) -> None:
    """A second disk that is not there; an image that is none, when devices and VM are there already."""
    pc = make_disk_pc(1, disk=PYTHON)
    pc.close()
    (disk,) = pc.spec.disks
    before = sorted(os.listdir("/proc/self/fd"))
    with pytest.raises(DiskError, match="missing"):
        Pc(pc.spec.replace(disks=[disk, Disk(tmp_path / "missing", format="raw")]))
    (tmp_path / "empty").touch()
    with pytest.raises(ImageError, match="empty"):
        Pc(pc.spec.replace(boot=tmp_path / "empty", boot_options=BootOptions()))
    assert not is_locked(Path(disk.path))
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_worker_that_raises_ends_the_run(make_disk_pc: MakePc, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a Python device that raises: a defect is shown, not swallowed."""

    def serve(queue: PythonQueue) -> None:
        raise RuntimeError("a defect in the engine")

    monkeypatch.setattr(PythonQueue, "serve", serve)
    pc = make_disk_pc(1, disk=PYTHON)
    with pytest.raises(RuntimeError, match="a defect in the engine"):
        pc.run(timeout=20.0)
    assert pc.machine.end is not None
    assert pc.machine.end.reason is EndReason.ERROR


@pytest.mark.parametrize("error", [DiskError("Input/output error", path="disk"), OSError(5, "Input/output error")])
def test_close_that_cannot_make_all_durable_says_so_and_closes_all(
    make_disk_pc: MakePc, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Whatever the host said: it is an error of the disk, which is named."""
    close = RawDisk.close

    def fail(disk: RawDisk) -> None:
        close(disk)
        raise error

    monkeypatch.setattr(RawDisk, "close", fail)
    pc = make_disk_pc(2, disk=PYTHON)
    pc.run(timeout=20.0)
    with pytest.raises(DiskError, match=r"disk\S*: Input/output error"):
        pc.close()
    assert not any(is_locked(Path(disk.path)) for disk in pc.spec.disks)
    assert pc.kvm.fd < 0
    pc.close()


@pytest.mark.parametrize("engine", Engine)
def test_nothing_serves_after_the_end_of_a_run(make_disk_pc: MakePc, engine: Engine) -> None:
    """No thread of a queue is left, so guest memory stays as it is: a core is written of it."""
    pc = make_disk_pc(2, disk={"engine": engine})
    pc.run(timeout=20.0)
    assert [thread.name for thread in threading.enumerate() if "queue" in thread.name] == []


@pytest.mark.parametrize("engine", Engine)
def test_request_that_waits_for_its_rate_does_not_hold_up_the_end(make_disk_pc: MakePc, engine: Engine) -> None:
    """A second request of an IOPS limit of one a second: the timeout comes first, and the PC is closed at once."""
    pc = make_disk_pc(1, disk={"iops": 1, "engine": engine})
    result = pc.run(timeout=0.3)
    assert (result.reason, result.status) == (EndReason.TIMEOUT, ExitStatus.LIMIT)
    assert result.disks[0].counters.reads == 1
    assert result.seconds < 0.9
    pc.close()


@pytest.mark.parametrize("engine", Engine)
def test_pcs_with_disks_leave_nothing_behind(make_disk_pc: MakePc, engine: Engine) -> None:
    pc = make_disk_pc(3, disk={"engine": engine, "queues": 2})
    spec = pc.spec
    pc.close()

    def work() -> None:
        with Pc(spec) as pc:
            assert pc.run(timeout=20.0).status == 0

    work()
    gc.collect()
    before = sorted(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(10):
        work()
    gc.collect()
    assert (sorted(os.listdir("/proc/self/fd")), threading.active_count()) == before

"""Disks as a spec says them: what is allowed, and what is refused before anything is opened."""

from pathlib import Path

import pytest

from kvmpy import Disk, MachineSpec
from kvmpy.machine.layout import virtio_windows
from kvmpy.pc import Announcement
from kvmpy.pc.disk import Cache, Engine


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"queues": 0}, "0 queues: allowed is 1 to 64"),
        ({"queues": 65}, "65 queues: allowed is 1 to 64"),
        ({"iops": -1}, "iops of -1: allowed is 1 to 1099511627776, or 0 for no limit"),
        ({"bps": 1 << 41}, "bps of 2199023255552: allowed is"),
        ({"serial": "x" * 21}, "serial 'x+': allowed is up to 20 printable characters of ASCII"),
        ({"serial": "caf\u00e9"}, "serial .*: allowed is"),
        ({"serial": "a\0b"}, "serial .*: allowed is"),
        ({"cache": "none"}, "'none' is not a valid Cache"),
        ({"engine": "rust"}, "'rust' is not a valid Engine"),
    ],
)
def test_what_no_disk_can_be_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Disk("d", **options)


def test_disk_without_a_name_is_refused() -> None:
    with pytest.raises(ValueError, match="without a path"):
        Disk("")


def test_limits_themselves_are_allowed() -> None:
    """virtio 1.2 §5.2.6.1: the serial number has 20 bytes, and no NUL where it fills them."""
    disk = Disk("d", queues=64, iops=1 << 40, bps=1, serial="x" * 20)
    assert (disk.queues, disk.iops, disk.bps, disk.serial) == (64, 1 << 40, 1, "x" * 20)


def test_choices_may_be_said_as_text() -> None:
    disk = Disk(Path("d"), cache="direct", engine="python")
    assert (disk.path, disk.cache, disk.engine) == ("d", Cache.DIRECT, Engine.PYTHON)


def test_machine_takes_sixteen_disks_and_no_more() -> None:
    """Each has an interrupt pin of its own."""
    spec = MachineSpec("guest", disks=[Disk("d")] * 16)
    assert spec.virtio_windows == virtio_windows(16)
    with pytest.raises(ValueError, match=r"17 virtio devices \(disks, rng, console\): allowed is up to 16"):
        spec.replace(disks=[Disk("d")] * 17)


def test_announcement_is_one_of_two() -> None:
    assert MachineSpec("guest").virtio is Announcement.CMDLINE
    assert MachineSpec("guest", virtio="acpi").virtio is Announcement.ACPI
    with pytest.raises(ValueError, match="'pci' is not a valid Announcement"):
        MachineSpec("guest", virtio="pci")

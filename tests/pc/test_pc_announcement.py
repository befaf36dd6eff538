"""What Linux is told of its disks: by its command line or by ACPI, never by both."""

from collections.abc import Callable
from pathlib import Path

import pytest

from kvmpy import Disk, MachineSpec
from kvmpy._shim import lib
from kvmpy.lessons import find
from kvmpy.machine import layout
from kvmpy.machine.boot.plan import BootOptions
from kvmpy.pc import Announcement, Pc
from kvmpy.pc.disk import Engine
from kvmpy.units import KiB

pytestmark = pytest.mark.kvm


DSDT_NAME = b"LNRO0005"
WORDS = b"virtio_mmio.device=4K@0xd0000000:5 virtio_mmio.device=4K@0xd0001000:6"


@pytest.fixture
def told(disk_images: Callable[[int], list[Path]]) -> Callable[..., tuple[bytes, bytes, bytes]]:
    """Return a function that gives command line, ACPI tables and parameter page of a Linux-like kernel's machine."""

    def told(lesson: str, virtio: Announcement) -> tuple[bytes, bytes, bytes]:
        disks = [Disk(path, format="raw", engine=Engine.PYTHON) for path in disk_images(2)]
        options = BootOptions(append="quiet -- single")
        with Pc(MachineSpec(find(lesson).image, boot_options=options, disks=disks, virtio=virtio)) as pc:
            return (
                pc.memory.read(layout.COMMAND_LINES, 4 * KiB).partition(b"\0")[0],
                pc.memory.read(layout.ACPI_TABLES, layout.ACPI_TABLES_SIZE),
                pc.memory.read(layout.PARAMETER_PAGE, 4 * KiB),
            )

    return told


@pytest.mark.parametrize("lesson", ["pvh_hello", "bzimage_hello"])
def test_linux_is_told_by_its_command_line_alone(told: Callable[..., tuple[bytes, bytes, bytes]], lesson: str) -> None:
    """Never both: a device that is announced twice is claimed twice."""
    cmdline, acpi, page = told(lesson, Announcement.CMDLINE)
    assert cmdline == b"quiet " + WORDS + b" -- single"
    assert DSDT_NAME not in acpi
    assert page[lib.KVMPY_PARAMS_OFF_VIRTIO_COUNT] == 2


@pytest.mark.parametrize("lesson", ["pvh_hello", "bzimage_hello"])
def test_linux_is_told_by_acpi_alone(told: Callable[..., tuple[bytes, bytes, bytes]], lesson: str) -> None:
    cmdline, acpi, page = told(lesson, Announcement.ACPI)
    assert cmdline == b"quiet -- single"
    assert acpi.count(DSDT_NAME) == 2
    assert list(page[lib.KVMPY_PARAMS_OFF_VIRTIO_GSI :][:3]) == [5, 6, 0]

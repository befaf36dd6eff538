"""Machines with disks: raw images, and a PC whose guest is the driver of `disk_guests`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from disk_guests import IOAPIC, guest

from kvmpy import Disk
from kvmpy.pc import Pc
from kvmpy.units import KiB

SECTOR = 512


@pytest.fixture
def disk_images(tmp_path: Path) -> Callable[[int], list[Path]]:
    """Return a function that makes raw images of 64 KiB, whose first sectors differ and whose others are zeros."""

    def make(count: int) -> list[Path]:
        paths = [tmp_path / f"disk{i}" for i in range(count)]
        for i, path in enumerate(paths):
            path.write_bytes(bytes([i + 1]) * SECTOR + bytes(64 * KiB - SECTOR))
        return paths

    return make


@pytest.fixture
def make_disk_pc(make_pc: Callable[..., Pc], disk_images: Callable[[int], list[Path]]) -> Callable[..., Pc]:
    """Return a function that makes a PC with ``count`` such disks, whose guest has the text ``code``.

    ``disk`` are options of each `Disk`; others go to `make_pc`.
    """

    def make(count: int = 1, *, code: str = guest(IOAPIC), disk: dict[str, Any] | None = None, **options: Any) -> Pc:
        options.setdefault("disks", [Disk(path, format="raw", **disk or {}) for path in disk_images(count)])
        return make_pc(code, "long", **options)

    return make

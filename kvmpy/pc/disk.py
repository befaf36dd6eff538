"""A disk as a `MachineSpec` describes it: which file, how it is cached, how fast it may be. Says, never opens.

Not here: what the file's format is (`kvmpy.storage`), and the device that the guest sees (`kvmpy.pc.disks`).
"""

import os
from enum import StrEnum

from kvmpy._shim import lib
from kvmpy.devices.virtio_blk import QUEUES_MAX
from kvmpy.devices.virtio_blk import Cache as Cache

MAX_RATE = 1 << 40
"""A second. No disk is as fast, and the arithmetic of a rate and nanoseconds stays inside 128 bits."""


class Engine(StrEnum):
    """Who executes the requests."""

    C = "c"
    PYTHON = "python"
    """The readable twin: the same to the byte, and slower."""


class Disk:
    """The image at ``path``, as a virtio-blk device of a guest.

    ``format``: see `kvmpy.storage.open.open_disk`; None: the path is a page blob, whose metadata say what it is.
    ``iops`` and ``bps`` are limits in requests and bytes a second; 0 is none. ``serial`` is what the guest reads as
    the disk's serial number, up to 20 characters of ASCII.

    Raises:
        ValueError: a value is not allowed; the message says what is.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        format: str | None = None,
        readonly: bool = False,
        cache: Cache = Cache.WRITEBACK,
        queues: int = 1,
        iops: int = 0,
        bps: int = 0,
        serial: str = "",
        engine: Engine = Engine.C,
    ) -> None:
        self.path, self.format, self.readonly = os.fspath(path), format, readonly
        self.cache, self.queues, self.engine = Cache(cache), queues, Engine(engine)
        self.iops, self.bps, self.serial = iops, bps, serial
        self._check()

    def _check(self) -> None:
        if not self.path:
            raise ValueError("a disk without a path")
        if not 1 <= self.queues <= QUEUES_MAX:
            raise ValueError(f"{self.queues} queues: allowed is 1 to {QUEUES_MAX}")
        for name, rate in (("iops", self.iops), ("bps", self.bps)):
            if not 0 <= rate <= MAX_RATE:
                raise ValueError(f"{name} of {rate}: allowed is 1 to {MAX_RATE}, or 0 for no limit")
        printable = self.serial.isascii() and self.serial.isprintable()
        if not printable or len(self.serial) > lib.VIRTIO_BLK_ID_BYTES:
            allowed = f"up to {lib.VIRTIO_BLK_ID_BYTES} printable characters of ASCII"
            raise ValueError(f"serial {self.serial!r}: allowed is {allowed}")

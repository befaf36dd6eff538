"""The initial root file system of Debian's stock kernel: busybox, the kernel's modules, and `init_debian.sh`."""

from collections.abc import Mapping
from pathlib import Path

import newc
from newc import Entry, folder, link, program
from programs import CONSOLE, FOLDERS

INIT = Path(__file__).with_name("init_debian.sh")


def entries(busybox: bytes, modules: Mapping[str, bytes]) -> list[Entry]:
    """Return its entries; ``modules`` are in the order in which init shall load them."""
    order = "".join(f"{name}.ko\n" for name in modules)
    return [
        *FOLDERS,
        CONSOLE,
        *(folder(name) for name in ("bin", "sbin", "modules")),
        program("bin/busybox", busybox),
        link("bin/sh", "busybox"),
        program("modules/order", order.encode()),
        *(program(f"modules/{name}.ko", data) for name, data in modules.items()),
        program("init", INIT.read_bytes()),
    ]


def archive(busybox: bytes, modules: Mapping[str, bytes]) -> bytes:
    """Return it as the kernel wants it, not packed: that is quicker for a guest than to unpack it."""
    return newc.archive(entries(busybox, modules))

"""A flat image: bytes without any header, put where the user says and started there.

No file says that it is flat, so nothing is found here: it is what ``--format flat`` asks for.
"""

from kvmpy.machine import layout
from kvmpy.machine.boot.image import ImageFile
from kvmpy.machine.boot.place import check_segments, reach
from kvmpy.machine.boot.plan import BootOptions, CpuMode, Entry, Found, Plan, Segment
from kvmpy.machine.memory import GuestMemory

TITLE = "flat"
SERVES = frozenset({"address", "mode", "entry"})


def probe(image: ImageFile) -> Found | None:
    """Return None: any file could be flat, and none says so."""
    return None


def plan(image: ImageFile, memory: GuestMemory, options: BootOptions) -> Plan:
    """Return the plan to load at ``options.address`` and start at ``options.entry`` in ``options.mode``.

    Without them: real mode; at 0x1000 in real mode and 1 MiB in the others; started at its first byte.

    Raises:
        ImageError: the file does not fit at that address.
        ValueError: the address is negative, the entry is outside the image, or the mode cannot reach it.
    """
    mode = options.mode or CpuMode.REAL
    default = layout.REAL_MODE_ENTRY if mode is CpuMode.REAL else layout.HIGH_MEMORY
    address = default if options.address is None else options.address
    entry = address if options.entry is None else options.entry
    if address < 0:
        raise ValueError(f"address {address}: 0 or more is wanted")
    segment = Segment(address, 0, image.size, image.size)
    if entry >= reach(mode):
        raise ValueError(f"entry 0x{entry:x} is out of reach: {mode} mode starts below 0x{reach(mode):x}")
    if not address <= entry < segment.end:
        raise ValueError(f"entry 0x{entry:x} is outside the image at 0x{address:x}..0x{segment.end - 1:x}")
    check_segments(image, (segment,), memory)
    return Plan((segment,), Entry(mode, entry))


def load(image: ImageFile, memory: GuestMemory, options: BootOptions) -> Entry:
    """Write the file into the guest and return how to start. Raises as `plan` does."""
    return plan(image, memory, options).carry_out(image, memory)

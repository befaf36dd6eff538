"""What a driver writes into guest memory, byte for byte: buffers, descriptors, the three areas of a queue.

Source: virtio 1.2 §2.7 (split), §2.8 (packed).
"""

from collections.abc import Sequence
from struct import Struct
from typing import NamedTuple

from kvmpy._shim import lib
from kvmpy.devices.virtqueue import QueueSetup
from kvmpy.machine.memory import GuestMemory

DESCRIPTOR_SIZE = 16
NEXT, WRITE, INDIRECT = lib.VRING_DESC_F_NEXT, lib.VRING_DESC_F_WRITE, lib.VRING_DESC_F_INDIRECT
AVAIL, USED = 1 << lib.VRING_PACKED_DESC_F_AVAIL, 1 << lib.VRING_PACKED_DESC_F_USED
WRAP = 1 << lib.VRING_PACKED_EVENT_F_WRAP_CTR

U16, SPLIT, PACKED, USED_ELEMENT, EVENT = Struct("<H"), Struct("<QIHH"), Struct("<QIHH"), Struct("<II"), Struct("<HH")


class Buffer(NamedTuple):
    """A piece of a chain: ``size`` bytes of guest memory, for the device to read or (``writable``) to write."""

    gpa: int
    size: int
    writable: bool = False


class Descriptor(NamedTuple):
    """The 16 bytes of a split descriptor (struct virtq_desc), which an indirect table is made of too."""

    addr: int
    len: int
    flags: int = 0
    next: int = 0


class PackedDescriptor(NamedTuple):
    """The 16 bytes of a packed descriptor (struct pvirtq_desc)."""

    addr: int
    len: int
    id: int = 0
    flags: int = 0


class Used(NamedTuple):
    """What the device returned: the head (packed: the buffer id), and how many bytes it says it has written."""

    head: int
    written: int


class EventSuppression(NamedTuple):
    """The packed ring's event suppression structure (struct pvirtq_event_suppress)."""

    off_wrap: int
    flags: int


def is_packed(features: int) -> bool:
    """Tell whether these features make the rings packed."""
    return bool(features >> lib.VIRTIO_F_RING_PACKED & 1)


def place(index: int, size: int, gpa: int, features: int) -> QueueSetup:
    """Return a queue whose three areas lie one behind the other from ``gpa``, a multiple of 16, on."""
    if is_packed(features):
        driver = gpa + DESCRIPTOR_SIZE * size
        return QueueSetup(index, size, gpa, driver, driver + EVENT.size, features)
    driver = gpa + DESCRIPTOR_SIZE * size
    device = driver + 6 + 2 * size
    return QueueSetup(index, size, gpa, driver, device + -device % lib.VRING_USED_ALIGN_SIZE, features)


def ring_areas(setup: QueueSetup) -> list[tuple[int, int]]:
    """Return (gpa, bytes) of the descriptor, the driver and the device area."""
    lengths = (EVENT.size, EVENT.size) if is_packed(setup.features) else (6 + 2 * setup.size, 6 + 8 * setup.size)
    areas = (setup.descriptor_area, setup.driver_area, setup.device_area)
    return list(zip(areas, (DESCRIPTOR_SIZE * setup.size, *lengths), strict=True))


def write_table(memory: GuestMemory, gpa: int, buffers: Sequence[Buffer], *, chained: bool) -> int:
    """Write an indirect table at ``gpa`` and return its bytes. Only a split one is ``chained`` by NEXT (§2.8.8)."""
    table = b"".join(
        SPLIT.pack(b.gpa, b.size, (WRITE if b.writable else 0) | (NEXT if chained and i < len(buffers) else 0), i)
        if chained
        else PACKED.pack(b.gpa, b.size, 0, WRITE if b.writable else 0)
        for i, b in enumerate(buffers, 1)
    )
    memory.write(gpa, table)
    return len(table)

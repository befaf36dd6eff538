"""What a virtio device is to its transport: an identity, a configuration space, and queues that it can open.

The transport (`kvmpy.devices.virtio_mmio`) knows registers, feature negotiation and the life of queues; the device
knows what its features mean and what is in its queues. Types, and what all devices need.

Source: virtio 1.2 §2.
"""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple, Protocol

from kvmpy._shim import lib

if TYPE_CHECKING:
    from kvmpy.devices.block import BlockQueue
    from kvmpy.devices.interrupt import Interrupt
    from kvmpy.devices.virtqueue import QueueSetup, Segment
    from kvmpy.machine.memory import GuestMemory


class Identity(NamedTuple):
    """What a device says of itself, for all its life."""

    device_id: int
    """``lib.VIRTIO_ID_*``."""
    features: int
    """What it offers, as 64 bits."""
    queues: int
    """How many virtqueues it has, from 1 on."""


class ConfigSpace(Protocol):
    """The device-specific configuration (virtio 1.2 §2.5); any thread."""

    @property
    def generation(self) -> int:
        """Counts the changes: when it has not changed between two reads, nothing else has."""

    def read(self, offset: int, size: int) -> bytes:
        """Return ``size`` bytes of one state of the space; behind its end are zeros."""

    def write(self, offset: int, data: bytes) -> None:
        """Change a field where the driver may. Nothing a guest writes may raise."""


class VirtioDevice(Protocol):
    """A device behind a transport, which calls `negotiate` and `open_queue` from one thread at a time."""

    on_config_change: Callable[[], None]
    """Set by the transport; the device calls it after it has changed its configuration, from any thread."""

    @property
    def identity(self) -> Identity: ...

    @property
    def config(self) -> ConfigSpace: ...

    def negotiate(self, features: int) -> None:
        """Take what the driver has accepted, a subset of the features offered; or 0, the device was reset."""

    def open_queue(self, setup: "QueueSetup", interrupt: "Interrupt", kick_fd: int) -> "BlockQueue":
        """Return the queue whose rings ``setup`` describes, checked; the transport has it served and closes it."""


def feature_bits(*features: int) -> int:
    """Return 64 feature bits from their numbers."""
    return sum(1 << feature for feature in features)


RING_FEATURES = feature_bits(
    lib.VIRTIO_F_VERSION_1,
    lib.VIRTIO_F_RING_PACKED,
    lib.VIRTIO_F_RING_RESET,
    lib.VIRTIO_RING_F_INDIRECT_DESC,
    lib.VIRTIO_RING_F_EVENT_IDX,
)
"""What the transport and the queues can do, and so every device of ours offers."""


def scatter(memory: "GuestMemory", segments: "Iterable[Segment]", data: bytes) -> int:
    """Write ``data`` into ``segments``, one after the other, as far as they go; return how many bytes they took."""
    done = 0
    for gpa, size in segments:
        piece = data[done : done + size]
        if piece:
            memory.write(gpa, piece)
        done += len(piece)
    return done

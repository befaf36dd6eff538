"""What surrounds a hostile driver: features, disk, queues. Says, never makes."""

from typing import NamedTuple

from kvmpy._shim import lib
from kvmpy.conformance.image import CHUNK, State
from kvmpy.devices.block import BlockSettings
from kvmpy.devices.queue_worker import InlineWorker, MakeWorker
from kvmpy.devices.virtio_device import feature_bits

INDIRECT_DESC = feature_bits(lib.VIRTIO_RING_F_INDIRECT_DESC)
EVENT_IDX = feature_bits(lib.VIRTIO_RING_F_EVENT_IDX)
RING_PACKED = feature_bits(lib.VIRTIO_F_RING_PACKED)
DISCARD, WRITE_ZEROES = feature_bits(lib.VIRTIO_BLK_F_DISCARD), feature_bits(lib.VIRTIO_BLK_F_WRITE_ZEROES)
FLUSH = feature_bits(lib.VIRTIO_BLK_F_FLUSH)

CHUNKS = (*[State.OWN] * 4, State.SHARED, State.ZERO, State.SHARED, State.OWN)
HIDDEN = 6
"""The chunk that the table hides: whoever reads there asks the image, which may do something meanwhile."""
SECTORS = CHUNK * len(CHUNKS)
SHARED_SECTOR, ZERO_SECTOR, HIDDEN_SECTOR = CHUNK * 4, CHUNK * 5, CHUNK * HIDDEN


class World(NamedTuple):
    """A disk of SECTORS sectors and its device; a friendly driver has just set DRIVER_OK."""

    without: int = EVENT_IDX
    """Features that are offered but not negotiated, beside RING_PACKED where the rings are split."""
    readonly: bool = False
    chunks: tuple[State, ...] = CHUNKS
    queues: int = 1
    size: int = 16
    """Descriptors of each queue."""
    settings: BlockSettings = BlockSettings(serial=b"conformance-disk")
    vast: bool = False
    """There is a region of VAST bytes more, of which only the addresses are used."""
    make_worker: MakeWorker = InlineWorker

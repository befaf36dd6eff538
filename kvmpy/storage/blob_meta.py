"""What a page blob knows about itself: its size, its moments, its map, its snapshots.

Not here: the file that holds it (`blob_meta_file`), and what becomes of it (`blob_writer`). Floor: storage.
"""

from typing import NamedTuple

from kvmpy.errors import BlobError
from kvmpy.storage.blob_layer import Layer
from kvmpy.storage.blob_map import PageMap
from kvmpy.storage.blob_time import format_moment, next_after, now
from kvmpy.units import TiB

PAGE_SIZE = 512
"""Bytes of a page."""
MAX_SIZE = 8 * TiB
"""Of a page blob (Azure: "The maximum size for a page blob is 8 TiB")."""
MAX_SEQUENCE_NUMBER = 2**63 - 1
MAX_SNAPSHOTS = 10_000
MAX_SNAPSHOT_RUNS = 4_000_000
"""Of the maps of all snapshots together."""
CONTENT_FORMATS = ("raw", "vhd")


class SavedSnapshot(NamedTuple):
    """A moment of the blob that is kept. ``id`` is when it was made, in ticks, and unique."""

    id: int
    size: int
    etag: int
    map: PageMap


class Meta(NamedTuple):
    """All that a page blob knows. Moments and ETags are ticks (`blob_time`). Changed by `_replace`, but for the map."""

    size: int
    content_format: str
    etag: int
    sequence_number: int
    created: int
    last_modified: int
    active: Layer
    map: PageMap
    snapshots: tuple[SavedSnapshot, ...] = ()

    def layers(self) -> list[Layer]:
        """Return every layer that the blob needs, once: the active one, those of the map, those of the snapshots."""
        return list(self.pages_needed())

    def touched(self) -> "Meta":
        """Return it with an ETag that it never had before."""
        return self._replace(etag=next_after(self.etag), last_modified=now())

    def pages_needed(self) -> dict[Layer, int]:
        """Return how many pages each of `layers` must have for what the maps say of it."""
        needed = {self.active: 0}
        for map_ in (self.map, *(snapshot.map for snapshot in self.snapshots)):
            for layer, end in map_.ends().items():
                needed[layer] = max(needed.get(layer, 0), end)
        return needed


def is_size(size: int) -> bool:
    """Tell whether a page blob may have ``size`` bytes."""
    return 0 < size <= MAX_SIZE and size % PAGE_SIZE == 0


def may_have_another_snapshot(meta: Meta) -> bool:
    """Tell whether another one leaves room enough in the file ``meta`` for all that the blob itself can become."""
    runs = len(meta.map) + sum(len(saved.map) for saved in meta.snapshots)
    return len(meta.snapshots) < MAX_SNAPSHOTS and runs < MAX_SNAPSHOT_RUNS


def find_snapshot(meta: Meta, snapshot_id: str, path: str) -> SavedSnapshot:
    """Return the snapshot. Raises BlobError where the blob at ``path`` has none of this id."""
    for saved in meta.snapshots:
        if format_moment(saved.id) == snapshot_id:
            return saved
    raise BlobError(f"has no snapshot {snapshot_id}", path=path)


def as_it_was(meta: Meta, snapshot_id: str, path: str) -> Meta:
    """Return the metadata that the blob had at the moment of a snapshot. Raises BlobError as `find_snapshot`."""
    saved = find_snapshot(meta, snapshot_id, path)
    earlier = tuple(other for other in meta.snapshots if other.id < saved.id)
    return meta._replace(size=saved.size, etag=saved.etag, last_modified=saved.id, map=saved.map, snapshots=earlier)

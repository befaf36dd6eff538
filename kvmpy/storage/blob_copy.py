"""Copying and deleting whole page blobs.

A thin copy shares the pages of its source, and nothing that happens to either is seen in the other::

    source          layer a (active)                    layer a (frozen)    layer b (active, empty)
                                          copy:             |  link
    target                                              layer a (frozen)    layer c (active, empty)

Both go on in a new layer; the frozen one has a name in both folders and goes with the last. The copy's map is the
source's, so a copy of a copy of a copy reads like a blob. The source changes only in that its next write to an old
page copies that page first; its ETag stays.

Where a file cannot have two names (another file system, EXDEV; too many, EMLINK; not allowed, EPERM), the bytes are
copied, those that are not zeros. Floor: storage.
"""

import errno
import os

from kvmpy.errors import BlobError
from kvmpy.storage import files
from kvmpy.storage.blob_aside import SUFFIX, Aside, check_contents, clear_aside, dismantle, rename_durably
from kvmpy.storage.blob_folder import load
from kvmpy.storage.blob_layer import Folder, Layer
from kvmpy.storage.blob_map import PageMap
from kvmpy.storage.blob_meta import Meta, as_it_was
from kvmpy.storage.blob_ranges import nonzero_spans, read_pages
from kvmpy.storage.blob_time import now
from kvmpy.storage.blob_writer import BlobWriter
from kvmpy.storage.lease import Lease, open_blob_folder
from kvmpy.storage.progress import Progress

_NO_SECOND_NAME = (errno.EXDEV, errno.EMLINK, errno.EPERM)
_ATTEMPTS = 100
"""How often to begin again while a writer removes layers."""


def copy(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    snapshot: str | None = None,
    progress: Progress | None = None,
) -> None:
    """Make the page blob ``target``, with the bytes that ``source``, or its ``snapshot``, has now; durable on return.

    Without ``snapshot`` the source's lease is needed; a snapshot may be copied while another process writes the blob.

    Raises:
        BlobError: the source is no sound blob, has no such snapshot, or the target exists.
        LeaseError: somebody writes the source.
        OSError: the host failed; there is no target.
    """
    source, target = os.fspath(source), os.fspath(target)
    folder = Folder(open_blob_folder(source), source)
    try:
        with Aside(target) as aside:
            if snapshot is not None:
                meta = _fill_from_snapshot(aside, folder, snapshot, progress)
            else:
                meta = _fill_from_blob(aside, folder, progress)
            aside.publish(meta).close()
            os.close(aside.folder.fd)
    finally:
        os.close(folder.fd)
    if progress is not None:
        progress(meta.size, meta.size)


def delete(path: str | os.PathLike[str]) -> None:
    """Delete a page blob, durably, with its snapshots; damaged ones too. Its copies stay as they are.

    It is renamed first, which is durable before the first file goes: a crash leaves all of it or none.

    Raises:
        BlobError: it is no page blob, or there are other files in its folder.
        LeaseError: somebody writes it.
    """
    path = os.fspath(path).rstrip("/")
    if os.path.islink(path):
        raise BlobError("is a symbolic link", path=path)
    folder = open_blob_folder(path)
    try:
        with Lease(folder, path):
            check_contents(folder, path)
            clear_aside(path)
            rename_durably(path, path + SUFFIX)
            dismantle(folder, path + SUFFIX)
    finally:
        os.close(folder)


# --- from where ---------------------------------------------------------------------------------------------------


def _fill_from_blob(aside: Aside, folder: Folder, progress: Progress | None) -> Meta:
    """Fill the aside with what the blob in ``folder`` is now."""
    with Lease(folder.fd, folder.path) as lease:
        state = load(folder)
        writer = BlobWriter(folder, lease, state.meta, state.generation)
        try:
            if os.fstat(folder.fd).st_dev == os.fstat(aside.folder.fd).st_dev:
                writer.freeze_all()
            return _fill(aside, folder, writer.meta, progress)
        finally:
            writer.close()


def _fill_from_snapshot(aside: Aside, folder: Folder, snapshot: str, progress: Progress | None) -> Meta:
    """Fill the aside with a snapshot. A writer may delete other snapshots meanwhile, or this one."""
    for _ in range(_ATTEMPTS):
        meta = as_it_was(load(folder).meta, snapshot, folder.path)
        try:
            return _fill(aside, folder, meta, progress)
        except FileNotFoundError:
            continue
    raise BlobError("changes faster than it can be copied", path=folder.path)


def _fill(aside: Aside, folder: Folder, meta: Meta, progress: Progress | None) -> Meta:
    """Fill the aside with layers that have the bytes of ``meta``, and return the copy's metadata."""
    layers = list(meta.map.ends())
    shared = meta.active not in layers and _link_all(layers, folder, aside.folder)
    active = aside.new_layer(meta.size)
    if shared:
        map_ = meta.map
    else:
        _copy_bytes(meta, active, progress)
        map_ = PageMap(meta.map.pages, [0], [active])
    moment = now()
    return Meta(meta.size, meta.content_format, moment, meta.sequence_number, moment, moment, active, map_)


# --- the bytes ----------------------------------------------------------------------------------------------------


def _link_all(layers: list[Layer], source: Folder, target: Folder) -> bool:
    """Give each layer a name in ``target`` too; False, and none has one, where the host cannot."""
    linked = []
    try:
        for layer in layers:
            files.link(layer.name, layer.name, old_folder=source.fd, new_folder=target.fd)
            linked.append(layer)
    except OSError as error:
        for layer in linked:
            files.unlink(layer.name, folder=target.fd)
        if error.errno not in _NO_SECOND_NAME:
            raise
        return False
    return True


def _copy_bytes(meta: Meta, target: Layer, progress: Progress | None) -> None:
    """Write what is not zeros into ``target``, durably."""
    for start, end in nonzero_spans(meta.map, 0, meta.size):
        files.pwrite_all(target.own_fd, read_pages(meta.map, start, end), start)
        if progress is not None:
            progress(end, meta.size)
    files.fdatasync(target.own_fd)

"""The folder of a page blob, as a reader sees it: its files by name, and one moment of what they say together.

::

    data.blob/
      meta                     what the blob was when generation 17 began         (blob_meta_file)
      journal-17               what has changed since                             (blob_journal)
      lock                     held by the writer                                 (lease)
      <32 hex digits>.layer    the pages; one of the layers is written            (blob_layer)

A reader takes no lock. Meanwhile a writer may begin generation 18 and remove what 17 alone needed, so a reader that
finds something missing or odd looks whether all is still as it read it, and reads again where it is not.

Not here: writing (`blob_writer`). Floor: storage.
"""

import errno
import os
from functools import partial
from typing import NamedTuple

from kvmpy.errors import BlobError, DiskError
from kvmpy.storage import blob_journal, blob_meta_file, files
from kvmpy.storage.blob_journal import MAX_JOURNAL, Change, Kind
from kvmpy.storage.blob_layer import Folder, Layer
from kvmpy.storage.blob_meta import PAGE_SIZE, Meta
from kvmpy.storage.blob_meta_file import MAX_META, META
from kvmpy.storage.blob_time import LAST

JOURNAL = "journal-"
_ATTEMPTS = 100
"""How often a reader reads again while writers go on."""


def journal_name(generation: int) -> str:
    """Return the name of the journal of a generation."""
    return f"{JOURNAL}{generation}"


class State(NamedTuple):
    """One moment of a blob. ``generation`` is that of its ``meta``; ``problems`` are its layers'."""

    meta: Meta
    generation: int
    problems: list[BlobError]


def load(folder: Folder) -> State:
    """Return what the blob is now, without problems.

    Raises:
        BlobError: it is damaged, or no page blob; names the file and the offset.
    """
    state = examine(folder)
    for problem in state.problems:
        raise problem
    return state


def examine(folder: Folder) -> State:
    """Return what the blob is now, and what is wrong with its layers. Raises BlobError where nothing can be said."""
    for _ in range(_ATTEMPTS):
        before = read_file(folder, META, MAX_META)
        try:
            state = _read(folder, before)
            if not state.problems or read_file(folder, META, MAX_META) == before:
                return state
        except BlobError:
            if read_file(folder, META, MAX_META) == before:
                raise
    raise BlobError("changes faster than it can be read", path=folder.path)


def _read(folder: Folder, data: bytes) -> State:
    """Return what ``meta``, which is ``data``, and its journal say."""
    meta, generation = blob_meta_file.decode(data, folder.path_of(META), partial(Layer, folder))
    name = journal_name(generation)
    path = folder.path_of(name)
    for offset, change in blob_journal.decode(read_file(folder, name, MAX_JOURNAL), generation, path):
        try:
            meta = apply_change(meta, change)
        except ValueError as error:
            raise BlobError(str(error), path=path, offset=offset) from None
    return State(meta, generation, layer_problems(meta))


def apply_change(meta: Meta, change: Change) -> Meta:
    """Return ``meta`` with ``change``; its map is changed in place. Raises ValueError where that makes no sense."""
    match change.kind:
        case Kind.CLAIM:
            if not 0 < change.b <= meta.map.pages - change.a:
                raise ValueError(f"pages {change.a}+{change.b} of {meta.map.pages}")
            meta.map.assign(change.a, change.a + change.b, meta.active)
            return meta
        case Kind.TOUCH:
            if not meta.etag < change.a <= LAST or change.b > LAST:
                raise ValueError("an ETag that does not ascend")
            return meta._replace(etag=change.a, last_modified=change.b)


def layer_problems(meta: Meta) -> list[BlobError]:
    """Return what is wrong with the layers: missing, no files, or shorter than the maps say."""
    problems = []
    for layer, pages in meta.pages_needed().items():
        try:
            size = layer.status().st_size
        except BlobError as error:
            problems.append(error)
            continue
        if size < pages * PAGE_SIZE:
            message = f"the layer ends here; its pages go on to 0x{pages * PAGE_SIZE:x}"
            problems.append(BlobError(message, path=layer.path, offset=size))
    return problems


def read_file(folder: Folder, name: str, most: int) -> bytes:
    """Return the whole file. Raises BlobError: missing, no regular file, longer than ``most``, unreadable."""
    path = folder.path_of(name)
    try:
        fd = files.open_regular(name, os.O_RDONLY | os.O_NOFOLLOW, folder=folder.fd)
    except DiskError as error:
        raise BlobError(error.message, path=path, offset=0) from None
    except OSError as error:
        message = "is missing" if error.errno in (errno.ENOENT, errno.ELOOP) else f"cannot be opened: {error.strerror}"
        raise BlobError(message, path=path, offset=0) from error
    try:
        size = os.fstat(fd).st_size
        if size > most:
            raise BlobError(f"longer than the {most} bytes that it may have", path=path, offset=most)
        return files.pread_all(fd, size, 0)
    except OSError as error:
        raise BlobError(f"cannot be read: {error.strerror}", path=path, offset=0) from error
    finally:
        os.close(fd)

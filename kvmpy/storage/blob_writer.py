"""The writer of a page blob: the only code that changes the folder of one that exists, and in which order.

Essay in `BlobWriter`. Not here: the pages themselves (`blob_claim` and the engines write them), making and removing
whole blobs (`blob_aside`, `blob_copy`). Floor: storage.
"""

import errno
import os
from functools import reduce

from kvmpy.storage import blob_meta_file, files
from kvmpy.storage.blob_folder import JOURNAL, apply_change, journal_name
from kvmpy.storage.blob_journal import Change, Journal, Kind
from kvmpy.storage.blob_layer import Folder, Layer, is_layer_name
from kvmpy.storage.blob_meta import Meta
from kvmpy.storage.blob_meta_file import META
from kvmpy.storage.blob_time import next_after, now
from kvmpy.storage.disk import SyncFailed
from kvmpy.storage.lease import Lease

NEW_META = "meta.new"


class BlobWriter:
    """What changes a blob, so that a crash between any two steps leaves what it was before or what it is after.

    There are two ways. A small change is a record in the journal::

        record()        journal-17:  [claim][touch]... <- [claim]     fdatasync: now the change has happened

    A record is one sector or less, so it is there or not. What it speaks of must be durable first: pages that it says
    are in the active layer were written there, and fdatasync'ed, by whoever asks for the record.

    Everything else is a new ``meta``, and with it a new generation::

        commit()        1  journal-18 is made, empty
                        2  meta.new is written                        fdatasync: its bytes are there
                        3                                             fsync of the folder: the names of journal-18,
                                                                      and of a new layer if there is one, are there
                        4  meta.new is renamed to meta                the one step that is the change
                        5                                             fsync of the folder: it has happened
                        6  journal-17, and layers that nobody needs any more, are unlinked

    Until 4 the blob is generation 17: what is new has names that the old ``meta`` does not know. Without 2, ``meta``
    could be an empty file after a power cut; without 3, it could name files that are not there. Without 5, the old
    ``meta`` could come back when 6 has removed its journal, or when somebody has relied on journal-18 already.

    A crash before 6 leaves files that no ``meta`` names. They are no damage; the next commit removes them. None is
    removed earlier: the names that we see, a dead writer's, may not be durable before our own step 5.

    The active layer is frozen by naming another one in the new ``meta``. Its bytes are made durable before, because a
    snapshot promises them as they were; the new layer is empty, and nothing relies on its size before a claim has
    made that durable.

    When a sync of step 5, of the journal or of pages has failed, the kernel has forgotten what it could not write, and
    nobody knows what the disk holds: from then on everything is refused (EIO), and opening the blob again finds the
    old state or the new one. A failure before 4 is harmless: the next attempt makes its files anew.
    """

    def __init__(
        self, folder: Folder, lease: Lease, meta: Meta, generation: int, journal: Journal | None = None
    ) -> None:
        self.folder = folder
        self.lease = lease
        self.meta = meta
        self._generation = generation
        self._journal = journal  # none until the first commit: one that somebody else wrote is not appended to
        self._frozen: list[Layer] = []
        self._broken = False

    @property
    def broken(self) -> bool:
        """A sync has failed: what is on the disk is not known."""
        return self._broken or (self._journal is not None and self._journal.broken)

    def check(self) -> None:
        """Raise LeaseError where the lease is lost, OSError (EIO) where a sync has failed."""
        self.lease.check()
        if self.broken:
            raise SyncFailed(errno.EIO, "an earlier write failed, open the page blob again", self.folder.path)

    def start(self) -> None:
        """Open the active layer and begin a generation, with another ETag.

        An active layer with a second name is somebody's copy of the folder, made of links: it is frozen.
        """
        active = self.meta.active
        active.open_for_writing(self.meta.size)
        has_other_names = os.fstat(active.own_fd).st_nlink > 1
        meta = self.meta
        if has_other_names:
            self.sync_pages()  # what a dead writer left there: no flush of ours will reach it
            meta = meta._replace(active=Layer.create(self.folder, meta.size))
        self.commit(meta.touched())

    def finish(self) -> None:
        """Make all that was written durable, and change the ETag: what engines wrote had not changed it."""
        self.check()
        self.sync_pages()
        self.commit(self.meta.touched())

    def freeze_all(self) -> None:
        """Have all that was written so far in layers that never change."""
        if self.meta.active in self.meta.map.ends():
            self.meta.active.open_for_writing(self.meta.size)
            self.commit(self.freeze())

    # --- small changes ---

    def sync_pages(self) -> None:
        """Make the bytes in the active layer durable."""
        self._broken, broken = True, self._broken
        files.fdatasync(self.meta.active.own_fd)
        self._broken = broken

    def touch(self) -> None:
        """Change the ETag, durably."""
        self.record([Change(Kind.TOUCH, next_after(self.meta.etag), now())])

    def record(self, changes: list[Change]) -> None:
        """Make ``changes`` durable and true, in the journal or, where that is full, by a new generation."""
        if self._journal is not None and self._journal.has_room(len(changes)):
            self._journal.append(changes)
            self.meta = reduce(apply_change, changes, self.meta)
        else:
            self.commit(reduce(apply_change, changes, self.meta._replace(map=self.meta.map.copy())))

    # --- a new generation ---

    def commit(self, meta: Meta) -> None:
        """Make the blob what ``meta`` says, durably.

        Raises:
            OSError, BlobError: it is what it was before, unless step 5 failed.
        """
        journal = self._prepare(meta)
        self._broken = True  # until it is known which one is the blob
        try:
            files.rename(NEW_META, META, old_folder=self.folder.fd, new_folder=self.folder.fd)
        except OSError:
            self._broken = False
            self._undo(journal, meta)
            raise
        files.fsync_folder(self.folder.fd)
        self._broken = False
        self._become(journal, meta)

    def _prepare(self, meta: Meta) -> Journal:
        """Take steps 1 to 3."""
        journal = None
        try:
            data = blob_meta_file.encode(meta, self._generation + 1)
            journal = new_journal(self.folder, self._generation + 1)
            write_file(self.folder, NEW_META, data)
            files.fsync_folder(self.folder.fd)
        except BaseException:
            self._undo(journal, meta)
            raise
        return journal

    def _undo(self, journal: Journal | None, meta: Meta) -> None:
        if journal is not None:
            journal.close()
        files.discard(journal_name(self._generation + 1), folder=self.folder.fd)
        files.discard(NEW_META, folder=self.folder.fd)
        if meta.active is not self.meta.active:
            meta.active.close()
            files.discard(meta.active.name, folder=self.folder.fd)

    def _become(self, journal: Journal, meta: Meta) -> None:
        """Be the next generation, and take step 6."""
        frozen = self.meta.active
        if self._journal is not None:
            self._journal.close()
        self._journal, self.meta, self._generation = journal, meta, self._generation + 1
        if frozen is not meta.active:
            frozen.freeze()
            self._frozen.append(frozen)
        self._sweep()

    def _sweep(self) -> None:
        """Remove what may be ours by its name, and is named by nothing."""
        named = {journal_name(self._generation), *(layer.name for layer in self.meta.layers())}
        for name in os.listdir(self.folder.fd):
            if is_removable(name) and name not in named:
                files.discard(name, folder=self.folder.fd)

    # --- layers ---

    def freeze(self) -> Meta:
        """Return the metadata, for `commit`, in which all that was written so far is in layers that never change."""
        active = self.meta.active
        if active not in self.meta.map.ends():
            return self.meta  # nothing was written since the last time
        self.sync_pages()
        return self.meta._replace(active=Layer.create(self.folder, self.meta.size))

    def close(self) -> None:
        """Close the journal and the layers that were written, and give up the lease. Nothing is made durable."""
        if self._journal is not None:
            self._journal.close()
        for layer in (*self._frozen, self.meta.active):
            layer.close()
        self.lease.close()


# --- what making a blob and changing one have in common -----------------------------------------------------------


def is_removable(name: str) -> bool:
    """Tell whether ``name`` is that of a file which a ``meta`` must name to be worth something."""
    is_journal = name.startswith(JOURNAL) and name.removeprefix(JOURNAL).isdecimal()
    return name == NEW_META or is_journal or is_layer_name(name)


def new_journal(folder: Folder, generation: int) -> Journal:
    """Make the empty journal of ``generation``, in the place of what a crash has left there."""
    name = journal_name(generation)
    files.discard(name, folder=folder.fd)
    return Journal(files.create(name, folder=folder.fd), generation)


def write_file(folder: Folder, name: str, data: bytes) -> None:
    """Write a file whose bytes, but not whose name, are durable on return, in the place of one a crash has left."""
    files.discard(name, folder=folder.fd)
    fd = files.create(name, folder=folder.fd)
    try:
        files.pwrite_all(fd, data, 0)
        files.fdatasync(fd)
    finally:
        os.close(fd)

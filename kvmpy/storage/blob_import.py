"""A new page blob filled with the bytes of another disk, and only then given its name.

Not here: where the bytes come from (`extents`), and how a folder gets its name (`blob_aside`). Floor: storage.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from kvmpy.storage import files
from kvmpy.storage.blob_aside import Aside
from kvmpy.storage.blob_map import PageMap
from kvmpy.storage.blob_meta import PAGE_SIZE, Meta
from kvmpy.storage.blob_time import now
from kvmpy.storage.new_disks import RawWriter


@contextmanager
def new_blob(path: str, size: int) -> Iterator[RawWriter]:
    """Give what writes the bytes of a new blob, which is at ``path`` afterwards: whole and durable, or not at all.

    Raises:
        BlobError: something is there already.
        LeaseError: another process is making a blob there.
        OSError: the host refused; nothing is left behind.
    """
    with Aside(path) as aside:
        layer = aside.new_layer(size)
        yield RawWriter(layer.own_fd, size)
        files.fdatasync(layer.own_fd)
        moment = now()
        whole = PageMap(size // PAGE_SIZE, [0], [layer])
        aside.publish(Meta(size, "raw", moment, 0, moment, moment, layer, whole)).close()
        os.close(aside.folder.fd)

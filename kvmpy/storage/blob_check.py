"""Check a page blob without changing it: everything that opening it would refuse, all at once.

Files that a crash has left are no problem: nothing names them, and the next writer removes them. Floor: storage.
"""

import os

from kvmpy.errors import BlobError
from kvmpy.storage.blob_folder import examine
from kvmpy.storage.blob_layer import Folder
from kvmpy.storage.lease import lease_state, open_blob_folder


def check(path: str | os.PathLike[str]) -> list[str]:
    """Return what is wrong with the blob at ``path``, each with file and offset; nothing when it is sound."""
    path = os.fspath(path)
    try:
        folder = Folder(open_blob_folder(path), path)
    except BlobError as error:
        return [str(error)]
    try:
        return [*_lock_problems(path), *_problems(folder)]
    finally:
        os.close(folder.fd)


def _problems(folder: Folder) -> list[str]:
    try:
        return [str(problem) for problem in examine(folder).problems]
    except BlobError as error:
        return [str(error)]


def _lock_problems(path: str) -> list[str]:
    try:
        lease_state(path)
    except BlobError as error:
        return [str(error)]
    return []

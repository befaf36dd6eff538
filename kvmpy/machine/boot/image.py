"""A boot image on the host: a regular file, or one in memory, that is read in checked pieces.

Whatever a header in it claims, nothing is read past its end and nothing without one is read at all: a FIFO, a
directory or ``/dev/zero`` is refused before a byte of it is taken. Not here: what the bytes mean.
"""

import os
import stat
from struct import Struct
from typing import Any, Self

from kvmpy.errors import ImageError

_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
)


class ImageFile:
    """A regular file, open for reading; ``size`` is its length in bytes when it was opened, never 0.

    ``packed_with`` names the packing of a file that `in_memory` holds unpacked.

    Raises:
        ImageError: it cannot be opened, is no regular file, or is empty.
    """

    packed_with: str | None = None

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._fd = _open_regular(self.path)
        self.size = os.fstat(self._fd).st_size
        if not self.size:
            self.close()
            raise self.error("the file is empty", 0)

    @classmethod
    def in_memory(cls, fd: int, path: str, *, packed_with: str) -> Self:
        """Return the memfd ``fd``, which becomes this object's, as an image; errors call it ``path``."""
        image = cls.__new__(cls)
        image.path, image._fd, image.size = path, fd, os.fstat(fd).st_size
        image.packed_with = packed_with
        return image

    def error(self, message: str, at: int) -> ImageError:
        """Return (not raise) an error that blames the bytes of this file at offset ``at``."""
        return ImageError(message, path=self.path, offset=at)

    def read(self, offset: int, size: int) -> bytes:
        """Return exactly ``size`` bytes from ``offset``. Raises ImageError when the file does not have them."""
        self.check_range(offset, size, at=offset)
        data = bytearray(size)
        self.read_into(memoryview(data), offset)
        return bytes(data)

    def head(self, size: int) -> bytes:
        """Return the first ``size`` bytes, or the whole file when it is shorter."""
        return self.read(0, min(size, self.size))

    def unpack(self, layout: Struct, offset: int) -> tuple[Any, ...]:
        """Return the fields of ``layout`` at ``offset``. Raises ImageError."""
        return layout.unpack(self.read(offset, layout.size))

    def check_range(self, offset: int, size: int, *, at: int) -> None:
        """Refuse a range that leaves the file; ``at`` is the offset of what claims it. Raises ImageError."""
        if offset < 0 or size < 0 or offset + size > self.size:
            wanted = f"{size} bytes at offset 0x{offset:x}" if offset >= 0 else f"bytes 0x{-offset:x} before its start"
            raise self.error(f"truncated: {wanted} wanted, the file has {self.size} bytes", at)

    def read_into(self, target: memoryview, offset: int) -> None:
        """Fill ``target``, which may be guest memory, from ``offset``. Raises ImageError when the file ends first."""
        done = 0
        while done < len(target):
            try:
                got = os.preadv(self._fd, [target[done:]], offset + done)
            except OSError as error:
                raise self.error(f"cannot be read: {error.strerror}", offset + done) from error
            if not got:
                raise self.error("truncated: the file ends here", offset + done)
            done += got

    def fileno(self) -> int:
        """Return the file's descriptor, which stays this object's."""
        return self._fd

    def close(self) -> None:
        """Close the file. Closing twice is harmless."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _open_regular(path: str) -> int:
    """Open ``path`` and return its descriptor; never waits, and never opens a device."""
    try:
        # Looked at before it is opened: opening alone starts some devices (a watchdog, a tape).
        mode = os.stat(path).st_mode
        if stat.S_ISREG(mode):
            # Should it become a FIFO in between, O_NONBLOCK keeps open() from waiting for a writer.
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            mode = os.fstat(fd).st_mode
            if stat.S_ISREG(mode):
                return fd
            os.close(fd)
    except OSError as error:
        raise ImageError(error.strerror or str(error), path=path) from error
    kind = next((name for is_kind, name in _KINDS if is_kind(mode)), "no regular file")
    raise ImageError(f"is {kind}: a regular file is wanted", path=path)

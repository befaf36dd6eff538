"""What may be a boot image at all: a regular file, and never more of it than is asked for."""

import os
import socket
from pathlib import Path

import pytest

from kvmpy import ImageError
from kvmpy.machine.boot import boot
from kvmpy.machine.boot.image import ImageFile
from kvmpy.machine.boot.inspection import inspect


def special(tmp_path: Path, kind: str) -> str:
    """Return the path of something that is no image."""
    path = tmp_path / "thing"
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind(str(path))
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "empty":
        path.touch()
    elif kind == "/dev/zero":
        return kind
    return str(path)


KINDS = ["missing", "FIFO", "directory", "socket", "loop", "empty", "/dev/zero"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_with_contents_is_refused_at_once(tmp_path, memory, kind):
    """Case 66: FIFO, directory, /dev/zero as an image: never waited for, never read to the end."""
    path = special(tmp_path, kind)
    for use in (ImageFile, inspect, lambda path: boot(path, memory)):
        with pytest.raises(ImageError) as caught:
            use(path)
        assert caught.value.path == path
        assert "\n" not in str(caught.value)


def test_a_fifo_with_a_writer_is_not_read(tmp_path):
    """Case 66: whoever waits behind a FIFO keeps its bytes."""
    path = special(tmp_path, "FIFO")
    end = os.open(path, os.O_RDWR)
    os.write(end, b"data")
    with pytest.raises(ImageError, match="is a FIFO"):
        ImageFile(path)
    assert os.read(end, 4) == b"data"
    os.close(end)


@pytest.mark.parametrize(("offset", "size"), [(0, 11), (10, 1), (9, 2), (2**63, 1), (0, 2**63), (-1, 1)])
def test_a_read_past_the_end_is_refused_before_memory_is_taken(write, offset, size):
    """A short read is never handed out: the error names the offset and the file's size."""
    with ImageFile(write(b"0123456789")) as image:
        with pytest.raises(ImageError, match="truncated") as caught:
            image.read(offset, size)
        assert caught.value.offset == offset


def test_a_file_that_shrinks_after_it_was_opened_is_refused(write):
    """The size is taken once; a later end of file is an error, not zeros."""
    path = write(bytes(100))
    with ImageFile(path) as image:
        os.truncate(path, 50)
        with pytest.raises(ImageError) as caught:
            image.read(0, 100)
        assert caught.value.offset == 50


def test_closing_twice_is_harmless_and_leaks_nothing(write):
    """design.md: close() is idempotent."""
    before = len(os.listdir("/proc/self/fd"))
    image = ImageFile(write(b"x"))
    image.close()
    image.close()
    with pytest.raises(ImageError):
        ImageFile(write(b"", "empty"))
    assert len(os.listdir("/proc/self/fd")) == before


def test_reading_stops_at_what_is_asked(write):
    """`head` gives less only when the file is shorter."""
    with ImageFile(write(b"0123456789")) as image:
        assert image.read(3, 4) == b"3456"
        assert image.head(4) == b"0123"
        assert image.head(100) == b"0123456789"
        assert image.read(10, 0) == b""

"""Write an initramfs: the `newc` form of cpio, which needs no tool and no right to make device nodes.

The same entries give the same bytes: no time, no owner and no inode number of this machine goes in.

Source: the kernel's Documentation/driver-api/early-userspace/buffer-format.rst.
"""

import stat
from collections.abc import Iterable
from typing import NamedTuple

MAGIC = b"070701"
ALIGNMENT = 4
TRAILER = "TRAILER!!!"


class Entry(NamedTuple):
    """A file, folder, link or device. ``data`` is what a file holds, or where a link points."""

    name: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def folder(name: str) -> Entry:
    return Entry(name, stat.S_IFDIR | 0o755)


def program(name: str, data: bytes) -> Entry:
    return Entry(name, stat.S_IFREG | 0o755, data)


def link(name: str, target: str) -> Entry:
    return Entry(name, stat.S_IFLNK | 0o777, target.encode())


def character_device(name: str, major: int, minor: int) -> Entry:
    return Entry(name, stat.S_IFCHR | 0o600, device=(major, minor))


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % ALIGNMENT)


def encode(number: int, entry: Entry) -> bytes:
    """Return one entry: its header of eight-digit fields, its name, what it holds; each ends at a multiple of four."""
    name = entry.name.encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    fields = (number, entry.mode, 0, 0, links, 0, len(entry.data), 0, 0, *entry.device, len(name), 0)
    header = MAGIC + b"".join(b"%08X" % field for field in fields)
    return padded(header + name) + padded(entry.data)


def archive(entries: Iterable[Entry]) -> bytes:
    """Return the archive of ``entries``; a folder must come before what lies in it."""
    numbered = enumerate([*entries, Entry(TRAILER, 0)], 1)
    return b"".join(encode(number, entry) for number, entry in numbered)

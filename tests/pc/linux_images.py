"""Images that say of themselves that they are Linux, made of lessons: nothing in them runs for long."""

from pathlib import Path

from kvmpy.lessons import find

KERNEL_VERSION = 0x20E
"""Of the setup header: where the version stands, less 0x200 (Linux Documentation/arch/x86/boot.rst)."""
VERSION_AT = 0x380


def plain_bzimage() -> bytes:
    """Return a bzImage of another kernel."""
    return Path(find("bzimage_hello").image).read_bytes()


def linux_bzimage() -> bytes:
    """Return a bzImage whose header says Linux 6.1."""
    image = bytearray(plain_bzimage())
    version = b"6.1.0-test (who@where) #1\0"
    assert not any(image[VERSION_AT : VERSION_AT + len(version)])
    image[VERSION_AT : VERSION_AT + len(version)] = version
    image[KERNEL_VERSION : KERNEL_VERSION + 2] = (VERSION_AT - 0x200).to_bytes(2, "little")
    return bytes(image)

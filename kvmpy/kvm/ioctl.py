"""The one place where an ioctl is issued, and the one that turns its errno into an exception."""

from typing import Any

from kvmpy._shim import ffi, lib
from kvmpy.errors import KvmError


def ioctl(fd: int, name: str, argument: Any = ffi.NULL, detail: str = "") -> int:
    """Issue the ioctl that is called ``name`` in <linux/kvm.h> with a pointer; return its result.

    Raises:
        KvmError: the kernel refused; ``detail`` says on what.
    """
    result = int(lib.kvmpy_ioctl(fd, getattr(lib, name), argument))
    return result if result >= 0 else refuse(-result, name, detail)


def ioctl_value(fd: int, name: str, argument: int = 0, detail: str = "") -> int:
    """Issue the ioctl called ``name``, whose argument is a number; return its result. Raises KvmError."""
    result = int(lib.kvmpy_ioctl_value(fd, getattr(lib, name), argument))
    return result if result >= 0 else refuse(-result, name, detail)


def refuse(errno: int, name: str, detail: str) -> int:
    """Raise the KvmError of ``errno``."""
    raise KvmError(errno, name, detail)

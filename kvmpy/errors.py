"""Every error kvmpy raises, sorted by whom to blame: the host, the guest, the file.

The caller's own mistakes are ``ValueError`` and ``TypeError``. A message says what, where (in hex), and what is
allowed, in one line: the command line prints it as it is. Free for every floor.
"""

import os


class KvmpyError(Exception):
    """Anything that kvmpy itself reports."""


# --- the host ---------------------------------------------------------------------------------------------------


class KvmError(KvmpyError, OSError):
    """The host kernel refused an ioctl: ``KVM_CREATE_VCPU: EEXIST (vcpu_id=0)``."""

    def __init__(self, errno: int, ioctl: str, detail: str = "") -> None:
        OSError.__init__(self, errno, os.strerror(errno))
        self.ioctl = ioctl
        self.detail = detail

    def __str__(self) -> str:
        import errno as names

        name = names.errorcode.get(self.errno or 0, str(self.errno))
        return f"{self.ioctl}: {name}" + (f" ({self.detail})" if self.detail else "")


class KvmUnavailable(KvmError):
    """There is no usable ``/dev/kvm``: missing, forbidden, or another API version. Says which, and the fix."""


class CapabilityMissing(KvmError):
    """The host's KVM lacks a capability that was asked for."""


# --- the guest --------------------------------------------------------------------------------------------------


class GuestError(KvmpyError):
    """The guest did what it may not. ``vcpu_id`` and ``rip`` are set where they are known."""

    def __init__(self, message: str, *, vcpu_id: int | None = None, rip: int | None = None) -> None:
        super().__init__(message)
        self.vcpu_id = vcpu_id
        self.rip = rip


class GuestMemoryError(GuestError):
    """A guest physical range is not RAM: ``gpa 0x100000000+512 is outside 64 MiB``."""

    def __init__(self, gpa: int, size: int, allowed: str) -> None:
        super().__init__(f"gpa 0x{gpa:x}+{size} is outside {allowed}")
        self.gpa = gpa
        self.size = size


class UnhandledExit(GuestError):
    """A VM exit that nobody on this board handles."""


class VirtqueueError(GuestError):
    """A driver broke a virtqueue: ``queue 0: the chain is longer than the queue (virtio 1.2 §2.7.5.2)``."""


# --- the file ---------------------------------------------------------------------------------------------------


class ImageError(KvmpyError):
    """A kernel image is not what it claims. ``path`` and ``offset`` (bytes into the file) say where."""

    def __init__(self, message: str, *, path: str = "", offset: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.path = path
        self.offset = offset

    def __str__(self) -> str:
        return located(self.message, self.path, self.offset)


class DiskError(KvmpyError):
    """A disk's file is not what it claims, or cannot do what was asked. ``path`` and ``offset`` as in ImageError."""

    def __init__(self, message: str, *, path: str = "", offset: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.path = path
        self.offset = offset

    def __str__(self) -> str:
        return located(self.message, self.path, self.offset)


class VhdFormatError(DiskError):
    """A file is no VHD, or a damaged one."""


class BlobError(DiskError):
    """A page blob is damaged, missing, or asked for what a page blob cannot do."""


class LeaseError(DiskError):
    """Somebody else holds the right to write this disk; the message says who."""


def located(message: str, path: str, offset: int | None) -> str:
    """Return ``message`` with the file before it and the offset, in hex, behind."""
    where = f"{path}: " if path else ""
    at = f" (at offset 0x{offset:x})" if offset is not None else ""
    return f"{where}{message}{at}"

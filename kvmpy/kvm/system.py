"""The system file descriptor: ``/dev/kvm`` itself.

Source: KVM API §4.1 to §4.6.
"""

import errno
import os
from typing import Any, Self

from kvmpy._shim import ffi, lib
from kvmpy.errors import KvmUnavailable
from kvmpy.kvm.cpuid_entry import CpuidEntry
from kvmpy.kvm.ioctl import ioctl, ioctl_value
from kvmpy.kvm.vm import Vm

DEVICE = "/dev/kvm"
MAX_CPUID_ENTRIES = 256

_FIXES = {
    errno.ENOENT: "load the kernel module kvm_intel or kvm_amd, and enable virtualization in the firmware",
    errno.EACCES: "join its group (sudo usermod -aG kvm $USER, log in again); kvmpy doctor looks closer",
    errno.ENODEV: "the module is loaded but the processor or firmware offers no virtualization",
}


class Kvm:
    """An open ``/dev/kvm``. Close it, or use it as a context manager; VMs keep it alive.

    Raises:
        KvmUnavailable: it is missing, forbidden, or speaks another API version; the message says the fix.
    """

    def __init__(self, path: str | None = None) -> None:
        path = DEVICE if path is None else path
        self.path = path
        self.fd = -1
        try:
            self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            version = self.get_api_version()
        except OSError as error:
            self.close()
            fix = _FIXES.get(error.errno or 0, "this is not a KVM device")
            raise KvmUnavailable(error.errno or 0, f"open {path}", fix) from error
        if version != lib.KVM_API_VERSION:
            self.close()
            raise KvmUnavailable(errno.EPROTO, "KVM_GET_API_VERSION", f"{version}, kvmpy needs 12")
        lib.kvmpy_install_kick_handler()

    def get_api_version(self) -> int:
        """Return the API version: 12 on every kernel since 2.6.22."""
        return ioctl_value(self.fd, "KVM_GET_API_VERSION")

    def check_extension(self, capability: int) -> int:
        """Return what KVM says of ``lib.KVM_CAP_*``: 0 is absent, more is present or a figure."""
        return ioctl_value(self.fd, "KVM_CHECK_EXTENSION", capability)

    def get_vcpu_mmap_size(self) -> int:
        """Return the size in bytes of the area that each vCPU shares with user space."""
        return ioctl_value(self.fd, "KVM_GET_VCPU_MMAP_SIZE")

    def create_vm(self, machine_type: int = 0) -> Vm:
        """Create a VM without vCPUs or memory. Raises KvmError."""
        return Vm(self, ioctl_value(self.fd, "KVM_CREATE_VM", machine_type))

    def get_supported_cpuid(self) -> list[CpuidEntry]:
        """Return the CPUID leaves that this host can give a guest."""
        table = ffi.new("struct kvm_cpuid2 *", [MAX_CPUID_ENTRIES, MAX_CPUID_ENTRIES])
        ioctl(self.fd, "KVM_GET_SUPPORTED_CPUID", table)
        return cpuid_entries(table)

    def get_msr_index_list(self) -> list[int]:
        """Return the indices of the MSRs that make up a vCPU's state on this host."""
        count = ffi.new("struct kvm_msr_list *", [0])
        lib.kvmpy_ioctl(self.fd, lib.KVM_GET_MSR_INDEX_LIST, count)  # E2BIG is the answer: nmsrs is now right
        found = ffi.new("struct kvm_msr_list *", [count.nmsrs, count.nmsrs])
        found.nmsrs = count.nmsrs
        ioctl(self.fd, "KVM_GET_MSR_INDEX_LIST", found)
        return [found.indices[i] for i in range(found.nmsrs)]

    def close(self) -> None:
        """Close the descriptor; closing twice is harmless."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def cpuid_entries(table: Any) -> list[CpuidEntry]:
    """Copy a ``struct kvm_cpuid2`` out into Python."""
    entries = (table.entries[i] for i in range(table.nent))
    return [CpuidEntry(e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx) for e in entries]

"""KVM's binary statistics: one reader for VM and vCPU.

Source: KVM API §4.133, KVM_GET_STATS_FD.
"""

import os
from typing import Any

from kvmpy._shim import ffi
from kvmpy.kvm.ioctl import ioctl_value


def read_stats(fd: int) -> dict[str, int]:
    """Return the statistics of the VM or vCPU ``fd`` by name; histograms are left out.

    Raises:
        KvmError: the host has no KVM_CAP_BINARY_STATS_FD.
    """
    stats_fd = ioctl_value(fd, "KVM_GET_STATS_FD")
    try:
        header = _struct("struct kvm_stats_header", os.pread(stats_fd, ffi.sizeof("struct kvm_stats_header"), 0))
        found = {}
        step = ffi.sizeof("struct kvm_stats_desc") + header.name_size
        descriptors = os.pread(stats_fd, step * header.num_desc, header.desc_offset)
        for at in range(0, len(descriptors), step):
            fixed = ffi.sizeof("struct kvm_stats_desc")
            descriptor = _struct("struct kvm_stats_desc", descriptors[at : at + fixed])
            if descriptor.size == 1:
                name = descriptors[at + fixed : at + step].split(b"\0")[0].decode()
                value = os.pread(stats_fd, 8, header.data_offset + descriptor.offset)
                found[name] = int.from_bytes(value, "little")
        return found
    finally:
        os.close(stats_fd)


def _struct(kind: str, data: bytes) -> Any:
    made = ffi.new(f"{kind} *")
    ffi.memmove(made, data, min(len(data), ffi.sizeof(kind)))
    return made

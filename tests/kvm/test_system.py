"""``/dev/kvm`` itself, and the errors: what refused, why, and what to do."""

import errno
import os
import re
import resource
from pathlib import Path

import pytest

from kvmpy import Kvm, KvmError, KvmpyError, KvmUnavailable
from kvmpy._shim import lib


@pytest.mark.kvm
def test_api_version_is_12(kvm):
    """KVM API §4.1: 12, on every kernel since 2.6.22."""
    assert kvm.get_api_version() == 12


@pytest.mark.kvm
def test_capabilities_are_figures(kvm):
    """KVM API §4.4. A number that no kernel has ever given away is absent."""
    assert kvm.check_extension(lib.KVM_CAP_USER_MEMORY) == 1
    assert kvm.check_extension(lib.KVM_CAP_MAX_VCPUS) >= 1
    assert kvm.check_extension(1 << 20) == 0


@pytest.mark.kvm
def test_capability_can_be_enabled_for_a_vm(vm):
    if not vm.check_extension(lib.KVM_CAP_EXIT_ON_EMULATION_FAILURE):
        pytest.skip("this host has no KVM_CAP_EXIT_ON_EMULATION_FAILURE")
    vm.enable_cap(lib.KVM_CAP_EXIT_ON_EMULATION_FAILURE, 1)
    with pytest.raises(KvmError, match=r"^KVM_ENABLE_CAP: EINVAL \(cap=1048576\)$"):
        vm.enable_cap(1 << 20)


@pytest.mark.kvm
def test_supported_cpuid_begins_with_the_vendor(kvm):
    entries = kvm.get_supported_cpuid()
    assert entries[0].function == 0
    assert {0, 1, 0x8000_0000} <= {entry.function for entry in entries}


@pytest.mark.kvm
def test_kvm_error_says_which_ioctl_why_and_on_what(vm):
    """As in ``KVM_CREATE_VCPU: EEXIST (vcpu_id=0)``."""
    vm.create_vcpu(0)
    with pytest.raises(KvmError) as caught:
        vm.create_vcpu(0)
    error = caught.value
    assert str(error) == "KVM_CREATE_VCPU: EEXIST (vcpu_id=0)"
    assert (error.ioctl, error.errno, error.detail) == ("KVM_CREATE_VCPU", errno.EEXIST, "vcpu_id=0")
    assert isinstance(error, KvmpyError)
    assert isinstance(error, OSError)


def test_kvm_error_without_detail_or_name():
    assert str(KvmError(errno.ENXIO, "KVM_RUN")) == "KVM_RUN: ENXIO"
    assert str(KvmError(9999, "KVM_RUN", "x")) == "KVM_RUN: 9999 (x)"


def test_missing_device_names_the_fix():
    with pytest.raises(KvmUnavailable) as caught:
        Kvm("/nonexistent/kvm")
    assert str(caught.value).startswith("open /nonexistent/kvm: ENOENT (load the kernel module")
    assert caught.value.errno == errno.ENOENT


def test_forbidden_device_names_the_group(tmp_path: Path):
    """Nobody may open a file of mode 0, but for the superuser: a child process without rights asks."""
    path = tmp_path / "kvm"
    path.touch(mode=0)
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(folder.stat().st_mode | 0o111)
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if os.geteuid() == 0:
                os.setuid(65534)
            Kvm(str(path))
        except BaseException as error:
            os.write(writable, f"{type(error).__name__} {error}".encode())
        finally:
            os._exit(0)
    os.close(writable)
    os.waitpid(child, 0)
    with open(readable, "rb") as pipe:
        said = pipe.read().decode()
    assert re.match(r"KvmUnavailable open \S+: EACCES \(.*usermod -aG kvm", said)


@pytest.mark.parametrize("what", ["file", "folder", "/dev/null", "fifo"])
def test_file_that_is_no_kvm_is_refused(tmp_path: Path, what: str):
    path = tmp_path / "kvm"
    if what == "file":
        path.write_bytes(b"no device")
    elif what == "folder":
        path.mkdir()
    elif what == "fifo":
        os.mkfifo(path)
    before = sorted(os.listdir("/proc/self/fd"))
    with pytest.raises(KvmUnavailable, match=r"not a KVM device"):
        Kvm(what if what.startswith("/") else str(path))
    assert sorted(os.listdir("/proc/self/fd")) == before


@pytest.mark.kvm
def test_vcpu_that_cannot_be_mapped_leaves_no_descriptor(vm):
    """Python's mmap wants a descriptor of its own: here there is one for the vCPU, and no other."""
    before = sorted(os.listdir("/proc/self/fd"))
    next_fd = os.dup(0)
    os.close(next_fd)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (next_fd + 1, limits[1]))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            vm.create_vcpu(0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert sorted(os.listdir("/proc/self/fd")) == before

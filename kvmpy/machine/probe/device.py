"""Probes of the device: is it there, may we open it, does it speak KVM, does it make a VM?

Each stands alone and raises nothing, so that a report can say all that is wrong at once.

Source: KVM API §2 and §4.1.
"""

import errno
import os
import stat

from kvmpy._shim import lib
from kvmpy.errors import KvmUnavailable
from kvmpy.kvm import Kvm
from kvmpy.kvm.system import DEVICE
from kvmpy.machine.probe.bench import Bench
from kvmpy.machine.probe.finding import Ability, Finding, Verdict
from kvmpy.machine.probe.host import module_fix, vendor_modules

READ_WRITE = stat.S_IRGRP | stat.S_IWGRP
"""What the group needs."""

_CONTAINER = "docker run --device /dev/kvm"


def device(path: str) -> Finding:
    """Find whether ``path`` is there and a device."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        return Finding(Ability.DEVICE, Verdict.MISSING, f"{path}: {error.strerror}", _device_fix())
    if not stat.S_ISCHR(mode):
        detail = f"{path} is {_kind(mode)}, not a character device"
        return Finding(Ability.DEVICE, Verdict.BROKEN, detail, f"name the KVM device; it is {DEVICE}")
    return Finding(Ability.DEVICE, Verdict.OK, path)


def permission(path: str) -> Finding:
    """Find whether this process may open ``path`` for reading and writing."""
    try:
        status = os.stat(path)
    except OSError:
        return _untried(Ability.PERMISSION, path)
    group = _group_name(status.st_gid)
    who = f"{stat.filemode(status.st_mode)} {_user_name(status.st_uid)}:{group}, you are {_you(status.st_gid, group)}"
    if os.access(path, os.R_OK | os.W_OK, effective_ids=True):
        return Finding(Ability.PERMISSION, Verdict.OK, who)
    return Finding(Ability.PERMISSION, Verdict.MISSING, who, _permission_fix(path, status, group))


def _permission_fix(path: str, status: os.stat_result, group: str) -> str:
    join = f"sudo usermod -aG {group} {_user_name(os.geteuid())}, then log in again"
    if status.st_gid == 0 or status.st_mode & READ_WRITE != READ_WRITE:
        join = f"sudo usermod -aG kvm {_user_name(os.geteuid())}, then log in again"
        return f"sudo groupadd -f kvm; sudo chown root:kvm {path}; sudo chmod 660 {path}; {join}"
    if _user_name(os.geteuid()) in _members(status.st_gid):
        return f"log in again: this session is older than your membership of {group}"
    return join


def api_version(path: str) -> Finding:
    """Find whether ``path`` speaks the KVM API, version 12."""
    if device(path).verdict is not Verdict.OK or permission(path).verdict is not Verdict.OK:
        return _untried(Ability.API_VERSION, path)
    try:
        with Kvm(path) as kvm:
            return Finding(Ability.API_VERSION, Verdict.OK, str(kvm.get_api_version()))
    except KvmUnavailable as error:
        fix = _OPEN_FIXES.get(error.errno or 0, f"name the KVM device; it is {DEVICE}")
        return Finding(Ability.API_VERSION, Verdict.BROKEN, f"{error.ioctl}: {error.strerror}", fix)


def create_vm(path: str) -> Finding:
    """Find whether a VM can be created, with memory and interrupt controllers."""
    if api_version(path).verdict is not Verdict.OK:
        return _untried(Ability.CREATE_VM, path)
    try:
        with Kvm(path) as kvm, Bench(kvm):
            return Finding(Ability.CREATE_VM, Verdict.OK, "with memory and interrupt controllers")
    except OSError as error:
        fix = _CREATE_FIXES.get(error.errno or 0, "see what the kernel says: sudo dmesg | grep -i kvm")
        return Finding(Ability.CREATE_VM, Verdict.MISSING, str(error), fix)


_OPEN_FIXES = {
    errno.EPERM: f"let the container have it: {_CONTAINER}",
    errno.EACCES: "a security policy forbids it (SELinux, AppArmor): see what it logs: sudo dmesg",
    errno.ENODEV: "enable virtualization (VT-x, AMD-V) in the firmware",
    errno.ENXIO: "load the kernel module: sudo modprobe kvm_intel, or kvm_amd",
    errno.EPROTO: f"use a Linux whose KVM API version is {lib.KVM_API_VERSION}",
}
_CREATE_FIXES = {
    errno.EBUSY: "end the other hypervisor (VirtualBox, VMware) that holds the processor's virtualization",
    errno.ENOMEM: "free some memory",
    errno.EMFILE: "raise the limit of open files: ulimit -n",
}


def _device_fix() -> str:
    if vendor_modules():
        return f"on the host: sudo mknod {DEVICE} c 10 232; in a container: {_CONTAINER}"
    return module_fix()


def _untried(ability: Ability, path: str) -> Finding:
    return Finding(ability, Verdict.UNKNOWN, f"not tried: {path} is no KVM device that can be opened")


# --- names ------------------------------------------------------------------------------------------------------


def _you(gid: int, group: str) -> str:
    user = _user_name(os.geteuid())
    inside = gid == os.getegid() or gid in os.getgroups()
    return f"{user}, {'in' if inside else 'not in'} group {group}"


def _user_name(uid: int) -> str:
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _group_name(gid: int) -> str:
    import grp

    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def _members(gid: int) -> list[str]:
    import grp

    try:
        return grp.getgrgid(gid).gr_mem
    except KeyError:
        return []


def _kind(mode: int) -> str:
    kinds = (
        (stat.S_ISREG, "a regular file"),
        (stat.S_ISDIR, "a directory"),
        (stat.S_ISFIFO, "a FIFO"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISBLK, "a block device"),
    )
    return next((name for test, name in kinds if test(mode)), "something else")

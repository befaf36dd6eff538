"""Probes of the host from outside: the device, the right to it, the module behind it, the processor.

No guest runs here. Each probe stands alone and raises nothing, so that a report can say all that is wrong at once.

Source: KVM API §2 and §4.1; proc(5).
"""

import errno
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass

from kvmpy._shim import lib
from kvmpy.errors import KvmError, KvmUnavailable
from kvmpy.kvm import Kvm
from kvmpy.kvm.system import DEVICE
from kvmpy.machine.probe.bench import Bench
from kvmpy.machine.probe.finding import Ability, Finding, Verdict

CPUINFO = "/proc/cpuinfo"
MODULES = "/sys/module"
VENDOR_MODULES = {"vmx": "kvm_intel", "svm": "kvm_amd"}
"""The processor's flag, and the module that needs it."""

READ_WRITE = stat.S_IRGRP | stat.S_IWGRP


@dataclass(frozen=True, slots=True)
class Host:
    """What a report begins with: the processor's model name, the kernel's release, KVM's modules."""

    cpu: str
    kernel: str
    modules: tuple[str, ...]


def describe_host() -> Host:
    """Return what this host is, as far as it tells."""
    return Host(_cpuinfo().get("model name", "unknown processor"), os.uname().release, vendor_modules())


def vendor_modules() -> tuple[str, ...]:
    """Return the loaded modules that give KVM a processor: ``kvm_intel``, ``kvm_amd``, or another's."""
    try:
        return tuple(sorted(name for name in os.listdir(MODULES) if name.startswith("kvm_")))
    except OSError:
        return ()


# --- the device -------------------------------------------------------------------------------------------------


def device(path: str) -> Finding:
    """Find whether ``path`` is there and a device."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        return Finding(Ability.DEVICE, Verdict.MISSING, f"{path}: {error.strerror}", _module_fix())
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
        return f"sudo chown root:kvm {path} && sudo chmod 660 {path}; {join}"
    if _user_name(os.geteuid()) in _members(status.st_gid):
        return f"log in again: this session is older than your membership of {group}"
    return join


def api_version(path: str) -> Finding:
    """Find whether ``path`` speaks the KVM API, version 12."""
    if not _is_device(path):
        return _untried(Ability.API_VERSION, path)
    try:
        with Kvm(path) as kvm:
            return Finding(Ability.API_VERSION, Verdict.OK, str(kvm.get_api_version()))
    except KvmError as error:
        if error.errno == errno.EACCES:
            return _untried(Ability.API_VERSION, path)
        fix = _OPEN_FIXES.get(error.errno or 0, f"name the KVM device; it is {DEVICE}")
        return Finding(Ability.API_VERSION, Verdict.BROKEN, f"{error.ioctl}: {error.strerror}", fix)


def create_vm(path: str) -> Finding:
    """Find whether a VM can be created, with memory and interrupt controllers."""
    try:
        if not _is_device(path):
            return _untried(Ability.CREATE_VM, path)
        with Kvm(path) as kvm, Bench(kvm):
            return Finding(Ability.CREATE_VM, Verdict.OK, "with memory and interrupt controllers")
    except KvmUnavailable:
        return _untried(Ability.CREATE_VM, path)
    except OSError as error:
        fix = _CREATE_FIXES.get(error.errno or 0, "see what the kernel says: sudo dmesg | grep -i kvm")
        return Finding(Ability.CREATE_VM, Verdict.MISSING, str(error), fix)


_OPEN_FIXES = {
    errno.EPERM: "let the container have it: docker run --device /dev/kvm",
    errno.ENODEV: "enable virtualization (VT-x, AMD-V) in the firmware",
    errno.ENXIO: "load the kernel module: sudo modprobe kvm_intel, or kvm_amd",
    errno.EPROTO: f"use a Linux whose KVM API version is {lib.KVM_API_VERSION}",
}
_CREATE_FIXES = {
    errno.EBUSY: "end the other hypervisor (VirtualBox, VMware) that holds the processor's virtualization",
    errno.ENOMEM: "free some memory",
    errno.EMFILE: "raise the limit of open files: ulimit -n",
}


# --- what is behind it ------------------------------------------------------------------------------------------


def module(path: str) -> Finding:
    """Find KVM's modules: the common one and the vendor's."""
    found = vendor_modules()
    if found:
        return Finding(Ability.MODULE, Verdict.OK, ", ".join(found))
    if os.path.isdir(f"{MODULES}/kvm"):
        detail = "kvm is there, but no vendor module: it is built in, or missing"
        return Finding(Ability.MODULE, Verdict.UNKNOWN, detail)
    return Finding(Ability.MODULE, Verdict.MISSING, "no kvm module", _module_fix())


def cpu_flag(path: str) -> Finding:
    """Find whether the processor says that it has hardware virtualization."""
    info = _cpuinfo()
    if not info:
        return Finding(Ability.CPU_FLAG, Verdict.UNKNOWN, f"{CPUINFO} cannot be read")
    flags = [flag for flag in VENDOR_MODULES if flag in info.get("flags", "").split()]
    if flags:
        return Finding(Ability.CPU_FLAG, Verdict.OK, ", ".join(flags))
    return Finding(Ability.CPU_FLAG, Verdict.MISSING, "no vmx (Intel) and no svm (AMD)", _FLAG_FIX)


def bare_metal(path: str) -> Finding:
    """Find whether this host is itself a guest: KVM is then nested, or does without hardware."""
    info = _cpuinfo()
    if not info:
        return Finding(Ability.BARE_METAL, Verdict.UNKNOWN, f"{CPUINFO} cannot be read")
    if "hypervisor" not in info.get("flags", "").split():
        return Finding(Ability.BARE_METAL, Verdict.OK)
    detail = "this host is itself a guest (CPUID hypervisor bit): exits cost more"
    return Finding(Ability.BARE_METAL, Verdict.MISSING, detail, "take timings on a machine with no hypervisor below it")


_FLAG_FIX = (
    "enable virtualization (VT-x, AMD-V) in the firmware; in a virtual machine: nested virtualization, in its host"
)


def _module_fix() -> str:
    flags = _cpuinfo().get("flags", "").split()
    for flag, name in VENDOR_MODULES.items():
        if flag in flags:
            return f"sudo modprobe {name}"
    return _FLAG_FIX


def _cpuinfo() -> dict[str, str]:
    """Return the first processor's lines of /proc/cpuinfo, by name."""
    found: dict[str, str] = {}
    try:
        with open(CPUINFO) as file:
            for line in file:
                name, colon, value = line.partition(":")
                if not colon:
                    break
                found[name.strip()] = value.strip()
    except OSError:
        pass
    return found


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


def _is_device(path: str) -> bool:
    try:
        return stat.S_ISCHR(os.stat(path).st_mode)
    except OSError:
        return False


def _untried(ability: Ability, path: str) -> Finding:
    return Finding(ability, Verdict.UNKNOWN, f"not tried: {path} cannot be opened")


PROBES: dict[Ability, Callable[[str], Finding]] = {
    Ability.DEVICE: device,
    Ability.PERMISSION: permission,
    Ability.API_VERSION: api_version,
    Ability.CREATE_VM: create_vm,
    Ability.MODULE: module,
    Ability.CPU_FLAG: cpu_flag,
    Ability.BARE_METAL: bare_metal,
}

"""The probes of the host from outside: its device node, its modules, its processor. No guest runs."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvmpy.machine import probe
from kvmpy.machine.probe import SECTIONS, Verdict
from kvmpy.machine.probe import device as device_probes
from kvmpy.machine.probe import host as host_probes

NOBODY = 65534


@contextmanager
def unprivileged() -> Iterator[None]:
    """Be nobody, where we are root."""
    uid = os.geteuid()
    if uid == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(uid)


@pytest.fixture
def locked() -> Iterator[str]:
    """A file that its group, of which we are no member, may use, and we may not."""
    with tempfile.NamedTemporaryFile(dir="/tmp") as file:
        os.chmod(file.name, 0o000)
        yield file.name


def not_the_device(kind: str, folder: Path) -> str:
    path = folder / "kvm"
    match kind:
        case "regular file":
            path.write_bytes(b"")
        case "directory":
            path.mkdir()
        case "FIFO":
            os.mkfifo(path)
        case "null device":
            return "/dev/null"
    return str(path)


@pytest.mark.parametrize("kind", ["missing", "regular file", "directory", "FIFO", "null device"])
def test_what_is_no_kvm_device_is_told_with_its_fix(kind: str, tmp_path: Path) -> None:
    """It is never opened and read to its end; no guest is tried."""
    path = not_the_device(kind, tmp_path)
    examination = probe.examine(path)
    assert not examination.works
    failing = [found for found in examination.findings if found.fails]
    assert len(failing) == 1
    assert path in failing[0].detail
    assert failing[0].fix
    assert {found.name for found in examination.findings} == set(SECTIONS["host"])


def test_a_device_without_permission_names_owner_mode_and_user(locked: str) -> None:
    with unprivileged():
        found = device_probes.permission(locked)
        assert found.fails
        assert "----------" in found.detail
        assert ":" in found.detail
        assert device_probes._user_name(os.geteuid()) in found.detail
        assert "chmod 660" in (found.fix or "")


def test_what_may_not_be_opened_is_not_opened(locked: str) -> None:
    with unprivileged():
        assert device_probes.api_version(locked).verdict is Verdict.UNKNOWN
        assert device_probes.create_vm(locked).verdict is Verdict.UNKNOWN


def test_a_device_of_a_group_is_mended_by_joining_it(locked: str) -> None:
    if os.geteuid() == 0:
        os.chown(locked, 0, 5)
    os.chmod(locked, 0o060)
    with unprivileged():
        found = device_probes.permission(locked)
    assert found.verdict is Verdict.MISSING
    assert "usermod -aG" in (found.fix or "") or "log in again" in (found.fix or "")


MachineFiles = Callable[[str, tuple[str, ...]], None]


@pytest.fixture
def pretend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MachineFiles:
    """Let the host's files say other flags and modules."""

    def write(flags: str, modules: tuple[str, ...]) -> None:
        cpuinfo, loaded = tmp_path / "cpuinfo", tmp_path / "module"
        cpuinfo.write_text(f"processor\t: 0\nmodel name\t: Zuse Z3\nflags\t\t: {flags}\n\nprocessor\t: 1\n")
        loaded.mkdir()
        for name in modules:
            (loaded / name).mkdir()
        monkeypatch.setattr(host_probes, "CPUINFO", str(cpuinfo))
        monkeypatch.setattr(host_probes, "MODULES", str(loaded))

    return write


@pytest.mark.parametrize(("flag", "module"), [("vmx", "kvm_intel"), ("svm", "kvm_amd")])
def test_a_processor_with_virtualization_and_no_module_is_told_which_to_load(
    pretend: MachineFiles, tmp_path: Path, flag: str, module: str
) -> None:
    pretend(f"fpu {flag} lm", ())
    assert host_probes.cpu_flag("").verdict is Verdict.OK
    assert host_probes.module("").fix == f"sudo modprobe {module}"
    assert device_probes.device(str(tmp_path / "kvm")).fix == f"sudo modprobe {module}"


def test_a_processor_without_virtualization_is_sent_to_the_firmware(pretend: MachineFiles, tmp_path: Path) -> None:
    pretend("fpu lm", ())
    assert host_probes.cpu_flag("").verdict is Verdict.MISSING
    assert "firmware" in (device_probes.device(str(tmp_path / "kvm")).fix or "")


def test_kvm_without_virtualization_in_the_processor_is_no_fault(pretend: MachineFiles) -> None:
    """Some KVM does without it: then nothing is to be mended in the firmware."""
    pretend("fpu lm", ("kvm", "kvm_other"))
    found = host_probes.cpu_flag("")
    assert (found.verdict, found.fix) == (Verdict.UNKNOWN, None)


def test_a_missing_device_behind_a_loaded_module_is_a_matter_of_the_node(pretend: MachineFiles, tmp_path: Path) -> None:
    pretend("fpu vmx lm", ("kvm", "kvm_intel"))
    assert host_probes.describe_host().modules == ("kvm_intel",)
    assert host_probes.describe_host().cpu == "Zuse Z3"
    assert "mknod" in (device_probes.device(str(tmp_path / "kvm")).fix or "")


@pytest.mark.parametrize(("flags", "verdict"), [("fpu lm", Verdict.OK), ("fpu hypervisor", Verdict.MISSING)])
def test_a_host_that_is_a_guest_is_told_from_one_that_is_not(
    pretend: MachineFiles, flags: str, verdict: Verdict
) -> None:
    """Intel SDM vol. 2, CPUID leaf 1, ECX bit 31: never set by a processor."""
    pretend(flags, ())
    assert host_probes.bare_metal("").verdict is verdict


def test_a_host_without_proc_and_sys_is_unknown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(host_probes, "CPUINFO", str(tmp_path / "no"))
    monkeypatch.setattr(host_probes, "MODULES", str(tmp_path / "no"))
    assert host_probes.cpu_flag("").verdict is Verdict.UNKNOWN
    assert host_probes.bare_metal("").verdict is Verdict.UNKNOWN
    assert host_probes.module("").verdict is Verdict.MISSING

"""The first program in README is a program: it runs as it stands and prints what the guest prints."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HELLO = ROOT / "build" / "guests" / "hello.bin"


def first_block() -> str:
    """Return the first block of Python in README."""
    found = re.search(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1]


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )


@pytest.mark.kvm
def test_first_program_in_readme_prints_hello() -> None:
    subprocess.run([sys.executable, ROOT / "guests" / "build.py"], check=True, capture_output=True)
    done = run(first_block())
    assert (done.stdout, done.stderr, done.returncode) == ("Hello, world\n", "", 0)


def test_first_program_in_readme_is_level_1_of_the_design() -> None:
    """At most 20 lines, by the names that the KVM API document has."""
    lines = [line for line in first_block().splitlines() if line.strip()]
    assert len(lines) <= 20
    text = "\n".join(lines)
    for name in ("Kvm()", "create_vm()", "GuestMemory(1 * MiB)", "set_user_memory_region(slot=0, guest_phys_addr=0"):
        assert name in text
    for name in ("create_vcpu(0)", "real_mode(vcpu, entry=0x1000)", "for exit in vcpu.run():", "match exit:"):
        assert name in text


@pytest.mark.kvm
def test_the_guest_halts_where_no_board_is() -> None:
    """The example without its case for the exit port: the run ends at Hlt."""
    done = run(
        """
from kvmpy import Kvm, GuestMemory, IoIn, IoOut, Hlt, real_mode, MiB

with Kvm() as kvm, kvm.create_vm() as vm:
    memory = GuestMemory(1 * MiB)
    vm.set_user_memory_region(slot=0, guest_phys_addr=0, memory=memory)
    memory.load("build/guests/hello.bin", gpa=0x1000)
    vcpu = vm.create_vcpu(0)
    real_mode(vcpu, entry=0x1000)
    for exit in vcpu.run():
        match exit:
            case IoOut(port=0xE9, data=data): print(data.decode(), end="")
            case Hlt():                       break
"""
    )
    assert (done.stdout, done.stderr, done.returncode) == ("Hello, world\n", "", 0)

"""From the start of the process to the guest's first byte, and to the end of the process, beside QEMU's microvm.

Both boot the same multiboot image with the same cores and memory, taking turns. QEMU is as fast as it can be with what
kvmpy has, too: interrupt controllers, PIT, RTC, ACPI tables and a serial port; its small firmware (qboot, microvm's
default), no default devices, and memory from a memfd. (From anonymous memory, its default, it would clear 2 MiB for
each word that the guest touches.) With two cores QEMU has the easier guest: microvm has neither MP table nor parameter
page, so that the second core is not started.
"""

import shutil
import sys

import pytest
from conftest import ROOT
from process import KVMPY_RUN, Life, live
from pytest_benchmark.fixture import BenchmarkFixture
from sampling import Row, figure, ratio

IMAGE = str(ROOT / "guest.img")
ROUNDS = 80
QEMU_SUCCESS = 1  # isa-debug-exit makes (v << 1) | 1 of the guest's v


def kvmpy_command(cores: int, mebibytes: int) -> list[str]:
    return [*KVMPY_RUN, IMAGE, "--cores", str(cores), "--mem", f"{mebibytes}M"]


def qemu_command(cores: int, mebibytes: int) -> list[str]:
    """Return the QEMU that does the same."""
    qemu = shutil.which("qemu-system-x86_64")
    if qemu is None:
        pytest.skip("qemu-system-x86_64 is not installed: apt install qemu-system-x86")
    memory = f"memory-backend-memfd,id=ram,size={mebibytes}M,share=on"
    # KVM on a few hosts refuses the feature MSR that -arch-capabilities leaves out.
    options = (
        f"-M microvm,memory-backend=ram -object {memory} -m {mebibytes}M -smp {cores} -accel kvm "
        "-cpu host,-arch-capabilities -nodefaults -no-user-config -nographic -serial stdio "
        "-device isa-debug-exit,iobase=0xf4"
    )
    return [qemu, *options.split(), "-kernel", IMAGE]


def lived_well(life: Life, status: int) -> Life:
    """Return ``life``, if its guest came to its end."""
    assert life.status == status, f"status {life.status} after {life.output!r}"
    assert life.output.startswith(b"kvmpy guest")
    assert b"words above 4 GiB" in life.output
    return life


@pytest.mark.parametrize(("cores", "mebibytes", "name"), [(1, 128, "1 core, 128 MiB"), (2, 3584, "2 cores, 3.5 GiB")])
def test_startup(benchmark: BenchmarkFixture, rows: list[Row], cores: int, mebibytes: int, name: str) -> None:
    ours: list[Life] = []
    theirs: list[Life] = []
    kvmpy, qemu = kvmpy_command(cores, mebibytes), qemu_command(cores, mebibytes)

    def baseline() -> None:
        theirs.append(lived_well(live(qemu), QEMU_SUCCESS))

    def target() -> None:
        ours.append(lived_well(live(kvmpy), 0))

    baseline()
    target()  # writes Python's byte code, the first time
    ours.clear()
    theirs.clear()
    benchmark.pedantic(target, setup=baseline, rounds=ROUNDS)
    first = [life.first_byte for life in ours], [life.first_byte for life in theirs]
    end = [life.end for life in ours], [life.end for life in theirs]
    rows.append(ratio(f"first byte, {name} / QEMU", "ms", *first, aim=0.7))
    rows.append(ratio(f"process end, {name} / QEMU", "ms", *end, aim=0.7))


def test_interpreter(benchmark: BenchmarkFixture, rows: list[Row]) -> None:
    """What no Python program can do without: an interpreter that starts and prints one byte."""
    lives: list[Life] = []
    command = [sys.executable, "-c", "import os; os.write(1, b'x')"]
    benchmark.pedantic(lambda: lives.append(live(command)), rounds=ROUNDS, warmup_rounds=1)
    rows.append(figure("  first byte of python -c", "ms", [life.first_byte for life in lives]))

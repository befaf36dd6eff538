"""Fast or readable, the same machine: what C answers, Python and a traced device answer alike, to the byte."""

from collections.abc import Callable

import pytest

from kvmpy.kvm import Exit, Intr, Vcpu
from kvmpy.machine.bus import Mode
from kvmpy.machine.machine import EndReason
from kvmpy.pc import Pc, RunResult
from kvmpy.pc.spec import DEVICES

pytestmark = pytest.mark.kvm

# A little of everything: the console and its presence, COM1 as a driver uses it, string output, CMOS, wide and
# straddling accesses, ports and addresses that nobody has, and an exit value that depends on what was read.
EVERYTHING = """
        cld
        movw $0x2000, %sp
        inb $KVMPY_PORT_CONSOLE, %al
        outb %al, $KVMPY_PORT_CONSOLE
        movw $text, %si
        movw $text_end - text, %cx
        movw $KVMPY_PORT_CONSOLE, %dx
        rep outsb
        movw $KVMPY_PORT_SERIAL + 3, %dx
        movb $0x83, %al
        outb %al, %dx
        movw $KVMPY_PORT_SERIAL, %dx
        movw $0x0001, %ax
        outw %ax, %dx                           # both halves of the divisor
        movw $KVMPY_PORT_SERIAL + 3, %dx
        movb $3, %al
        outb %al, %dx
        movw $text, %si
        movw $text_end - text, %cx
1:      movw $KVMPY_PORT_SERIAL + 5, %dx
        inb %dx, %al
        testb $0x20, %al
        jz 1b
        movw $KVMPY_PORT_SERIAL, %dx
        lodsb
        outb %al, %dx
        loop 1b
        inw %dx, %ax                            # RBR and IER together
        movw $text, %si
        movw $text_end - text, %cx
        rep outsb
        movb $0x34, %al
        outb %al, $0x70
        inb $0x71, %al
        movb %al, %bl
        inb $0x99, %al
        addb %al, %bl
        movw $0xe8, %dx
        inl %dx, %eax                           # nobody, the console, nobody, nobody
        movw $KVMPY_PORT_CONSOLE, %dx
        outw %ax, %dx                           # the console and its neighbour
        movw $KVMPY_PORT_SERIAL + 7, %dx
        outl %eax, %dx
        inb $0x64, %al
        addb %al, %bl
        inb $0x92, %al
        addb %al, %bl
        movw $KVMPY_PORT_ACPI_CONTROL, %dx
        inw %dx, %ax
        addb %al, %bl
        movw $4, %cx
        movw $0x99, %dx
        movw $0x3000, %di
        rep insb
        movb %bl, %al
        outb %al, $KVMPY_PORT_EXIT
        hlt
text:   .ascii "Fast or readable\\n"
text_end:
"""


def outcome(result: RunResult) -> dict[str, object]:
    """Return all that should not depend on who answered."""
    return {
        "serial": result.serial_bytes,
        "debugcon": result.debugcon_bytes,
        "status": result.status,
        "exits": result.exits,
        "unmapped": (result.unmapped_reads, result.unmapped_writes),
        "ranges": [(use.name, use.base, use.reads, use.writes) for use in result.ranges],
        "rbx": result.registers[0]["rbx"],
    }


@pytest.fixture
def in_c(run_guest: Callable[..., RunResult]) -> dict[str, object]:
    result = run_guest(EVERYTHING)
    assert result.reason is EndReason.EXIT_PORT
    return outcome(result)


def test_fast_path_gives_what_the_program_says(in_c: dict[str, object]) -> None:
    """The oracle is not empty: the text came out of both ports."""
    assert in_c["serial"] == b"Fast or readable\n" * 2
    assert b"Fast or readable\n" in bytes(in_c["debugcon"])


@pytest.mark.parametrize("mode", [Mode.PYTHON, Mode.TRACE])
def test_devices_in_python_give_the_same_output_and_counts(
    run_guest: Callable[..., RunResult], in_c: dict[str, object], mode: Mode
) -> None:
    assert outcome(run_guest(EVERYTHING, device_modes=dict.fromkeys(DEVICES, mode))) == in_c


@pytest.mark.parametrize("device", DEVICES)
def test_one_device_in_python_changes_nothing(
    run_guest: Callable[..., RunResult], in_c: dict[str, object], device: str
) -> None:
    """A student turns a device from fast to readable with one option."""
    assert outcome(run_guest(EVERYTHING, device_modes={device: Mode.PYTHON})) == in_c


def test_traced_run_gives_the_same_output_and_counts(make_pc: Callable[..., Pc], in_c: dict[str, object]) -> None:
    seen: list[Exit] = []

    def trace(vcpu: Vcpu, exit: Exit) -> None:
        seen.append(exit)

    result = make_pc(EVERYTHING, trace_exits=True, tracer=trace).run(timeout=20.0)
    assert outcome(result) == in_c
    assert len([exit for exit in seen if not isinstance(exit, Intr)]) == result.exits_total


def test_measuring_changes_no_output(run_guest: Callable[..., RunResult], in_c: dict[str, object]) -> None:
    result = run_guest(EVERYTHING, measure_time=True)
    assert outcome(result) == in_c
    assert result.seconds_in_guest > 0

"""What a run tells: counts, times, text, registers; and what a PC is made of."""

import os
from collections.abc import Callable

import pytest

from kvmpy import ImageError, KiB, MiB
from kvmpy.machine.bus import Mode
from kvmpy.machine.layout import PARAMETER_PAGE
from kvmpy.machine.machine import EndReason
from kvmpy.pc import MachineSpec, Pc, RunResult
from kvmpy.pc.capture import KEPT, Capture
from kvmpy.pc.loop import EventLoop
from kvmpy.pc.spec import host_memory

FINISH = "xorl %eax, %eax\n outb %al, $KVMPY_PORT_EXIT\n hlt"
Run = Callable[..., RunResult]


@pytest.mark.kvm
def test_counts_are_by_reason_and_by_device(run_guest: Run) -> None:
    code = "movw $9, %cx\n 1: outb %al, $KVMPY_PORT_CONSOLE\n loop 1b\n inb $0x70, %al\n"
    code += "inb $0x99, %al\n outb %al, $0x99\n"
    result = run_guest(code + FINISH)
    assert result.exits == {"IO": 13}
    assert result.exits_total == 13
    uses = {use.name: (use.reads, use.writes) for use in result.ranges if use.reads or use.writes}
    assert uses == {"debugcon": (0, 9), "cmos": (1, 0), "exit": (0, 1)}
    assert (result.unmapped_reads, result.unmapped_writes) == (1, 1)


@pytest.mark.kvm
def test_registers_are_those_at_the_end(run_guest: Run) -> None:
    result = run_guest("movl $0x12345678, %ebx\n movl $5, %ecx\n" + FINISH, cores=2)
    assert (result.registers[0]["rbx"], result.registers[0]["rcx"]) == (0x1234_5678, 5)
    assert set(result.registers) == {0, 1}


@pytest.mark.kvm
def test_time_in_the_guest_is_measured_on_request(run_guest: Run) -> None:
    assert run_guest(FINISH).seconds_in_guest == 0.0
    result = run_guest("movw $1000, %cx\n 1: loop 1b\n" + FINISH, measure_time=True)
    assert result.seconds_in_guest > 0.0
    assert result.seconds > 0.0


@pytest.mark.kvm
def test_text_reaches_its_sink_as_it_is_printed_and_is_kept(make_pc: Callable[..., Pc]) -> None:
    serial, debugcon = bytearray(), bytearray()
    code = "movw $0x3f8, %dx\n movb $'s', %al\n outb %al, %dx\n movb $'d', %al\n outb %al, $KVMPY_PORT_CONSOLE\n"
    pc = make_pc(code + FINISH, serial=serial.extend, debugcon=debugcon.extend)
    result = pc.run(timeout=20.0)
    assert (serial, debugcon) == (b"s", b"d")
    assert (result.serial, result.debugcon) == ("s", "d")


@pytest.mark.kvm
@pytest.mark.parametrize("mode", [Mode.C, Mode.PYTHON])
def test_flood_of_text_is_all_heard(make_pc: Callable[..., Pc], mode: Mode) -> None:
    """The sink hears all that was taken, to the end of the run."""
    heard = 0

    def hear(data: bytes) -> None:
        nonlocal heard
        heard += len(data)

    code = "cld\n movw $0xe9, %dx\n 1: xorw %si, %si\n movw $0xffff, %cx\n rep outsb\n jmp 1b"
    pc = make_pc(code, debugcon=hear, device_modes={"debugcon": mode})
    result = pc.run(timeout=0.2)
    assert result.reason is EndReason.TIMEOUT
    assert len(result.debugcon_bytes) == min(heard, KEPT)
    use = next(use for use in result.ranges if use.name == "debugcon")
    assert 0 < heard <= use.writes


def test_what_is_kept_of_a_flood_is_the_last_mib() -> None:
    """The memory of it is bounded, however much comes."""
    loop = EventLoop()
    capture = Capture(loop, None)
    sent = bytearray()
    for number in range(50):
        piece = bytes([number]) * (64 * KiB)
        assert capture.output.push(piece)
        sent += piece
        capture.drain()
        assert len(capture._kept) <= 2 * KEPT
    assert capture.data == sent[-KEPT:]
    capture.close()
    loop.close()


@pytest.mark.kvm
def test_sink_that_raises_ends_the_run(make_pc: Callable[..., Pc]) -> None:
    """It runs in the waiting thread: the guest is out when the error arrives."""

    def refuse(data: bytes) -> None:
        raise BrokenPipeError("nobody listens")

    pc = make_pc("1: outb %al, $0xe9\n jmp 1b", debugcon=refuse)
    with pytest.raises(BrokenPipeError):
        pc.run(timeout=20.0)
    before = pc.machine.exits_total()
    assert pc.machine.exits_total() == before


# --- what a PC is made of ---------------------------------------------------------------------------------------


@pytest.mark.kvm
def test_parameter_page_has_what_the_spec_says(make_pc: Callable[..., Pc]) -> None:
    identity = bytes(range(16))
    pc = make_pc(FINISH, name="vm1", id=identity, parameters={"key": "value"}, cores=2)
    page = pc.memory.read(PARAMETER_PAGE, 4096)
    assert page.startswith(b"kvmpyPAG")
    for piece in (identity, b"vm1\0", b"key=value\0"):
        assert piece in page


@pytest.mark.kvm
def test_two_pcs_have_identities_of_their_own(make_pc: Callable[..., Pc]) -> None:
    pages = {make_pc(FINISH).memory.read(PARAMETER_PAGE + 0x10, 16) for _ in range(2)}
    assert len(pages) == 2


@pytest.mark.kvm
def test_request_to_stop_reaches_the_guest(make_pc: Callable[..., Pc]) -> None:
    """guests/abi.h: the mailbox is set, and the GSI raised. A guest that polls needs no interrupt."""
    code = "1: movl KVMPY_PARAMS + KVMPY_PARAMS_OFF_REQUEST, %eax\n cmpl $KVMPY_REQUEST_STOP, %eax\n jne 1b\n"
    pc = make_pc(code + FINISH, "protected")
    pc.request_stop()
    assert pc.run(timeout=20.0).status == 0


@pytest.mark.kvm
@pytest.mark.parametrize("cores", [-1, 0, 100_000])
def test_cores_that_kvm_does_not_give_are_refused(make_pc: Callable[..., Pc], cores: int) -> None:
    with pytest.raises(ValueError, match=rf"^{cores} cores: allowed is 1 to \d+ \(KVM_CAP_MAX_VCPUS of this host\)$"):
        make_pc(FINISH, cores=cores)


@pytest.mark.kvm
@pytest.mark.parametrize("image", ["/nonexistent", "/"])
def test_image_that_is_none_leaves_nothing_open(image: str) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    with pytest.raises(ImageError):
        Pc(MachineSpec(image, memory=4 * MiB))
    assert sorted(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": 0}, "^memory of 0 bytes: allowed is 1 MiB to"),
        ({"memory": 1}, "^memory of 1 bytes: allowed is 1 MiB to"),
        ({"memory": 1 * MiB + 1}, "in multiples of 4 KiB$"),
        ({"memory": host_memory() + 4096}, r"allowed is 1 MiB to [0-9.]+ [GMT]iB \(this host's\)"),
        ({"pin": (0,), "cores": 2}, "^1 host CPUs to pin to for 2 cores"),
        ({"pin": (9999,)}, "^host CPU 9999 to pin to: this process may use 0"),
        ({"pin": (0,), "dedicated": True}, "dedicated chooses the host CPUs itself"),
        ({"device_modes": {"floppy": Mode.C}}, "^no device 'floppy': there are serial, "),
        ({"max_exits": -1}, "^max_exits of -1"),
    ],
)
def test_spec_that_no_host_can_give_is_refused(options: dict[str, object], message: str) -> None:
    """One line with the allowed range."""
    with pytest.raises(ValueError, match=message) as caught:
        MachineSpec("image", **options)
    assert "\n" not in str(caught.value)


def test_spec_can_be_changed_into_another() -> None:
    spec = MachineSpec("image", cores=2, memory=64 * MiB)
    changed = spec.replace(cores=3)
    assert (spec.cores, changed.cores, changed.memory) == (2, 3, 64 * MiB)
    with pytest.raises(ValueError, match=r"^memory of 0 bytes"):
        spec.replace(memory=0)

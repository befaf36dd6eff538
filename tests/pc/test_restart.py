"""A guest that resets the machine boots again where that is wanted: a new board, the same disks, lines and identity."""

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from disk_guests import IOAPIC, guest

from kvmpy._shim import lib
from kvmpy.errors import ImageError, LeaseError
from kvmpy.kvm import Vcpu
from kvmpy.kvm.exits import Exit
from kvmpy.machine.layout import PARAMETER_PAGE
from kvmpy.machine.machine import EndReason
from kvmpy.machine.memory import GuestMemory
from kvmpy.pc import ExitStatus, OnReboot, Pc, RunResult
from kvmpy.storage.open import open_disk
from kvmpy.units import MiB

pytestmark = pytest.mark.kvm
MakePc = Callable[..., Pc]
RESTART = OnReboot.RESTART
LONG = 20.0  # seconds: a bound for what hangs, never waited for

RESET = "movb $0xfe, %al ; outb %al, $0x64 ; 9: jmp 9b\n"
PRINT_AND_RESET = "movw $0x3f8, %dx ; movb $'x', %al ; outb %al, %dx\n" + RESET


def obey(reset: str) -> str:
    """Return a guest that reads a key from COM1, says it on port 0xe9, and ends at a ``q``, else by ``reset``."""
    return f"""
        movw $0x3fd, %dx
    1:  inb %dx, %al ; testb $1, %al ; jz 1b
        movw $0x3f8, %dx ; inb %dx, %al
        outb %al, $0xe9
        cmpb $'q', %al ; jne 2f
        movb $7, %al ; outb %al, $0xf4
    2:  {reset}
    3:  jmp 3b
    """


RESETS = {
    "keyboard controller": "movb $0xfe, %al ; outb %al, $0x64",
    "port 0x92": "movb $1, %al ; outb %al, $0x92",
    "reset register": f"movw ${lib.KVMPY_PORT_RESET}, %dx ; movb $6, %al ; outb %al, %dx",
    "triple fault": "lidt 4f ; ud2\n 4: .word 0, 0, 0",
}


@pytest.mark.parametrize("way", RESETS)
def test_each_reset_boots_again_and_input_that_waits_is_kept(make_pc: MakePc, way: str) -> None:
    """Also the triple fault: a board resets a processor that shuts down (Intel SDM vol. 3 §6.15)."""
    pc = make_pc(obey(RESETS[way]), "protected", on_reboot=RESTART)
    pc.serial.feed(b"abq")
    result = pc.run(timeout=LONG)
    assert (result.status, result.restarts, result.debugcon) == (7, 2, "abq")


@pytest.mark.parametrize(("way", "status"), [("keyboard controller", 202), ("triple fault", 198)])
def test_without_restart_it_is_an_end(make_pc: MakePc, way: str, status: int) -> None:
    pc = make_pc(obey(RESETS[way]), "protected")
    pc.serial.feed(b"abq")
    result = pc.run(timeout=LONG)
    assert (result.status, result.restarts, result.debugcon) == (status, 0, "a")


def test_memory_is_zeros_again_and_devices_are_new(make_pc: MakePc) -> None:
    """The guest leaves a mark in memory and in a register of COM1, and fails when it finds either."""
    code = """
        cmpb $0, 0x8000 ; jne 8f
        movw $0x3ff, %dx ; inb %dx, %al ; testb %al, %al ; jnz 8f
        movb $1, %al ; outb %al, %dx ; movb %al, 0x8000
    """
    pc = make_pc(code + obey(RESETS["port 0x92"]) + "8: movb $99, %al ; outb %al, $0xf4", on_reboot=RESTART)
    pc.serial.feed(b"xq")
    assert pc.run(timeout=LONG).status == 7


def test_the_identity_stays(make_pc: MakePc) -> None:
    pages = []
    pc = make_pc(obey(RESET), on_reboot=RESTART)
    pages.append(pc.memory.read(PARAMETER_PAGE, 4096))
    pc.serial.feed(b"xq")
    pc.run(timeout=LONG)
    pages.append(pc.memory.read(PARAMETER_PAGE, 4096))
    assert pages[0] == pages[1]
    assert pc.id in pages[0]


def test_text_of_all_boots_is_one_stream_and_counts_are_the_last_boots(make_pc: MakePc) -> None:
    heard = bytearray()
    results: list[RunResult] = []

    def on_restart(result: RunResult) -> None:
        results.append(result)
        if len(results) == 3:
            pc.stop()

    pc = make_pc(PRINT_AND_RESET, on_reboot=RESTART, serial=heard.extend, on_restart=on_restart)
    last = pc.run(timeout=LONG)
    assert heard == b"xxx"
    assert [result.restarts for result in results] == [0, 1, 2]
    assert [result.exits_total for result in results] == [2, 2, 2]
    assert {result.reason for result in results} == {EndReason.RESET}
    assert (last.reason, last.restarts, last.exits_total, last.serial) == (EndReason.INTERRUPTED, 3, 0, "xxx")


def test_time_and_exits_are_limited_over_all_boots(make_pc: MakePc) -> None:
    result = make_pc(PRINT_AND_RESET, on_reboot=RESTART).run(timeout=0.3)
    assert result.reason is EndReason.TIMEOUT
    assert result.restarts > 0
    result = make_pc(PRINT_AND_RESET, on_reboot=RESTART, max_exits=7).run(timeout=LONG)
    assert (result.reason, result.restarts, result.exits_total) == (EndReason.BUDGET, 3, 1)


@pytest.mark.parametrize("how", ["stop", "close"])
def test_a_guest_that_reboots_for_ever_can_be_ended_at_any_moment(make_pc: MakePc, how: str) -> None:
    for seed in range(5):
        begun = threading.Event()
        pc = make_pc(PRINT_AND_RESET, on_reboot=RESTART, cores=2, serial=lambda data, begun=begun: begun.set())

        def end(pc: Pc = pc, begun: threading.Event = begun, seed: int = seed) -> None:
            begun.wait(LONG)
            for _ in range(seed * 2000):
                pass
            getattr(pc, how)()

        ender = threading.Thread(target=end)
        ender.start()
        assert pc.run(timeout=LONG).reason is EndReason.INTERRUPTED
        ender.join(LONG)
        assert not ender.is_alive()
        pc.close()


def test_other_threads_may_pause_resume_and_ask_while_it_reboots(make_pc: MakePc) -> None:
    pc = make_pc(PRINT_AND_RESET, on_reboot=RESTART)
    errors: list[BaseException] = []

    def disturb() -> None:
        try:
            for _ in range(50):
                pc.pause()
                pc.resume()
        except BaseException as error:
            errors.append(error)
        pc.stop()

    other = threading.Thread(target=disturb)
    other.start()
    assert pc.run(timeout=LONG).reason is EndReason.INTERRUPTED
    other.join(LONG)
    assert errors == []


def test_a_pause_while_the_board_is_replaced_is_one_of_the_new_board(
    make_pc: MakePc, monkeypatch: pytest.MonkeyPatch
) -> None:
    pc = make_pc(PRINT_AND_RESET, on_reboot=RESTART)
    clear, errors = pc.memory.clear, []

    def pause() -> None:
        try:
            pc.pause()
        except RuntimeError as error:
            errors.append(error)

    pauser = threading.Thread(target=pause)

    def clear_while_another_pauses() -> None:
        if pauser.ident is None:
            pauser.start()
            pauser.join(0.05)  # it waits for us: this is no time to pause
        clear()

    monkeypatch.setattr(pc.memory, "clear", clear_while_another_pauses)
    assert pc.run(timeout=0.5).reason is EndReason.TIMEOUT
    pauser.join(LONG)
    assert errors == []


def test_a_guest_that_is_paused_when_it_reboots_stays_so(make_pc: MakePc) -> None:
    pc = make_pc(PRINT_AND_RESET, on_reboot=RESTART, on_restart=lambda result: pc.pause())
    result = pc.run(timeout=0.3)
    assert (result.reason, result.restarts, result.exits_total) == (EndReason.TIMEOUT, 1, 0)


def test_a_guest_that_was_asked_to_stop_and_resets_has_stopped(make_pc: MakePc) -> None:
    pc = make_pc(PRINT_AND_RESET, on_reboot=RESTART)
    pc.request_stop()
    result = pc.run(timeout=LONG)
    assert (result.reason, result.status, result.restarts) == (EndReason.RESET, ExitStatus.RESET, 0)


def test_who_watches_the_loop_is_heard_between_two_boots(make_pc: MakePc, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest that ends each boot before anybody waits for it keeps no signal from ending the run."""
    pc = make_pc(PRINT_AND_RESET, on_reboot=RESTART, max_exits=200, on_restart=lambda result: os.eventfd_write(fd, 1))
    fd = os.eventfd(0)
    pc.loop.watch(fd, pc.stop)

    def wait_apart(*arguments: object) -> None:
        while pc.machine.end is None:
            os.sched_yield()

    monkeypatch.setattr(pc, "_wait", wait_apart)
    assert pc.run(timeout=LONG).reason is EndReason.INTERRUPTED
    os.close(fd)


def test_the_tracer_stays(make_pc: MakePc) -> None:
    boards = set()

    def trace(vcpu: Vcpu, exit: Exit) -> None:
        boards.add(id(vcpu))

    pc = make_pc(PRINT_AND_RESET, on_reboot=RESTART, tracer=trace, trace_exits=True, max_exits=6)
    pc.run(timeout=LONG)
    assert len(boards) > 1


def test_an_image_that_has_gone_meanwhile_is_told(make_pc: MakePc) -> None:
    pc = make_pc(PRINT_AND_RESET, on_reboot=RESTART, on_restart=lambda result: os.unlink(pc.spec.boot))
    with pytest.raises(ImageError, match="No such file"):
        pc.run(timeout=LONG)
    pc.close()


def test_reboots_leave_nothing_behind(make_pc: MakePc) -> None:
    held = []

    def on_restart(result: RunResult) -> None:
        if result.restarts in (5, 55):
            mapped = len(Path("/proc/self/maps").read_text().splitlines())
            held.append((sorted(os.listdir("/proc/self/fd")), threading.active_count(), mapped))

    pc = make_pc(PRINT_AND_RESET, on_reboot=RESTART, cores=2, max_exits=60 * 2, on_restart=on_restart)
    pc.run(timeout=LONG)
    before, after = held
    assert before[:2] == after[:2]
    assert after[2] <= before[2] + 8  # the allocators' own


@pytest.mark.parametrize("kind", ["shared", "huge pages", "locked"])
def test_memory_is_cleared_whatever_it_is_made_of(kind: str) -> None:
    with GuestMemory(4 * MiB, hugepages=kind == "huge pages") as memory:
        if kind == "locked":
            memory.lock()
        for gpa in (0, 2 * MiB, 4 * MiB - 4096):
            memory.write(gpa, b"mark")
        memory.clear()
        assert memory.read(0, memory.size) == bytes(memory.size)
        memory.write(0, b"again")
        assert memory.read(0, 5) == b"again"


# --- disks ------------------------------------------------------------------------------------------------------

DRIVER_THAT_RESETS = guest(IOAPIC).replace(
    "outb %al, $KVMPY_PORT_EXIT", "movb $0xfe, %al ; outb %al, $0x64 ; 9: jmp 9b", 1
)
LINES = "0\n0\n0\n"
"""What the driver prints of a disk that works."""


def test_a_disk_works_in_each_boot_and_no_other_process_gets_between(make_disk_pc: MakePc) -> None:
    """The device is reset with the board: its driver finds it as it was in the beginning (virtio 1.2 §2.4)."""
    refused = []

    def on_restart(result: RunResult) -> None:
        with pytest.raises(LeaseError) as error:
            open_disk(pc.spec.disks[0].path, format="raw")
        refused.append(error)
        if len(refused) == 3:
            pc.stop()

    pc = make_disk_pc(1, code=DRIVER_THAT_RESETS, on_reboot=RESTART, on_restart=on_restart)
    result = pc.run(timeout=LONG)
    assert (result.debugcon, len(refused)) == (3 * LINES, 3)
    counters = result.disks[0].counters
    assert (counters.reads, counters.writes, counters.flushes, counters.errors) == (3, 3, 3, 0)

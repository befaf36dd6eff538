"""The entropy device and the virtio console of a running PC, driven by real guests that wait for interrupts."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from virtio_guests import (
    BUFFER,
    ECHO,
    EMERGENCY,
    PRINT_AND_FINISH,
    PRINT_AND_WAIT,
    REBOOT_UNTIL_Q,
    console_guest,
    rng_guest,
)

from kvmpy import Disk, MachineSpec
from kvmpy._shim import lib
from kvmpy.machine import layout
from kvmpy.machine.bus import Mode
from kvmpy.pc import Announcement, Pc
from kvmpy.pc.spec import Console, OnReboot

pytestmark = pytest.mark.kvm

MakePc = Callable[..., Pc]
FIRST, SECOND = layout.virtio_windows(2)
DSDT_NAME = b"LNRO0005"


def captured(pc: Pc) -> bytes:
    """Return what the guest printed on its virtio console."""
    return pc.captures[-1].data


# --- entropy ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize("mode", Mode)
def test_guest_gets_random_bytes(make_pc: MakePc, mode: Mode, cores: int) -> None:
    """virtio 1.2 §3.1, §5.4: found, started, asked, and interrupted, whoever answers its registers."""
    drawn = set()
    for _ in range(2):
        pc = make_pc(rng_guest(*FIRST), "long", rng=True, cores=cores, device_modes={"rng": mode})
        result = pc.run(timeout=20.0)
        assert (result.debugcon, result.status) == ("", 0)
        drawn.add(pc.memory.read(BUFFER, 64))
        assert pc.memory.read(BUFFER + 64, 64) == bytes(64)
        assert [use.name for use in result.ranges if use.name == "rng" and use.reads and use.writes]
    assert len(drawn) == 2


def test_guest_without_one_finds_none(make_pc: MakePc) -> None:
    """Off by default: windows and interrupts of the disks are where they were."""
    assert make_pc(rng_guest(*FIRST), "long").run(timeout=20.0).debugcon == "X"


# --- console ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", Mode)
def test_what_the_guest_prints_reaches_the_sink(make_pc: MakePc, mode: Mode) -> None:
    printed: list[bytes] = []
    code = console_guest(*FIRST, PRINT_AND_WAIT, "hello, world")
    modes = {"console": mode}
    pc = make_pc(code, "long", console=Console.VIRTIO, virtio_console=printed.append, device_modes=modes)
    assert pc.run(timeout=20.0).status == 0
    assert b"".join(printed) == captured(pc) == b"hello, world"


def test_last_words_are_printed(make_pc: MakePc) -> None:
    """A guest that ends itself before its buffer has come back: no thread need have looked at it yet."""
    for _ in range(5):
        pc = make_pc(console_guest(*FIRST, PRINT_AND_FINISH, "last words"), "long", console=Console.VIRTIO)
        assert pc.run(timeout=20.0).status == 0
        assert captured(pc) == b"last words"


def test_emergency_write_is_printed(make_pc: MakePc) -> None:
    pc = make_pc(console_guest(*FIRST, EMERGENCY), "long", console=Console.VIRTIO)
    pc.run(timeout=20.0)
    assert captured(pc) == b"!"


def test_input_reaches_the_guest(make_pc: MakePc) -> None:
    """What is there before it starts, and what comes while it halts."""

    def heard(data: bytes) -> None:
        if data.endswith(b"b"):
            pc.console.feed(b"cdq")

    pc = make_pc(console_guest(*FIRST, ECHO), "long", console=Console.VIRTIO, debugcon=heard)
    pc.console.feed(b"ab")
    assert pc.run(timeout=20.0).debugcon == "abcdq"
    assert pc.console.pending == 0


def test_console_is_the_serial_port_unless_another_is_wanted(make_pc: MakePc) -> None:
    """Whoever types needs not know which it is."""
    pc = make_pc("hlt")
    assert pc.console is pc.serial
    pc = make_pc("hlt", console=Console.VIRTIO)
    assert pc.console is not pc.serial
    pc.console.feed(b"abc")
    assert (pc.console.pending, pc.serial.pending) == (3, 0)


def test_console_is_told_the_size_of_the_terminal(make_pc: MakePc) -> None:
    """virtio 1.2 §5.3.4, cols; a serial port has no size to tell."""
    body = "movzwl CONFIG(%rdi), %eax ; outb %al, $KVMPY_PORT_CONSOLE"
    pc = make_pc(console_guest(*FIRST, body), "long", console=Console.VIRTIO)
    pc.resize_console(ord("x"), 50)
    assert pc.run(timeout=20.0).debugcon == "x"
    make_pc("hlt").resize_console(100, 50)


def test_input_that_waits_survives_a_reboot(make_pc: MakePc) -> None:
    """Each boot takes one byte; the line to the user is the same."""
    code = console_guest(*FIRST, REBOOT_UNTIL_Q)
    pc = make_pc(code, "long", console=Console.VIRTIO, rng=False, on_reboot=OnReboot.RESTART)
    pc.console.feed(b"abcq")
    result = pc.run(timeout=30.0)
    assert (result.debugcon, result.status, result.restarts) == ("abcq", 0, 3)


# --- places -----------------------------------------------------------------------------------------------------


@pytest.fixture
def spec(disk_images: Callable[[int], list[Path]]) -> Callable[..., MachineSpec]:
    """Return a function that describes a machine with a disk, an entropy device and a console."""

    def spec(count: int = 1, **options: object) -> MachineSpec:
        disks = [Disk(path, format="raw") for path in disk_images(count)]
        return MachineSpec("guest", disks=disks, rng=True, console=Console.VIRTIO, **options)  # type: ignore[arg-type]

    return spec


def test_disks_come_first_then_the_rng_then_the_console(spec: Callable[..., MachineSpec]) -> None:
    """So no disk is found elsewhere because of the others."""
    machine = spec(2)
    windows = layout.virtio_windows(4)
    assert machine.virtio_windows == windows
    assert machine.disk_windows == windows[:2]
    assert (machine.rng_window, machine.console_window) == windows[2:]
    alone = MachineSpec("guest", console=Console.VIRTIO)
    assert (alone.rng_window, alone.console_window) == (None, windows[0])


def test_sixteen_in_all_and_no_more(spec: Callable[..., MachineSpec]) -> None:
    assert len(spec(14).virtio_windows) == 16
    with pytest.raises(ValueError, match="17 virtio devices"):
        spec(15)


@pytest.mark.parametrize("virtio", Announcement)
def test_linux_is_told_of_all_and_the_parameter_page_of_disks_alone(
    make_pc: MakePc, disk_images: Callable[[int], list[Path]], virtio: Announcement
) -> None:
    """A guest that looks for disks on that page must not find a console there."""
    disks = [Disk(path, format="raw") for path in disk_images(1)]
    pc = make_pc("hlt", disks=disks, rng=True, console=Console.VIRTIO, virtio=virtio)
    page = pc.memory.read(layout.PARAMETER_PAGE, 4096)
    assert int.from_bytes(page[lib.KVMPY_PARAMS_OFF_VIRTIO_COUNT :][:4], "little") == 1
    assert list(page[lib.KVMPY_PARAMS_OFF_VIRTIO_GSI :][:3]) == [5, 0, 0]
    tables = pc.memory.read(layout.ACPI_TABLES, layout.ACPI_TABLES_SIZE)
    assert tables.count(DSDT_NAME) == (3 if virtio is Announcement.ACPI else 0)
    assert len(layout.virtio_cmdline(pc.spec.virtio_windows)) == 3


def test_all_three_serve_one_after_the_other(make_pc: MakePc, disk_images: Callable[[int], list[Path]]) -> None:
    """The console behind a disk and an rng, by its own pin."""
    window = layout.virtio_windows(3)[2]
    disks = [Disk(path, format="raw") for path in disk_images(1)]
    code = console_guest(*window, PRINT_AND_WAIT, "third")
    pc = make_pc(code, "long", disks=disks, rng=True, console=Console.VIRTIO)
    assert pc.run(timeout=20.0).status == 0
    assert captured(pc) == b"third"


def test_queues_end_with_the_run_and_all_threads_with_the_pc(make_pc: MakePc) -> None:
    """Guest memory stays as it is from the end on: whoever looks at it finds what the guest left."""
    before = threading.active_count()
    pc = make_pc(console_guest(*SECOND, PRINT_AND_WAIT, "x"), "long", rng=True, console=Console.VIRTIO)
    pc.run(timeout=20.0)
    assert not [thread.name for thread in threading.enumerate() if "queue" in thread.name]
    pc.close()
    assert threading.active_count() == before

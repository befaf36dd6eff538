"""Nothing that a guest does raises out of a device, and nothing that it does makes one grow."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rtc_bench import cmos_at

from kvmpy.devices.debug import Constant, Counter, DebugConsole, ExitPort, Sink
from kvmpy.devices.output import SerialOutput
from kvmpy.devices.power import ControlBlock, EventBlock
from kvmpy.devices.reset import KeyboardController, ResetControl, SystemControlA
from kvmpy.devices.serial import FIFO_SIZE, Uart16550


def nothing(*_):
    """Take what a device tells its board."""


RING = SerialOutput(16)
# Each with the size of its range, and how to make a fresh one.
DEVICES = {
    "uart": (8, lambda: Uart16550(RING, nothing)),
    "console": (1, lambda: DebugConsole(RING)),
    "exit": (4, lambda: ExitPort(nothing)),
    "constant": (8, lambda: Constant(0x1234, size=8)),
    "sink": (8, lambda: Sink(8)),
    "counter": (8, lambda: Counter(8)),
    "cmos": (2, lambda: cmos_at(0)),
    "keyboard data": (1, lambda: KeyboardController(nothing).data),
    "keyboard command": (1, lambda: KeyboardController(nothing).command),
    "port 0x92": (1, lambda: SystemControlA(nothing)),
    "reset control": (4, lambda: ResetControl(nothing)),
    "acpi event": (4, EventBlock),
    "acpi control": (2, lambda: ControlBlock(nothing)),
}

accesses = st.lists(
    st.tuples(st.integers(0, 7), st.sampled_from([1, 2, 4, 8]), st.none() | st.binary(min_size=8, max_size=8)),
    max_size=80,
)


@pytest.mark.parametrize("name", DEVICES)
@settings(deadline=None, max_examples=60)
@given(accesses=accesses)
def test_any_sequence_of_accesses_is_survived(name, accesses):
    """A read returns exactly the bytes asked for; no access raises, wherever and however wide."""
    size, make = DEVICES[name]
    device = make()
    for offset, width, data in accesses:
        if data is None:
            assert len(device.read(offset % size, width)) == width
        else:
            device.write(offset % size, data[:width])


@settings(deadline=None, max_examples=150)
@given(st.lists(st.tuples(st.integers(0, 127), st.integers(0, 255)), max_size=60), st.floats(0, 2**33))
def test_any_cmos_contents_still_tell_a_time(writes, now):
    """No byte in a time register, in any format, makes the clock fail."""
    cmos = cmos_at(now)
    for register, value in writes:
        cmos.write(0, bytes([register, value]))
    for register in range(128):
        cmos.write(0, bytes([register]))
        assert len(cmos.read(1, 1)) == 1


def test_a_guest_that_prints_to_nobody_costs_no_memory():
    """A full ring and a guest that writes on: 16 bytes wait, the rest is counted."""
    with SerialOutput(16) as output:
        uart = Uart16550(output, nothing)
        console = DebugConsole(output)
        uart.write(2, b"\x01")
        for _ in range(1000):
            uart.write(0, b"x")
            console.write(0, b"y")
        assert uart.lost + console.lost == 2000 - 16 - FIFO_SIZE
        assert len(output.drain()) == 16
        assert len(output.drain()) <= 16


def test_a_guest_that_talks_to_itself_costs_no_memory():
    """Loopback fills 16 bytes of FIFO and no more."""
    uart = Uart16550(RING, nothing)
    uart.write(2, b"\x01")
    uart.write(4, b"\x10")
    for _ in range(1000):
        uart.write(0, b"x")
    assert uart.pending == FIFO_SIZE

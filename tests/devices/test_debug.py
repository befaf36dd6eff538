"""The debug ports and the twins of the C actions."""

import pytest

from kvmpy.devices.debug import Constant, Counter, DebugConsole, ExitPort, Sink, exit_status, qemu_exit_status
from kvmpy.devices.output import SerialOutput


@pytest.fixture
def output():
    with SerialOutput(8) as output:
        yield output


def test_console_prints_each_byte(output):
    """Port 0xe9: what is written is printed."""
    console = DebugConsole(output)
    console.write(0, b"H")
    console.write(0, b"ello")
    assert output.drain() == b"Hello"


def test_console_says_that_it_is_there(output):
    """The convention of Bochs: a read of port 0xe9 gives 0xe9."""
    assert DebugConsole(output).read(0, 1) == b"\xe9"
    assert DebugConsole(output).read(0, 4) == b"\xe9" * 4


def test_console_counts_what_a_full_ring_lost(output):
    """There is no flow control: bytes beyond the ring are gone, and counted."""
    console = DebugConsole(output)
    for byte in b"0123456789":
        console.write(0, bytes([byte]))
    assert console.lost == 2
    assert output.drain() == b"01234567"


@pytest.mark.parametrize(
    ("data", "value"), [(b"\x00", 0), (b"\x7f", 0x7F), (b"\x34\x12", 0x1234), (b"\x78\x56\x34\x12", 0x12345678)]
)
def test_exit_port_hands_over_the_whole_value(data, value):
    """isa-debug-exit: 8, 16 and 32 bits, little-endian, at any of its ports."""
    values = []
    port = ExitPort(values.append)
    port.write(0, data)
    assert values == [value]
    assert port.read(0, len(data)) == bytes(len(data))


def test_exit_statuses_of_both_conventions():
    """v & 0x7f here; (v << 1) | 1, in eight bits, at QEMU."""
    assert [exit_status(v) for v in (0, 1, 0x7F, 0x80, 0x1FF)] == [0, 1, 0x7F, 0, 0x7F]
    assert [qemu_exit_status(v) for v in (0, 1, 0x10, 0x7F, 0x80, 0xFF)] == [1, 3, 0x21, 0xFF, 1, 0xFF]


def test_constant_gives_the_low_bytes_of_its_value():
    """CONSTANT: the low bytes of the value at every offset; writes change nothing."""
    constant = Constant(0x1122334455667788, size=8)
    constant.write(0, b"\0\0\0\0")
    assert constant.read(0, 8) == bytes.fromhex("8877665544332211")
    assert constant.read(4, 2) == b"\x88\x77"


def test_sink_takes_everything_and_reads_as_nothing():
    """SINK: writes are thrown away; reads are all ones, as from nowhere."""
    sink = Sink(4)
    sink.write(0, b"1234")
    assert sink.read(0, 4) == b"\xff" * 4


def test_counter_counts_writes_not_bytes():
    """COUNT: one for each element, whatever its size; a read gives the low bytes."""
    counter = Counter(8)
    for data in (b"1", b"12", b"1234"):
        counter.write(0, data)
    assert counter.value == 3
    assert counter.read(0, 4) == b"\x03\0\0\0"


def test_counter_wraps():
    """The counter is 64 bits, as C's."""
    counter = Counter()
    counter.fast_ranges()[0].value = (1 << 64) - 1
    counter.write(0, b"1")
    assert counter.value == 0

"""C against Python: the same accesses through the run loop's exit handler and through the bus, compared to the byte.

No KVM: the test writes ``struct kvm_run`` itself, as the kernel would, and calls what the run loop calls.
"""

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from rtc_bench import cmos_at

from kvmpy._shim import ffi, lib
from kvmpy.devices.debug import Constant, Counter, DebugConsole, ExitPort, Sink
from kvmpy.devices.output import SerialOutput
from kvmpy.devices.power import EventBlock
from kvmpy.devices.serial import Uart16550
from kvmpy.kvm.ranges import RangeTable, Space
from kvmpy.machine.bus import Bus

CMOS, CONSTANT, SINK, COUNTER = 0x70, 0x200, 0x208, 0x210
UART, CONSOLE, EXIT = lib.KVMPY_PORT_SERIAL, lib.KVMPY_PORT_CONSOLE, lib.KVMPY_PORT_EXIT
MMIO = 0xD000_0000
PAGE = 4096


class Board:
    """A set of devices on two buses; every access goes to the bus."""

    def __init__(self):
        self.exits, self.pin = [], []
        self._values = []
        # Small rings: most sequences see them full.
        self.serial, self.debugcon = SerialOutput(8), SerialOutput(8)
        self.uart = Uart16550(self.serial, self.pin.append)
        self.console = DebugConsole(self.debugcon)
        self.counters = Counter(8), Counter(16)
        self.buses = {Space.PIO: Bus("pio", 1 << 16), Space.MMIO: Bus("mmio", 1 << 52)}
        pio, mmio = self.buses.values()
        pio.attach(UART, 8, self.uart, name="serial")
        pio.attach(CONSOLE, 1, self.console, name="debugcon")
        pio.attach(EXIT, 4, ExitPort(self._values.append), name="exit")
        pio.attach(CMOS, 2, cmos_at(1_000_000_000), name="cmos")
        pio.attach(lib.KVMPY_PORT_ACPI_EVENT, 4, EventBlock(), name="acpi event")
        pio.attach(CONSTANT, 4, Constant(0xCAFEBABE, size=4), name="constant")
        pio.attach(SINK, 4, Sink(4), name="sink")
        pio.attach(COUNTER, 8, self.counters[0], name="counter")
        mmio.attach(MMIO, 8, Constant(0x0123_4567_89AB_CDEF, size=8), name="mmio constant")
        mmio.attach(MMIO + 8, 16, self.counters[1], name="mmio counter")
        mmio.attach(MMIO + 32, 8, Sink(8), name="mmio sink")

    def access(self, space, address, elements, *, is_write):
        """Do one exit's worth of accesses and return what a read gave."""
        reply = self._through_bus(space, address, elements, is_write)
        self._take_exit()
        return reply

    def _through_bus(self, space, address, elements, is_write):
        bus = self.buses[space]
        if is_write:
            for element in elements:
                bus.write(address, element)
            return b""
        return b"".join(bus.read(address, len(element)) for element in elements)

    def _take_exit(self):
        # The first value ends a run: the elements of a string instruction after it are nobody's.
        self.exits += self._values[:1]
        self._values.clear()

    def counts(self):
        """Return (reads, writes) of each device, by name, wherever they were counted."""
        return {owner.name: (owner.reads, owner.writes) for bus in self.buses.values() for owner in bus}

    def state(self):
        return {
            "exits": self.exits,
            "pin": self.pin,
            "lost": (self.uart.lost, self.console.lost),
            "pending": self.uart.pending,
            "counters": [counter.value for counter in self.counters],
            "counts": self.counts(),
            "unmapped": [(bus.unmapped_reads, bus.unmapped_writes) for bus in self.buses.values()],
        }

    def close(self):
        self.serial.close()
        self.debugcon.close()


class FastBoard(Board):
    """The same devices, with C asked first, as the run loop asks it."""

    def __init__(self, flags=0):
        super().__init__()
        rows = [
            (space, owner, fast)
            for space, bus in self.buses.items()
            for owner in bus
            if hasattr(owner.device, "fast_ranges")
            for fast in owner.device.fast_ranges()
        ]
        self._table = RangeTable((space, owner.base, fast) for space, owner, fast in rows)
        owners = {id(fast): owner for _, owner, fast in rows}
        self._owners = [owners[id(fast)] for fast in self._table.ranges]
        self._page = ffi.new("char[]", 2 * PAGE)
        self._run = ffi.cast("struct kvm_run *", self._page)
        self._counts = ffi.new("struct kvmpy_range_count[]", self._table.length)
        self._loop = ffi.new("struct kvmpy_loop *")
        self._loop.run = self._run
        self._loop.ranges, self._loop.nr_ranges = self._table.pointer, self._table.length
        self._loop.counts = self._counts
        self._loop.flags = flags
        self.answered_in_c = 0

    def access(self, space, address, elements, *, is_write):
        data = self._describe(space, address, elements, is_write)
        stop = lib.kvmpy_handle_exit(self._loop)
        if stop in (lib.KVMPY_STOP_EXIT, lib.KVMPY_STOP_OUT):
            exit = self._loop.exit
            assert (exit.address, exit.count, exit.size) == (address, len(elements), len(elements[0]))
            return super().access(space, exit.address, elements, is_write=bool(exit.is_write))
        self.answered_in_c += 1
        if stop == lib.KVMPY_STOP_EXIT_PORT:
            self.exits.append(self._loop.exit.data)
        else:
            assert stop == -1
        return b"" if is_write else bytes(data)

    def _describe(self, space, address, elements, is_write):
        """Fill the run page as KVM does, and return where the data are."""
        run, size = self._run, len(elements[0])
        if space is Space.PIO:
            run.exit_reason = lib.KVM_EXIT_IO
            run.io.direction = lib.KVM_EXIT_IO_OUT if is_write else lib.KVM_EXIT_IO_IN
            run.io.size, run.io.port, run.io.count, run.io.data_offset = size, address, len(elements), PAGE
            data = ffi.buffer(self._page + PAGE, size * len(elements))
        else:
            run.exit_reason = lib.KVM_EXIT_MMIO
            run.mmio.phys_addr, run.mmio.len, run.mmio.is_write = address, size, is_write
            data = ffi.buffer(run.mmio.data, size)
        data[:] = b"".join(elements) if is_write else b"\x5a" * len(data)
        return data

    def counts(self):
        total = super().counts()
        for owner, count in zip(self._owners, self._counts, strict=True):
            reads, writes = total[owner.name]
            total[owner.name] = reads + count.reads, writes + count.writes
        return total


def step(board, action):
    """Do ``action`` on ``board`` and return what can be seen of it."""
    name, *arguments = action
    if name == "feed":
        board.uart.feed(*arguments)
        return None
    if name == "drain":
        return board.serial.drain(), board.debugcon.drain()
    space, address, elements, is_write = arguments
    return board.access(space, address, elements, is_write=is_write)


def elements(sizes, counts):
    return st.tuples(st.sampled_from(sizes), counts).flatmap(
        lambda shape: st.lists(st.binary(min_size=shape[0], max_size=shape[0]), min_size=shape[1], max_size=shape[1])
    )


def accesses(space, addresses, sizes, counts):
    return st.tuples(
        st.just("access"), st.just(space), st.sampled_from(addresses), elements(sizes, counts), st.booleans()
    )


# What drivers write: divisor latch and back, interrupts, FIFOs, loopback and back.
UART_SETTINGS = [
    (1, 0),
    (1, 1),
    (1, 2),
    (1, 0xF),
    (2, 0),
    (2, 1),
    (2, 7),
    (2, 0xC7),
    (3, 3),
    (3, 0x83),
    (4, 0xB),
    (4, 0x1B),
]
settings_of_the_uart = st.sampled_from(UART_SETTINGS).map(
    lambda pair: ("access", Space.PIO, UART + pair[0], [bytes([pair[1]])], True)
)
ports = [*range(UART - 1, UART + 9), CONSOLE - 1, CONSOLE, CONSOLE + 1, *range(EXIT - 1, EXIT + 5)]
ports += [CMOS, CMOS + 1, lib.KVMPY_PORT_ACPI_EVENT, lib.KVMPY_PORT_ACPI_EVENT + 2, 0x80]
ports += [CONSTANT, CONSTANT + 2, SINK, SINK + 3, COUNTER, COUNTER + 4, COUNTER + 7]
# Most of the traffic is what C answers.
usual = [UART, UART, UART + 5, UART + 5, CONSOLE, COUNTER]
actions = st.one_of(
    accesses(Space.PIO, usual, [1], st.integers(1, 4)),
    accesses(Space.PIO, usual, [1], st.just(1)),
    accesses(Space.PIO, ports, [1, 2, 4], st.integers(1, 5)),
    accesses(Space.MMIO, range(MMIO - 4, MMIO + 40, 2), [1, 2, 4, 8], st.just(1)),
    settings_of_the_uart,
    st.tuples(st.just("feed"), st.binary(max_size=20)),
    st.just(("drain",)),
)


@pytest.mark.parametrize("flags", [0, lib.KVMPY_LOOP_TO_PYTHON], ids=["c", "trace"])
@settings(deadline=None, max_examples=250)
@given(actions=st.lists(actions, max_size=50))
def test_c_and_python_answer_alike(flags, actions):
    """Replies, output, interrupts, exit values and counts are the same whether C or Python answers."""
    python, fast = Board(), FastBoard(flags)
    try:
        for action in actions:
            assert step(fast, action) == step(python, action), action
            assert fast.state() == python.state(), action
        assert step(fast, ("drain",)) == step(python, ("drain",))
    finally:
        python.close()
        fast.close()
    event(f"in C: {'some' if fast.answered_in_c else 'none'}")
    assert not (flags and fast.answered_in_c)


@pytest.fixture
def fast():
    board = FastBoard()
    yield board
    board.close()


def out(board, port, *elements):
    return board.access(Space.PIO, port, list(elements), is_write=True)


def inp(board, port, size=1, count=1):
    return board.access(Space.PIO, port, [bytes(size)] * count, is_write=False)


def test_printing_needs_no_python(fast):
    """Console bytes, UART bytes and the wait for THRE are answered in C: no device method runs."""
    for byte in (b"H", b"i"):
        out(fast, CONSOLE, byte)
        assert inp(fast, UART + 5) == b"\x60"
        out(fast, UART, byte)
    assert inp(fast, CONSOLE) == b"\xe9"
    assert fast.answered_in_c == 7
    assert step(fast, ("drain",)) == (b"Hi", b"Hi")
    assert fast.counts()["debugcon"] == (1, 2)


def test_string_output_is_answered_in_c_element_by_element(fast):
    """KVM_EXIT_IO with count > 1: every element reaches the ring, in order, and is counted."""
    out(fast, UART, *(bytes([byte]) for byte in b"string"))
    assert fast.answered_in_c == 1
    assert step(fast, ("drain",))[0] == b"string"
    assert fast.counts()["serial"] == (0, 6)


def test_string_that_does_not_fit_comes_to_python_whole(fast):
    """The ring takes a string whole or not at all; then the device sends what fits and keeps the next byte."""
    out(fast, UART, *(bytes([byte]) for byte in b"0123456789"))
    assert fast.answered_in_c == 0
    assert inp(fast, UART + 5) == b"\x00"
    assert fast.answered_in_c == 1
    assert fast.uart.lost == 1
    assert step(fast, ("drain",))[0] == b"01234567"
    assert step(fast, ("drain",))[0] == b"8"


def test_exit_port_stops_the_loop_with_its_value(fast):
    """KVMPY_STOP_EXIT_PORT: the value is in exit.data, at the width that the guest used."""
    out(fast, EXIT, b"\x2a")
    out(fast, EXIT, b"\x34\x12")
    out(fast, EXIT, b"\x78\x56\x34\x12")
    out(fast, EXIT, b"\x01", b"\x02")
    assert fast.exits == [0x2A, 0x1234, 0x12345678, 1]
    assert fast.answered_in_c == 4


def test_feeding_from_another_thread_is_seen_at_the_next_exit(fast):
    """A driver that polls LSR in C sees DR once the host feeds a byte."""
    assert inp(fast, UART + 5) == b"\x60"
    assert fast.answered_in_c == 1
    fast.uart.feed(b"k")
    assert inp(fast, UART + 5) == b"\x61"
    assert inp(fast, UART + 5, count=3) == b"\x61" * 3
    assert inp(fast, UART) == b"k"
    assert inp(fast, UART + 5) == b"\x60"
    assert fast.answered_in_c == 3


def test_mmio_is_another_space(fast):
    """A port and a guest physical address of the same number are two things."""
    assert fast.access(Space.MMIO, CONSOLE, [b"x"], is_write=False) == b"\xff"
    assert fast.access(Space.MMIO, MMIO, [bytes(8)], is_write=False) == bytes.fromhex("efcdab8967452301")
    assert fast.access(Space.MMIO, MMIO + 32, [bytes(8)], is_write=False) == b"\xff" * 8
    assert fast.answered_in_c == 2

"""The 16550A, register by register, from the PC16550D datasheet."""

import threading

import pytest

from kvmpy._shim import lib
from kvmpy.devices.output import SerialOutput
from kvmpy.devices.serial import FIFO_SIZE, Uart16550
from kvmpy.machine.bus import Action

RBR = THR = DLL = 0
IER = DLM = 1
IIR = FCR = 2
LCR, MCR, LSR, MSR, SCR = 3, 4, 5, 6, 7

DR, OE, THRE, TEMT = 0x01, 0x02, 0x20, 0x40
IDLE = THRE | TEMT
RDI, THRI, RLSI, MSI = 1, 2, 4, 8
NO_INT, IS_MODEM, IS_THRE, IS_DATA, IS_LINE, IS_TIMEOUT = 0x01, 0x00, 0x02, 0x04, 0x06, 0x0C
FIFOS = 0xC0
ENABLE_FIFO, CLEAR_RECEIVE, CLEAR_TRANSMIT = 1, 2, 4
TRIGGER_4, TRIGGER_8, TRIGGER_14 = 0x40, 0x80, 0xC0
DTR, RTS, OUT1, OUT2, LOOP = 1, 2, 4, 8, 16
DLAB = 0x80


class Port:
    """A UART with a ring of 32 bytes and a record of its interrupt pin."""

    def __init__(self):
        self.output = SerialOutput(32)
        self.pin = []
        self.uart = Uart16550(self.output, self.pin.append)
        self.thr, self.lsr = self.uart.fast_ranges()

    def get(self, register):
        (value,) = self.uart.read(register, 1)
        return value

    def put(self, register, value):
        self.uart.write(register, bytes([value]))

    def edges(self):
        """Return the changes of the pin since the last call."""
        edges, self.pin[:] = list(self.pin), []
        return edges

    def receive_all(self):
        """Read like a polling driver: while DR is set."""
        received = bytearray()
        while self.get(LSR) & DR:
            received.append(self.get(RBR))
        return bytes(received)


@pytest.fixture
def port():
    port = Port()
    yield port
    port.output.close()


# --- registers ---


def test_reset_state(port):
    """Table "UART Reset Configuration": interrupts off, FIFOs off, transmitter empty, no modem deltas."""
    assert [port.get(r) for r in (IER, IIR, LCR, MCR, LSR)] == [0, NO_INT, 0, 0, IDLE]
    assert port.get(MSR) & 0x0F == 0
    assert port.edges() == []


def test_divisor_latch_hides_two_registers(port):
    """DLAB selects the divisor latch at offsets 0 and 1, and only there."""
    port.put(IER, RDI)
    port.put(LCR, DLAB | 3)
    port.put(DLL, 0x34)
    port.put(DLM, 0x12)
    assert [port.get(DLL), port.get(DLM)] == [0x34, 0x12]
    assert port.get(LCR) == DLAB | 3
    assert port.get(LSR) == IDLE
    port.put(LCR, 3)
    assert port.get(IER) == RDI
    assert port.output.drain() == b""


def test_reserved_bits_read_as_zero(port):
    """IER bits 4 to 7 and MCR bits 5 to 7 are always 0."""
    port.put(IER, 0xFF)
    port.put(MCR, 0xFF)
    port.put(LCR, 0x7F)
    assert [port.get(IER), port.get(MCR), port.get(LCR)] == [0x0F, 0x1F, 0x7F]


def test_scratch_register_keeps_a_byte(port):
    """SCR does not control the UART in any way."""
    port.put(SCR, 0xA5)
    assert port.get(SCR) == 0xA5


def test_status_registers_cannot_be_written(port):
    """LSR and MSR are for reading."""
    modem = port.get(MSR)
    port.put(LSR, 0xFF)
    port.put(MSR, 0xFF)
    assert [port.get(LSR), port.get(MSR)] == [IDLE, modem]


def test_wide_access_reaches_neighbours(port):
    """A 16-bit access is two registers, low one first."""
    port.uart.write(LCR, bytes([0x03, DTR | RTS]))
    assert port.uart.read(LCR, 4) == bytes([0x03, DTR | RTS, IDLE, port.get(MSR)])


def test_fifo_bits_of_iir_tell_a_16550a(port):
    """IIR bits 6 and 7 are set when FCR bit 0 is; other FCR bits without bit 0 are not programmed."""
    port.put(FCR, TRIGGER_14 | CLEAR_RECEIVE)
    assert port.get(IIR) == NO_INT
    port.put(FCR, ENABLE_FIFO | TRIGGER_14)
    assert port.get(IIR) == FIFOS | NO_INT
    port.put(FCR, 0)
    assert port.get(IIR) == NO_INT


# --- sending ---


def test_bytes_are_sent_in_order(port):
    """THR to the line; LSR says empty again at once, as the line has no speed."""
    for byte in b"Hello":
        assert port.get(LSR) == IDLE
        port.put(THR, byte)
    assert port.output.drain() == b"Hello"


def test_transmit_interrupt_when_it_is_enabled_and_after_each_byte(port):
    """IER bit 1 rising with an empty THR interrupts; so does each THR that empties."""
    port.put(MCR, OUT2)
    port.put(IER, THRI)
    assert port.edges() == [True]
    assert port.get(IIR) == IS_THRE
    assert port.edges() == [False]
    assert port.get(IIR) == NO_INT
    port.put(THR, 0x41)
    assert port.edges() == [True]
    assert port.get(IIR) == IS_THRE


def test_writing_thr_is_a_new_edge_though_iir_was_not_read(port):
    """ "Interrupt Control Functions": THRE is reset by reading IIR or writing THR; a PIC must see it rise again."""
    port.put(MCR, OUT2)
    port.put(IER, THRI)
    port.edges()
    port.put(THR, 0x41)
    assert port.edges() == [False, True]


def test_transmit_interrupt_is_withdrawn_with_its_enable(port):
    """Disabling THRI lowers the pin; enabling it again interrupts again."""
    port.put(MCR, OUT2)
    for _ in range(2):
        port.put(IER, THRI)
        assert port.edges() == [True]
        port.put(IER, 0)
        assert port.edges() == [False]
        assert port.get(IIR) == NO_INT


def test_enabling_again_what_is_enabled_does_not_interrupt(port):
    """Only the rise of IER bit 1 interrupts."""
    port.put(IER, THRI)
    assert port.get(IIR) == IS_THRE
    port.put(IER, THRI | RDI)
    assert port.get(IIR) == NO_INT


# --- sending to a slow reader ---


def fill(port):
    assert port.output.push(b"." * 32)


def test_full_output_clears_thre_until_the_reader_takes_bytes(port):
    """A driver that asks LSR before each byte loses nothing, however slow the reader is."""
    fill(port)
    port.put(THR, 0x41)
    assert port.get(LSR) == 0
    assert port.output.drain() == b"." * 32
    assert port.get(LSR) == IDLE
    assert port.output.drain() == b"A"
    assert port.uart.lost == 0


def test_write_without_asking_is_lost_and_counted(port):
    """THR holds one byte without FIFO: what is written on top is gone."""
    fill(port)
    port.put(THR, 0x41)
    port.put(THR, 0x42)
    assert port.uart.lost == 1
    port.output.drain()
    assert port.output.drain() == b"A"


def test_transmit_fifo_holds_sixteen(port):
    """FIFO mode: after THRE, 16 bytes may be written without asking again."""
    port.put(FCR, ENABLE_FIFO)
    fill(port)
    for byte in range(FIFO_SIZE + 1):
        port.put(THR, byte)
    assert port.uart.lost == 1
    port.output.drain()
    assert port.output.drain() == bytes(range(FIFO_SIZE))


def test_sleeping_driver_is_woken_when_there_is_room(port):
    """THRE interrupts when the waiting bytes have gone, though the guest touches no register meanwhile."""
    port.put(MCR, OUT2)
    port.put(IER, THRI)
    port.get(IIR)
    fill(port)
    port.put(THR, 0x41)
    port.edges()
    port.output.drain()
    assert port.edges() == [True]
    assert port.get(IIR) == IS_THRE
    assert port.output.drain() == b"A"


def test_transmit_interrupt_waits_for_the_byte_that_waits(port):
    """Enabling THRI interrupts at once only when THR is empty."""
    fill(port)
    port.put(THR, 0x41)
    port.put(IER, THRI)
    assert port.get(IIR) == NO_INT
    port.output.drain()
    assert port.get(IIR) == IS_THRE


def test_reader_that_takes_bytes_does_not_interrupt(port):
    """Room in the ring is no event for a driver whose transmitter was empty all along."""
    port.put(MCR, OUT2)
    port.put(IER, THRI)
    port.put(THR, 0x41)
    port.get(IIR)
    port.edges()
    port.output.drain()
    assert port.edges() == []
    assert port.get(IIR) == NO_INT


def test_clearing_the_transmit_fifo_drops_what_waits(port):
    """FCR bit 2 clears all bytes in the transmit FIFO."""
    port.put(FCR, ENABLE_FIFO)
    fill(port)
    port.put(THR, 0x41)
    port.put(FCR, ENABLE_FIFO | CLEAR_TRANSMIT)
    assert port.get(LSR) == IDLE
    assert port.uart.lost == 1
    port.output.drain()
    assert port.output.drain() == b""


# --- receiving ---


def test_polling_driver_receives_all(port):
    """Host input never overruns: DR stays until the last byte was read."""
    data = bytes(range(200))
    port.uart.feed(data)
    assert port.uart.pending == 200
    assert port.receive_all() == data
    assert port.uart.pending == 0
    assert port.get(LSR) == IDLE
    assert port.get(RBR) == 0


def test_reading_without_asking_receives_too(port):
    """RBR holds the byte whether LSR was read or not."""
    port.uart.feed(b"ab")
    assert [port.get(RBR), port.get(RBR), port.get(RBR)] == [ord("a"), ord("b"), 0]


def test_fifo_driver_receives_all(port):
    """The same with the FIFO on."""
    port.put(FCR, ENABLE_FIFO | TRIGGER_14)
    port.uart.feed(bytes(range(200)))
    assert port.receive_all() == bytes(range(200))


def test_each_byte_is_an_edge_without_fifo(port):
    """A handler that reads one byte per interrupt behind an edge-triggered PIC gets them all."""
    port.put(MCR, OUT2)
    port.put(IER, RDI)
    port.uart.feed(b"abc")
    assert port.edges() == [True]
    assert port.get(IIR) == IS_DATA
    assert [port.get(RBR), port.edges()] == [ord("a"), [False, True]]
    assert [port.get(RBR), port.edges()] == [ord("b"), [False, True]]
    assert [port.get(RBR), port.edges()] == [ord("c"), [False]]
    assert port.get(IIR) == NO_INT


@pytest.mark.parametrize(("trigger", "level"), [(0, 1), (TRIGGER_4, 4), (TRIGGER_8, 8), (TRIGGER_14, 14)])
def test_trigger_level(port, trigger, level):
    """FIFO Interrupt Mode: received data interrupts at the trigger level and stops when the FIFO drops below it."""
    port.put(MCR, OUT2)
    port.put(IER, RDI)
    port.put(FCR, ENABLE_FIFO | trigger)
    port.uart.feed(bytes(level))
    assert port.edges() == [True]
    assert port.get(IIR) == FIFOS | IS_DATA
    port.get(RBR)
    assert port.edges()[0] is False
    assert port.get(IIR) == FIFOS | (IS_TIMEOUT if level > 1 else NO_INT)


def test_reading_a_whole_trigger_level_makes_the_next_edge(port):
    """A driver that reads 14 bytes for each interrupt, without asking LSR, gets an edge for each 14."""
    port.put(MCR, OUT2)
    port.put(IER, RDI)
    port.put(FCR, ENABLE_FIFO | TRIGGER_14)
    port.uart.feed(bytes(range(28)))
    received = []
    while port.edges()[-1:] == [True]:
        received += [port.get(RBR) for _ in range(14)]
    assert received == list(range(28))


def test_character_timeout(port):
    """FIFO Interrupt Mode: data below the trigger level that stays unread interrupts, with IIR bit 3."""
    port.put(MCR, OUT2)
    port.put(IER, RDI)
    port.put(FCR, ENABLE_FIFO | TRIGGER_14)
    port.uart.feed(b"ab")
    assert port.edges() == [True]
    assert port.get(IIR) == FIFOS | IS_TIMEOUT
    assert [port.get(RBR), port.edges()] == [ord("a"), [False, True]]
    assert [port.get(RBR), port.edges()] == [ord("b"), [False]]
    assert port.get(IIR) == FIFOS | NO_INT


def test_pin_without_receive_interrupt_stays_low(port):
    """IER bit 0 enables received data and time-out."""
    port.put(MCR, OUT2)
    port.uart.feed(b"a")
    assert port.edges() == []
    assert port.get(IIR) == NO_INT
    port.put(IER, RDI)
    assert port.edges() == [True]


def test_clearing_the_receive_fifo_drops_what_has_arrived(port):
    """FCR bit 1 clears all bytes in the receive FIFO."""
    port.put(FCR, ENABLE_FIFO | TRIGGER_4)
    port.uart.feed(b"abc")
    assert port.get(LSR) == IDLE | DR
    port.put(FCR, ENABLE_FIFO | TRIGGER_4 | CLEAR_RECEIVE)
    assert port.get(LSR) == IDLE
    assert port.uart.pending == 0


def test_clear_without_enable_does_nothing(port):
    """FCR bit 0 "must be a 1 when other FCR bits are written to or they will not be programmed"."""
    port.uart.feed(b"a")
    assert port.get(LSR) & DR
    port.put(FCR, CLEAR_RECEIVE)
    assert port.receive_all() == b"a"


def test_iir_can_be_polled(port):
    """With the pin cut off by OUT2, IIR still tells of received data."""
    port.put(IER, RDI)
    port.uart.feed(b"a")
    assert port.get(IIR) == IS_DATA
    assert port.get(RBR) == ord("a")
    assert port.get(IIR) == NO_INT


@pytest.mark.parametrize("first", [b"", bytes([IER, RDI])])
def test_start_of_a_driver_loses_no_input(port, first):
    """What was fed before a driver programs the FIFOs has not arrived yet, so clearing them takes nothing."""
    port.uart.feed(b"typed ahead")
    for register, value in zip(first[::2], first[1::2], strict=True):
        port.put(register, value)
    port.put(FCR, ENABLE_FIFO | CLEAR_RECEIVE | CLEAR_TRANSMIT | TRIGGER_14)
    port.put(MCR, DTR | RTS | OUT2)
    port.put(IER, RDI)
    assert port.receive_all() == b"typed ahead"


def test_changing_the_fifo_mode_clears_both(port):
    """FCR bit 0: "data is automatically cleared from the FIFOs when changing"."""
    port.put(FCR, ENABLE_FIFO)
    port.uart.feed(b"a")
    assert port.get(LSR) & DR
    port.put(FCR, 0)
    assert port.get(LSR) == IDLE


def test_drained_is_told_when_the_queue_moved_on(port):
    """on_drained: once for each time that the queue empties, without the lock: it may feed."""
    told = []

    def drained():
        told.append(port.uart.pending)
        if len(told) == 1:
            port.uart.feed(b"de")

    port.uart.on_drained = drained
    port.uart.feed(b"abc")
    assert told == []
    assert port.receive_all() == b"abcde"
    assert told == [1, 1]


def test_drained_is_told_by_feed_when_the_fifo_takes_all(port):
    """A feeder that waits for on_drained goes on, also when its bytes went straight to the FIFO."""
    told = []
    port.put(MCR, OUT2)
    port.put(FCR, ENABLE_FIFO | TRIGGER_8)
    port.put(IER, RDI)
    port.uart.on_drained = lambda: told.append(port.uart.pending)
    port.uart.feed(b"12345678")
    assert told == [8]
    port.uart.feed(b"9")
    assert told == [8]
    port.uart.feed(b"")
    assert told == [8]


# --- modem, loopback, priorities ---


def test_a_peer_is_connected(port):
    """CTS, DSR and DCD are on, RI is off."""
    assert port.get(MSR) == 0xB0


def test_out2_gates_the_pin(port):
    """On a PC the interrupt output passes a gate that OUT2 opens."""
    port.put(IER, THRI)
    assert port.edges() == []
    port.put(MCR, OUT2)
    assert port.edges() == [True]
    port.put(MCR, 0)
    assert port.edges() == [False]
    assert port.get(IIR) == IS_THRE


def test_loopback_closes_the_gate(port):
    """MCR bit 4: the modem outputs are forced inactive, OUT2 among them."""
    port.put(MCR, OUT2)
    port.put(IER, THRI)
    assert port.edges() == [True]
    port.put(MCR, OUT2 | LOOP)
    assert port.edges() == [False]


def test_loopback_returns_data(port):
    """MCR bit 4: transmitted data is received at once; nothing leaves, nothing comes in."""
    port.put(MCR, LOOP)
    port.uart.feed(b"host")
    port.put(THR, 0xAE)
    assert port.get(LSR) == IDLE | DR
    assert port.get(RBR) == 0xAE
    assert port.get(LSR) == IDLE
    assert port.output.drain() == b""
    port.put(MCR, 0)
    assert port.receive_all() == b"host"


@pytest.mark.parametrize(("control", "status"), [(DTR, 0x20), (RTS, 0x10), (OUT1, 0x40), (OUT2, 0x80), (0x0A, 0x90)])
def test_loopback_connects_the_modem_lines(port, control, status):
    """MCR bit 4: DTR, RTS, OUT1, OUT2 become DSR, CTS, RI, DCD; the pin is inactive."""
    port.put(MCR, LOOP | control)
    assert port.get(MSR) & 0xF0 == status


def test_modem_deltas(port):
    """MSR bits 0, 1, 3 tell a change, bit 2 the end of RI; reading clears them."""
    port.put(MCR, LOOP)
    port.get(MSR)
    port.put(MCR, LOOP | DTR | RTS | OUT1 | OUT2)
    assert port.get(MSR) == 0xFB
    assert port.get(MSR) == 0xF0
    port.put(MCR, LOOP | DTR | RTS | OUT2)
    assert port.get(MSR) == 0xB4
    assert port.get(MSR) == 0xB0


def test_overrun_without_fifo_overwrites(port):
    """LSR bit 1: the byte in RBR is destroyed by the next one; reading LSR clears OE."""
    port.put(MCR, LOOP)
    port.put(THR, 1)
    port.put(THR, 2)
    assert port.get(LSR) == IDLE | DR | OE
    assert port.get(LSR) == IDLE | DR
    assert port.get(RBR) == 2


def test_overrun_with_fifo_keeps_the_fifo(port):
    """LSR bit 1 in FIFO mode: a byte too many is not transferred to the FIFO."""
    port.put(FCR, ENABLE_FIFO)
    port.put(MCR, LOOP)
    for byte in range(FIFO_SIZE):
        port.put(THR, byte)
    assert port.get(LSR) == IDLE | DR
    port.put(THR, 0xFF)
    assert port.get(LSR) == IDLE | DR | OE
    assert port.receive_all() == bytes(range(FIFO_SIZE))


def test_interrupt_priorities(port):
    """ "Interrupt Control Functions": line status, data, THRE, modem; each is reset by its own access."""
    port.put(MCR, LOOP)
    port.get(MSR)
    port.put(IER, RDI | THRI | RLSI | MSI)
    port.put(MCR, LOOP | RTS)
    port.put(THR, 1)
    port.put(THR, 2)
    assert port.get(IIR) == IS_LINE
    port.get(LSR)
    assert port.get(IIR) == IS_DATA
    port.get(RBR)
    assert port.get(IIR) == IS_THRE
    assert port.get(IIR) == IS_MODEM
    port.get(MSR)
    assert port.get(IIR) == NO_INT


# --- what C may answer ---


def fast(port):
    """Return whether C sends, and what it answers for LSR (None: it asks Python)."""
    return port.thr.on_write == Action.SERIAL, port.lsr.value if port.lsr.on_read == Action.CONSTANT else None


def test_c_sends_and_answers_lsr_in_the_usual_state(port):
    """A fresh UART, and one that a polling driver has set up, needs no Python to print."""
    assert fast(port) == (True, IDLE)
    port.put(FCR, ENABLE_FIFO)
    port.put(MCR, DTR | RTS | OUT2)
    port.put(IER, RDI)
    assert fast(port) == (True, IDLE)


@pytest.mark.parametrize(
    ("register", "value"), [(LCR, DLAB), (MCR, LOOP), (IER, THRI)], ids=["DLAB", "loopback", "THRI"]
)
def test_thr_comes_to_python_when_a_write_does_more_than_send(port, register, value):
    """The divisor, loopback and the transmit interrupt are Python's."""
    port.put(register, value)
    assert fast(port) == (False, IDLE)
    port.put(register, 0)
    assert fast(port) == (True, IDLE)


def test_thr_comes_to_python_while_a_byte_waits(port):
    """What is written goes behind it; LSR is a plain "not empty" until the reader makes room."""
    fill(port)
    port.put(THR, 0x41)
    assert fast(port) == (False, 0)
    port.output.drain()
    assert fast(port) == (True, IDLE)


def test_lsr_comes_to_python_when_reading_it_changes_something(port):
    """A byte that would arrive, an overrun that reading clears."""
    port.uart.feed(b"ab")
    assert fast(port) == (True, None)
    port.get(LSR)
    assert fast(port) == (True, IDLE | DR)
    port.get(RBR)
    assert fast(port) == (True, None)
    port.receive_all()
    port.put(MCR, LOOP)
    port.put(THR, 1)
    port.put(THR, 2)
    assert fast(port) == (False, None)
    port.get(LSR)
    assert fast(port) == (False, IDLE | DR)


# --- threads ---


def test_feeding_while_the_guest_reads_loses_nothing(port):
    """feed is called from another thread than read: order and count hold, and the pin ends low."""
    port.put(MCR, OUT2)
    port.put(FCR, ENABLE_FIFO | TRIGGER_8)
    port.put(IER, RDI)
    data = bytes(i % 251 for i in range(5000))

    def feed():
        for i in range(0, len(data), 7):
            port.uart.feed(data[i : i + 7])

    feeder = threading.Thread(target=feed)
    feeder.start()
    received = bytearray()
    while len(received) < len(data):
        received += port.receive_all()
    feeder.join()
    assert received == data
    assert port.uart.pending == 0
    edges = port.edges()
    assert edges[::2] == [True] * (len(edges) // 2)
    assert edges[1::2] == [False] * (len(edges) // 2)


def test_names_are_the_headers():
    """The values that this test types are those of <linux/serial_reg.h>."""
    assert (lib.UART_LSR_DR, lib.UART_LSR_OE, lib.UART_LSR_THRE, lib.UART_LSR_TEMT) == (DR, OE, THRE, TEMT)
    assert (lib.UART_IER_RDI, lib.UART_IER_THRI, lib.UART_IER_RLSI, lib.UART_IER_MSI) == (RDI, THRI, RLSI, MSI)
    assert (lib.UART_MCR_LOOP, lib.UART_MCR_OUT2, lib.UART_LCR_DLAB) == (LOOP, OUT2, DLAB)

"""The 16550A's receiver: FIFO, trigger levels, time-out, and a host that feeds it."""

import threading

import pytest
from uart_port import (
    CLEAR_RECEIVE,
    CLEAR_TRANSMIT,
    DR,
    DTR,
    ENABLE_FIFO,
    FCR,
    FIFOS,
    IDLE,
    IER,
    IIR,
    IS_DATA,
    IS_TIMEOUT,
    LOOP,
    LSR,
    MCR,
    NO_INT,
    OUT2,
    RBR,
    RDI,
    RTS,
    TRIGGER_4,
    TRIGGER_8,
    TRIGGER_14,
)

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


@pytest.mark.parametrize("before", [[DTR], [DTR | RTS, DTR], [DTR | RTS | OUT2, 0]])
def test_driver_that_uses_rts_hears_nothing_while_it_is_low(port, before):
    """Linux reads RBR blindly while it looks for the chip and starts it, with DTR alone: that takes nothing."""
    for value in before:
        port.put(MCR, value)
    port.uart.feed(b"typed ahead")
    assert [port.get(RBR), port.get(LSR), port.get(RBR)] == [0, IDLE, 0]
    port.put(MCR, before[-1] | RTS)
    assert port.receive_all() == b"typed ahead"


@pytest.mark.parametrize("value", [0, OUT2, LOOP | RTS])
def test_driver_that_does_not_use_rts_hears_all(port, value):
    """Looped back, RTS goes nowhere."""
    port.put(MCR, value)
    port.put(MCR, value & ~LOOP & ~RTS)
    port.uart.feed(b"typed ahead")
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

"""The 16550A's transmitter: bytes, interrupts, and a reader that is slow."""

from uart_port import CLEAR_TRANSMIT, ENABLE_FIFO, FCR, IDLE, IER, IIR, IS_THRE, LSR, MCR, NO_INT, OUT2, RDI, THR, THRI

from kvmpy.devices.serial import FIFO_SIZE

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


def test_full_output_clears_thre_until_the_reader_takes_bytes(port):
    """A driver that asks LSR before each byte loses nothing, however slow the reader is."""
    port.fill()
    port.put(THR, 0x41)
    assert port.get(LSR) == 0
    assert port.output.drain() == b"." * 32
    assert port.get(LSR) == IDLE
    assert port.output.drain() == b"A"
    assert port.uart.lost == 0


def test_write_without_asking_is_lost_and_counted(port):
    """THR holds one byte without FIFO: what is written on top is gone."""
    port.fill()
    port.put(THR, 0x41)
    port.put(THR, 0x42)
    assert port.uart.lost == 1
    port.output.drain()
    assert port.output.drain() == b"A"


def test_transmit_fifo_holds_sixteen(port):
    """FIFO mode: after THRE, 16 bytes may be written without asking again."""
    port.put(FCR, ENABLE_FIFO)
    port.fill()
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
    port.fill()
    port.put(THR, 0x41)
    port.edges()
    port.output.drain()
    assert port.edges() == [True]
    assert port.get(IIR) == IS_THRE
    assert port.output.drain() == b"A"


def test_transmit_interrupt_waits_for_the_byte_that_waits(port):
    """Enabling THRI interrupts at once only when THR is empty."""
    port.fill()
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
    port.fill()
    port.put(THR, 0x41)
    port.put(FCR, ENABLE_FIFO | CLEAR_TRANSMIT)
    assert port.get(LSR) == IDLE
    assert port.uart.lost == 1
    port.output.drain()
    assert port.output.drain() == b""

"""The 16550A, register by register, from the PC16550D datasheet; and what of it C may answer."""

import pytest
from uart_port import (
    CLEAR_RECEIVE,
    DLAB,
    DLL,
    DLM,
    DR,
    DTR,
    ENABLE_FIFO,
    FCR,
    FIFOS,
    IDLE,
    IER,
    IIR,
    IS_DATA,
    IS_LINE,
    IS_MODEM,
    IS_THRE,
    LCR,
    LOOP,
    LSR,
    MCR,
    MSI,
    MSR,
    NO_INT,
    OE,
    OUT1,
    OUT2,
    RBR,
    RDI,
    RLSI,
    RTS,
    SCR,
    TEMT,
    THR,
    THRE,
    THRI,
    TRIGGER_14,
)

from kvmpy._shim import lib
from kvmpy.devices.serial import FIFO_SIZE
from kvmpy.machine.bus import Action

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
    port.fill()
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


def test_names_are_the_headers():
    """The values that this test types are those of <linux/serial_reg.h>."""
    assert (lib.UART_LSR_DR, lib.UART_LSR_OE, lib.UART_LSR_THRE, lib.UART_LSR_TEMT) == (DR, OE, THRE, TEMT)
    assert (lib.UART_IER_RDI, lib.UART_IER_THRI, lib.UART_IER_RLSI, lib.UART_IER_MSI) == (RDI, THRI, RLSI, MSI)
    assert (lib.UART_MCR_LOOP, lib.UART_MCR_OUT2, lib.UART_LCR_DLAB) == (LOOP, OUT2, DLAB)

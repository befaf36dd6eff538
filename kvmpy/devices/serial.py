"""COM1: a 16550A with its FIFOs and interrupts, between a guest and a pipe or terminal of the host.

::

    offset  DLAB=0 read          DLAB=0 write          DLAB=1
    0       RBR  received byte   THR  byte to send     DLL  divisor, low
    1       IER  interrupts      IER                   DLM  divisor, high
    2       IIR  which one       FCR  FIFO control
    3       LCR  line control: DLAB is bit 7
    4       MCR  modem control: OUT2 lets the interrupt through to the PIC; bit 4 loops back
    5       LSR  line status: DR, OE, THRE, TEMT
    6       MSR  modem status: a connected peer (CTS, DSR, DCD)
    7       SCR  a byte to scribble

    host  feed() --> queue --> receive FIFO --> RBR  guest
    host  drain() <-- SerialOutput <-- transmit FIFO <-- THR  guest

There is no clock: the line has no speed. A byte sent has left at once. A byte from the host arrives as late as the
chip allows: when the guest looks (LSR, IIR, RBR) or would be interrupted, and never more than the FIFO's trigger
level at a time. So input never overruns, a driver that clears the FIFOs first of all loses none of it, and the
interrupt pin falls and rises for each byte or batch, which a driver behind an edge-triggered PIC needs.

The host heeds RTS, once the driver uses it: after it was raised, or while DTR stands alone, nothing arrives without it.
A driver may read RBR blindly before it raises RTS, to empty it: Linux does, three times. Who never touches
the two signals hears all the same.

Not here: who reads what the guest sends, and terminals.

Source: National Semiconductor PC16550D datasheet, "Registers" and "FIFO Interrupt Mode Operation".
"""

from collections import deque
from collections.abc import Callable
from threading import Lock

from kvmpy._shim import lib
from kvmpy.devices.output import SerialOutput
from kvmpy.machine.bus import Action, FastRange, InterruptLine

SERIAL_SIZE = 8
FIFO_SIZE = 16
TRIGGERS = (1, 4, 8, 14)
"""Bytes in the receive FIFO that raise the interrupt, by FCR bits 7 and 6."""

IIR_FIFOS_ENABLED = 0xC0
IER_MASK = 0x0F
MCR_MASK = 0x1F
DIVISOR_115200 = 1

CONNECTED = lib.UART_MSR_CTS | lib.UART_MSR_DSR | lib.UART_MSR_DCD
LOOPED = (
    (lib.UART_MCR_DTR, lib.UART_MSR_DSR),
    (lib.UART_MCR_RTS, lib.UART_MSR_CTS),
    (lib.UART_MCR_OUT1, lib.UART_MSR_RI),
    (lib.UART_MCR_OUT2, lib.UART_MSR_DCD),
)


class Uart16550:
    """A serial port. Guest side: `read` and `write`; host side: `feed`; both from any thread.

    ``output`` takes what the guest sends; ``interrupt`` is called on changes of the pin only. When the output is full
    because its reader is slow, up to 16 bytes wait in the transmit FIFO with THRE and TEMT clear, so a driver that
    asks before it sends loses nothing; what is written on top of a full FIFO is gone, as on the chip, and counted in
    ``lost``. kvmpy's reader normally keeps up, and no guest sees any of this.

    ``on_drained`` is called when all that was fed has moved on to the FIFO: by the thread that moved it, which may be
    the one inside `feed`, and without the lock.
    """

    def __init__(self, output: SerialOutput, interrupt: InterruptLine) -> None:
        self.on_drained: Callable[[], None] | None = None
        self.lost = 0
        self._output = output
        self._interrupt = interrupt
        self._raised = False
        self._lock = Lock()
        self._queue = bytearray()  # fed by the host, not yet arrived
        self._received: deque[int] = deque()
        self._sending = bytearray()  # the transmit FIFO: empty unless the output is full
        self._divisor = [DIVISOR_115200, 0]
        self._ier = self._lcr = self._mcr = self._scr = 0
        self._modem_deltas = 0
        self._uses_rts = False
        self._fifo_size = 1
        self._trigger = 1
        self._overrun = self._timed_out = self._sent = self._fed = False
        self._thr = FastRange(lib.UART_TX, 1, serial=output.pointer)
        self._lsr = FastRange(lib.UART_LSR, 1)
        self._settle()
        output.on_room = self._retry

    def fast_ranges(self) -> list[FastRange]:
        """Return what C may answer: THR while a write only sends, LSR while a read changes nothing."""
        return [self._thr, self._lsr]

    # --- the host's side ---

    @property
    def pending(self) -> int:
        """Bytes that the guest has not read yet."""
        with self._lock:
            return len(self._queue) + len(self._received)

    def feed(self, data: bytes) -> None:
        """Let the guest receive ``data``, after what was fed before. The queue has no bound: ask `pending` first."""
        with self._lock:
            self._queue += data
            self._fed = bool(self._queue)
            drained = self._settle()
        self._tell(drained)

    def take_over(self, line: "Uart16550") -> None:
        """Take the place of another chip: what the host sent, and that has not arrived, arrives here."""
        self.on_drained = line.on_drained
        with line._lock:
            waiting = bytes(line._queue)
        self.feed(waiting)

    def _retry(self) -> None:
        """Send what waits: the reader has made room. Nothing else would wake a driver that sleeps until THRE."""
        with self._lock:
            self._send()
            self._settle()

    def _tell(self, drained: bool) -> None:
        if drained and self.on_drained is not None:
            self.on_drained()

    # --- the guest's side ---

    def read(self, offset: int, size: int) -> bytes:
        """Return ``size`` registers from ``offset``."""
        with self._lock:
            data = bytes(self._read_register((offset + i) % SERIAL_SIZE) for i in range(size))
            drained = self._settle()
        self._tell(drained)
        return data

    def write(self, offset: int, data: bytes) -> None:
        """Write ``data`` into the registers from ``offset``."""
        with self._lock:
            for i, value in enumerate(data):
                self._write_register((offset + i) % SERIAL_SIZE, value)
            drained = self._settle()
        self._tell(drained)

    def _read_register(self, register: int) -> int:
        if self._lcr & lib.UART_LCR_DLAB and register <= lib.UART_DLM:
            return self._divisor[register]
        match register:
            case lib.UART_RX:
                return self._read_rbr()
            case lib.UART_IER:
                return self._ier
            case lib.UART_IIR:
                return self._read_iir()
            case lib.UART_LCR:
                return self._lcr
            case lib.UART_MCR:
                return self._mcr
            case lib.UART_LSR:
                self._arrive()
                status = self._line_status()
                self._overrun = False
                return status
            case lib.UART_MSR:
                status = self._modem_inputs() | self._modem_deltas
                self._modem_deltas = 0
                return status
            case _:
                return self._scr

    def _write_register(self, register: int, value: int) -> None:
        if self._lcr & lib.UART_LCR_DLAB and register <= lib.UART_DLM:
            self._divisor[register] = value
            return
        match register:
            case lib.UART_TX:
                self._write_thr(value)
            case lib.UART_IER:
                self._write_ier(value & IER_MASK)
            case lib.UART_FCR:
                self._write_fcr(value)
            case lib.UART_LCR:
                self._lcr = value
            case lib.UART_MCR:
                self._write_mcr(value & MCR_MASK)
            case lib.UART_SCR:
                self._scr = value

    # --- receiving ---

    def _can_arrive(self) -> bool:
        """Whether a byte of the queue would arrive at the next look: looped back, the receiver hears no line."""
        hears = not self._mcr & lib.UART_MCR_LOOP and self._may_send()
        return bool(self._queue) and hears and len(self._received) < self._trigger

    def _may_send(self) -> bool:
        """Whether the host may send: RTS says so, where the driver uses it."""
        return bool(self._mcr & lib.UART_MCR_RTS) or not (self._uses_rts or self._mcr & lib.UART_MCR_DTR)

    def _arrive(self) -> None:
        """Let bytes come in, up to the trigger level. What stays below it has timed out: no more will come."""
        if self._can_arrive():
            room = self._trigger - len(self._received)
            self._received.extend(self._queue[:room])
            del self._queue[:room]
        self._timed_out = self._fifo_size > 1 and 0 < len(self._received) < self._trigger

    def _read_rbr(self) -> int:
        self._arrive()
        value = self._received.popleft() if self._received else 0
        self._timed_out = False
        # The pin falls before the next byte arrives: a PIC that sees edges must see one.
        self._drive()
        return value

    def _receive_looped(self, value: int) -> None:
        if len(self._received) < self._fifo_size:
            self._received.append(value)
            return
        # OE: the FIFO keeps what it has; the single RBR is overwritten ("Line Status Register", bit 1).
        self._overrun = True
        if self._fifo_size == 1:
            self._received[0] = value

    # --- sending ---

    def _write_thr(self, value: int) -> None:
        # A write resets the THRE interrupt, and the next one is a new edge ("Interrupt Control Functions").
        self._sent = False
        self._drive()
        if self._mcr & lib.UART_MCR_LOOP:
            self._receive_looped(value)
            self._empty_thr()
        elif len(self._sending) < self._fifo_size:
            self._sending.append(value)
            self._send()
        else:
            self.lost += 1

    def _send(self) -> None:
        """Move the transmit FIFO to the output, as far as there is room."""
        waited = bool(self._sending)
        while self._sending and self._output.push(bytes(self._sending[:1])):
            del self._sending[0]
        if waited and not self._sending:
            self._empty_thr()

    def _empty_thr(self) -> None:
        self._sent = bool(self._ier & lib.UART_IER_THRI)

    # --- control ---

    def _write_ier(self, value: int) -> None:
        rises = value & ~self._ier & lib.UART_IER_THRI
        self._ier = value
        if rises and not self._sending:
            self._sent = True
        elif not value & lib.UART_IER_THRI:
            self._sent = False

    def _write_fcr(self, value: int) -> None:
        """Program the FIFOs. Bit 0 must be set for the others to count, and a change of it clears both."""
        size = FIFO_SIZE if value & lib.UART_FCR_ENABLE_FIFO else 1
        changed = size != self._fifo_size
        self._fifo_size = size
        self._trigger = TRIGGERS[value >> 6] if size > 1 else 1
        if changed or (size > 1 and value & lib.UART_FCR_CLEAR_RCVR):
            self._received.clear()
        if changed or (size > 1 and value & lib.UART_FCR_CLEAR_XMIT):
            self._clear_transmit_fifo()

    def _clear_transmit_fifo(self) -> None:
        if self._sending:
            self.lost += len(self._sending)
            self._sending.clear()
            self._empty_thr()

    def _write_mcr(self, value: int) -> None:
        before = self._modem_inputs()
        self._mcr = value
        self._uses_rts |= value & (lib.UART_MCR_RTS | lib.UART_MCR_LOOP) == lib.UART_MCR_RTS
        after = self._modem_inputs()
        # Each delta is its status bit, four lower; RI counts only where it ends (TERI).
        changed = before ^ after
        self._modem_deltas |= (changed & ~(after & lib.UART_MSR_RI)) >> 4

    # --- status and interrupts ---

    def _line_status(self) -> int:
        return (
            (lib.UART_LSR_DR if self._received else 0)
            | (lib.UART_LSR_OE if self._overrun else 0)
            | (0 if self._sending else lib.UART_LSR_THRE | lib.UART_LSR_TEMT)
        )

    def _modem_inputs(self) -> int:
        if not self._mcr & lib.UART_MCR_LOOP:
            return CONNECTED
        return sum(status for control, status in LOOPED if self._mcr & control)

    def _source(self) -> int:
        """Return the interrupt of the highest priority that is enabled and pending, as IIR has it."""
        if self._ier & lib.UART_IER_RLSI and self._overrun:
            return lib.UART_IIR_RLSI
        if self._ier & lib.UART_IER_RDI and len(self._received) >= self._trigger:
            return lib.UART_IIR_RDI
        if self._ier & lib.UART_IER_RDI and self._timed_out:
            return lib.UART_IIR_RX_TIMEOUT
        if self._sent:
            return lib.UART_IIR_THRI
        if self._ier & lib.UART_IER_MSI and self._modem_deltas:
            return lib.UART_IIR_MSI
        return lib.UART_IIR_NO_INT

    def _read_iir(self) -> int:
        self._arrive()
        source = self._source()
        if source == lib.UART_IIR_THRI:
            self._sent = False
        return source | (IIR_FIFOS_ENABLED if self._fifo_size > 1 else 0)

    def _connected(self) -> bool:
        """Whether the pin reaches the PIC: a PC leads it through OUT2, and loopback forces that output inactive."""
        return self._mcr & (lib.UART_MCR_OUT2 | lib.UART_MCR_LOOP) == lib.UART_MCR_OUT2

    def _drive(self) -> None:
        """Put the interrupt on the pin."""
        level = self._connected() and self._source() != lib.UART_IIR_NO_INT
        if level != self._raised:
            self._raised = level
            self._interrupt(level)

    def _settle(self) -> bool:
        """Bring the pin, and what C may answer, up to date; return whether the queue has been emptied."""
        if self._ier & lib.UART_IER_RDI and self._connected():
            self._arrive()
        self._drive()
        plain = not (self._lcr & lib.UART_LCR_DLAB or self._mcr & lib.UART_MCR_LOOP or self._ier & lib.UART_IER_THRI)
        self._thr.on_write = Action.SERIAL if plain and not self._sending else Action.TO_PYTHON
        if self._overrun or self._can_arrive():
            self._lsr.on_read = Action.TO_PYTHON
        else:
            self._lsr.value = self._line_status()
            self._lsr.on_read = Action.CONSTANT
        drained = self._fed and not self._queue
        self._fed &= not drained
        return drained

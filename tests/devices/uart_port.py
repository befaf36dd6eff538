"""What the tests of the 16550 share: the datasheet's names, and a UART to try them on."""

from kvmpy.devices.output import SerialOutput
from kvmpy.devices.serial import Uart16550

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

    def fill(self):
        """Leave no room in the ring."""
        assert self.output.push(b"." * 32)

    def receive_all(self):
        """Read like a polling driver: while DR is set."""
        received = bytearray()
        while self.get(LSR) & DR:
            received.append(self.get(RBR))
        return bytes(received)

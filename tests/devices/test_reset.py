"""The ways to reset a PC."""

import pytest

from kvmpy._shim import lib
from kvmpy.devices.reset import RESET_CONTROL_BASE, KeyboardController, ResetControl, SystemControlA

OUTPUT_FULL = 1


class Resets:
    def __init__(self):
        self.count = 0

    def __call__(self):
        self.count += 1


@pytest.fixture
def resets():
    return Resets()


# --- 8042 ---


def test_keyboard_command_fe_resets(resets):
    """8042: 0xfe pulses bit 0 of the output port, which is the CPU's reset line."""
    KeyboardController(resets).command.write(0, b"\xfe")
    assert resets.count == 1


def test_keyboard_is_never_busy(resets):
    """A guest waits for IBF (bit 1) to clear before a command, and would wait for ever."""
    keyboard = KeyboardController(resets)
    assert keyboard.command.read(0, 1) == b"\x1c"
    keyboard.command.write(0, b"\xad")
    keyboard.data.write(0, b"\xed")
    assert keyboard.command.read(0, 1) == b"\x1c"
    assert resets.count == 0


def test_a20_routine_gets_its_answer(resets):
    """0xd0 fills the output buffer with the output port (A20 on, not in reset); 0xd1 writes it back."""
    keyboard = KeyboardController(resets)
    keyboard.command.write(0, b"\xd0")
    assert keyboard.command.read(0, 1)[0] & OUTPUT_FULL
    port = keyboard.data.read(0, 1)[0]
    assert port == 0x03
    assert not keyboard.command.read(0, 1)[0] & OUTPUT_FULL
    keyboard.command.write(0, b"\xd1")
    keyboard.data.write(0, bytes([port | 2]))
    assert resets.count == 0


def test_output_port_bit_0_low_resets(resets):
    """0xd1 with bit 0 clear holds the reset line low."""
    keyboard = KeyboardController(resets)
    keyboard.command.write(0, b"\xd1")
    keyboard.data.write(0, b"\x02")
    assert resets.count == 1
    keyboard.data.write(0, b"\x02")
    assert resets.count == 1


def test_self_test_passes_and_configuration_is_kept(resets):
    """0xaa answers 0x55; 0x60 stores the configuration byte that 0x20 reads."""
    keyboard = KeyboardController(resets)
    keyboard.command.write(0, b"\xaa")
    assert keyboard.data.read(0, 1) == b"\x55"
    keyboard.command.write(0, b"\x60")
    keyboard.data.write(0, b"\x47")
    keyboard.command.write(0, b"\x20")
    assert keyboard.data.read(0, 1) == b"\x47"
    assert resets.count == 0


# --- port 0x92 ---


def test_fast_reset(resets):
    """Port 0x92 bit 0 resets; the A20 idiom (read, set bit 1, clear bit 0, write) does not."""
    port = SystemControlA(resets)
    value = port.read(0, 1)[0]
    assert value == 0x02
    port.write(0, bytes([(value | 2) & ~1]))
    assert resets.count == 0
    port.write(0, bytes([value | 1]))
    assert resets.count == 1
    assert port.read(0, 1) == b"\x02"


# --- 0xcf9 ---

REGISTER = lib.KVMPY_PORT_RESET - RESET_CONTROL_BASE


def test_reset_control_resets_when_bit_2_rises(resets):
    """ICH9: a 0 to 1 transition of RST_CPU initiates the reset that SYS_RST chose."""
    control = ResetControl(resets)
    control.write(REGISTER, b"\x02")
    assert resets.count == 0
    assert control.read(REGISTER, 1) == b"\x02"
    control.write(REGISTER, b"\x06")
    assert resets.count == 1
    control.write(REGISTER, b"\x06")
    assert resets.count == 1
    control.write(REGISTER, b"\x00")
    control.write(REGISTER, b"\x0e")
    assert resets.count == 2
    assert control.read(REGISTER, 1) == b"\x0e"


def test_looking_for_pci_does_not_reset(resets):
    """PCI 3.0 §3.2.2.3.2: a 32-bit write to 0xcf8 is CONFIG_ADDRESS; its second byte is a device and function."""
    control = ResetControl(resets)
    for function in range(8):
        control.write(0, (0x8000_0000 | function << 8).to_bytes(4, "little"))
    assert resets.count == 0
    assert control.read(0, 4) == b"\xff" * 4
    assert control.read(REGISTER, 1) == b"\x00"

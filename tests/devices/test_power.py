"""ACPI fixed hardware: power off and the power button."""

import pytest

from kvmpy._shim import lib
from kvmpy.devices.power import CONTROL_SIZE, EVENT_SIZE, POWER_BUTTON, SLP_EN, SLP_TYP_SHIFT, AcpiPm1

SOFT_OFF = lib.KVMPY_ACPI_S5 << SLP_TYP_SHIFT | SLP_EN
STATUS, ENABLE = 0, 2


class Board:
    def __init__(self):
        self.power_offs = 0
        self.sci = []
        self.pm1 = AcpiPm1(self.power_off, self.sci.append)

    def power_off(self):
        self.power_offs += 1


@pytest.fixture
def board():
    return Board()


def word(value):
    return value.to_bytes(2, "little")


def test_blocks_do_not_overlap():
    """guests/abi.h: the control block begins where the event block ends, or later."""
    assert lib.KVMPY_PORT_ACPI_EVENT + EVENT_SIZE <= lib.KVMPY_PORT_ACPI_CONTROL
    assert CONTROL_SIZE == 2


def test_soft_off_switches_off(board):
    """ACPI 6.5 §4.8.3.2.1: SLP_EN starts the transition into the state that SLP_TYP names."""
    board.pm1.control.write(0, word(SOFT_OFF))
    assert board.power_offs == 1


def test_soft_off_in_two_steps_switches_off_once(board):
    """ACPI 6.5 §7.4.2: an OS may write SLP_TYP first and SLP_TYP with SLP_EN after it."""
    board.pm1.control.write(0, word(SOFT_OFF & ~SLP_EN))
    assert board.power_offs == 0
    board.pm1.control.write(0, word(SOFT_OFF))
    assert board.power_offs == 1


def test_soft_off_by_bytes_switches_off(board):
    """The fields lie in the high byte, so a byte access there is enough."""
    board.pm1.control.write(0, b"\x00")
    board.pm1.control.write(1, bytes([SOFT_OFF >> 8]))
    assert board.power_offs == 1


@pytest.mark.parametrize("sleep_type", [t for t in range(8) if t != lib.KVMPY_ACPI_S5])
def test_other_sleep_states_do_nothing(board, sleep_type):
    """Only \\_S5 exists on this board."""
    board.pm1.control.write(0, word(sleep_type << SLP_TYP_SHIFT | SLP_EN))
    assert board.power_offs == 0


def test_control_reads_sci_enabled_and_never_slp_en(board):
    """ACPI 6.5 table 4.16: SCI_EN tells that the platform is in ACPI mode; SLP_EN is write-only, reads 0."""
    assert board.pm1.control.read(0, 2) == word(1)
    board.pm1.control.write(0, word(3 << SLP_TYP_SHIFT | SLP_EN))
    assert board.pm1.control.read(0, 2) == word(1 | 3 << SLP_TYP_SHIFT)


def test_button_interrupts_until_it_is_acknowledged(board):
    """ACPI 6.5 §4.8.3.1.1: PWRBTN_STS with PWRBTN_EN raises the SCI; writing 1 to the status clears both."""
    board.pm1.event.write(ENABLE, word(POWER_BUTTON))
    assert board.sci == []
    board.pm1.press_power_button()
    assert board.sci == [True]
    assert board.pm1.event.read(STATUS, 2) == word(POWER_BUTTON)
    board.pm1.event.write(STATUS, word(POWER_BUTTON))
    assert board.sci == [True, False]
    assert board.pm1.event.read(STATUS, 2) == word(0)


def test_button_waits_for_its_enable(board):
    """The status bit is set in any case; the SCI follows when it is enabled."""
    board.pm1.press_power_button()
    assert board.sci == []
    board.pm1.event.write(STATUS, word(0))
    assert board.pm1.event.read(STATUS, 4) == word(POWER_BUTTON) + word(0)
    board.pm1.event.write(ENABLE, word(POWER_BUTTON))
    board.pm1.press_power_button()
    assert board.sci == [True]


def test_enable_keeps_defined_bits_only(board):
    """ACPI 6.5 table 4.15: reserved bits read as zero."""
    board.pm1.event.write(ENABLE, b"\xff\xff")
    assert board.pm1.event.read(ENABLE, 2) == word(0x0721)

"""ACPI fixed hardware: power off, and registers without an event."""

import pytest

from kvmpy._shim import lib
from kvmpy.devices.power import CONTROL_SIZE, EVENT_SIZE, SLP_EN, SLP_TYP_SHIFT, ControlBlock, EventBlock

SOFT_OFF = lib.KVMPY_ACPI_S5 << SLP_TYP_SHIFT | SLP_EN
STATUS, ENABLE = 0, 2


class Board:
    def __init__(self):
        self.power_offs = 0
        self.control = ControlBlock(self.power_off)

    def power_off(self):
        self.power_offs += 1


@pytest.fixture
def board():
    return Board()


@pytest.fixture
def events():
    return EventBlock()


def word(value):
    return value.to_bytes(2, "little")


def test_blocks_do_not_overlap():
    """guests/abi.h: the control block begins where the event block ends, or later."""
    assert lib.KVMPY_PORT_ACPI_EVENT + EVENT_SIZE <= lib.KVMPY_PORT_ACPI_CONTROL
    assert CONTROL_SIZE == 2


def test_soft_off_switches_off(board):
    """ACPI 6.5 §4.8.3.2.1: SLP_EN starts the transition into the state that SLP_TYP names."""
    board.control.write(0, word(SOFT_OFF))
    assert board.power_offs == 1


def test_soft_off_in_two_steps_switches_off_once(board):
    """ACPI 6.5 §7.4.2: an OS may write SLP_TYP first and SLP_TYP with SLP_EN after it."""
    board.control.write(0, word(SOFT_OFF & ~SLP_EN))
    assert board.power_offs == 0
    board.control.write(0, word(SOFT_OFF))
    assert board.power_offs == 1


def test_soft_off_by_bytes_switches_off(board):
    """The fields lie in the high byte, so a byte access there is enough."""
    board.control.write(0, b"\x00")
    board.control.write(1, bytes([SOFT_OFF >> 8]))
    assert board.power_offs == 1


@pytest.mark.parametrize("sleep_type", [t for t in range(8) if t != lib.KVMPY_ACPI_S5])
def test_other_sleep_states_do_nothing(board, sleep_type):
    """Only \\_S5 exists on this board."""
    board.control.write(0, word(sleep_type << SLP_TYP_SHIFT | SLP_EN))
    assert board.power_offs == 0


def test_control_reads_sci_enabled_and_never_slp_en(board):
    """ACPI 6.5 table 4.16: SCI_EN tells that the platform is in ACPI mode; SLP_EN is write-only, reads 0."""
    assert board.control.read(0, 2) == word(1)
    board.control.write(0, word(3 << SLP_TYP_SHIFT | SLP_EN))
    assert board.control.read(0, 2) == word(1 | 3 << SLP_TYP_SHIFT)


def test_no_event_has_a_status(events):
    """The FADT says that the buttons and the RTC alarm are elsewhere; there is no timer to overflow."""
    events.write(ENABLE, b"\xff\xff")
    events.write(STATUS, b"\xff\xff")
    assert events.read(STATUS, 2) == word(0)


def test_enable_keeps_defined_bits_only(events):
    """ACPI 6.5 table 4.15: reserved bits read as zero; a kernel reads back what it has enabled."""
    events.write(ENABLE, b"\xff\xff")
    assert events.read(ENABLE, 2) == word(0x0721)
    events.write(ENABLE + 1, b"\x00")
    assert events.read(STATUS, 4) == word(0) + word(0x0021)

"""What the tests of devices share: a UART between a ring and a pin, and the block engines."""

from functools import partial

import pytest
from engine_rig import Rig
from uart_port import Port

from kvmpy.devices.block_c import CBlock
from kvmpy.devices.block_python import PythonBlock


@pytest.fixture
def port():
    port = Port()
    yield port
    port.output.close()


@pytest.fixture(params=[PythonBlock, CBlock], ids=["python", "c"])
def make_rig(request):
    """Return a function that makes a `Rig` of one engine, then of the other: they do the same."""
    return partial(Rig, make_engine=request.param)

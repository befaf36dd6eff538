"""What the tests of devices share: a UART between a ring and a pin, a bare virtio device, and the block engines."""

from functools import partial

import pytest
from engine_rig import Rig
from mmio_driver import Bench
from uart_port import Port

from kvmpy.devices.block_c import CBlock
from kvmpy.devices.block_python import PythonBlock
from kvmpy.devices.queue_worker import InlineWorker, QueueWorker


@pytest.fixture
def port():
    port = Port()
    yield port
    port.output.close()


@pytest.fixture
def bench():
    """A virtio device that is served in the thread that kicks it, and its driver."""
    bench = Bench(InlineWorker)
    yield bench
    bench.close()


@pytest.fixture
def driver(bench):
    return bench.driver


@pytest.fixture
def threaded():
    """As ``bench``, with a thread for each queue."""
    bench = Bench(QueueWorker)
    yield bench
    bench.close()


@pytest.fixture(params=[PythonBlock, CBlock], ids=["python", "c"])
def make_rig(request):
    """Return a function that makes a `Rig` of one engine, then of the other: they do the same."""
    return partial(Rig, make_engine=request.param)

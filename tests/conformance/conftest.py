"""A disk beside the one on the bench."""

import pytest

from kvmpy.conformance.bench import Bench
from kvmpy.conformance.world import World
from kvmpy.devices.block_python import PythonBlock


@pytest.fixture
def other():
    with Bench(PythonBlock, packed=False, world=World()) as bench:
        bench.start()
        yield bench

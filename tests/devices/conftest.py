"""A UART between a ring and a pin."""

import pytest
from uart_port import Port


@pytest.fixture
def port():
    port = Port()
    yield port
    port.output.close()

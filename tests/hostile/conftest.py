"""What every hostile guest is held to."""

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Hold every guest to a log of a few lines."""
    with caplog.at_level(logging.DEBUG, logger="kvmpy"):
        yield
    assert len([record for record in caplog.records if record.name.startswith("kvmpy")]) < 20

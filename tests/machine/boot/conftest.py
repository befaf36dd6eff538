"""Guest memory and files for the tests of boot protocols. No /dev/kvm is needed."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvmpy import MiB
from kvmpy.machine.memory import GuestMemory


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    """64 MiB of fresh guest memory."""
    with GuestMemory(64 * MiB) as memory:
        yield memory


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Return a function that writes bytes to a file and returns its path."""

    def write(data: bytes, name: str = "image") -> str:
        path = tmp_path / name
        path.write_bytes(data)
        return str(path)

    return write


@pytest.fixture
def touched(memory: GuestMemory) -> Callable[[], int]:
    """Return a function that tells how many bytes of guest memory are populated."""
    return lambda: os.fstat(memory.fd).st_blocks * 512

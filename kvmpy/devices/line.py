"""A line to the guest, as its user's end sees it: what the serial port and the virtio console have in common."""

from collections.abc import Callable
from typing import Protocol


class Line(Protocol):
    """Takes what a user types, for the guest. Any thread."""

    on_drained: Callable[[], None] | None
    """Called when all that was fed has gone to the guest, by the thread that moved it."""

    @property
    def pending(self) -> int:
        """Bytes that the guest has not read yet."""

    def feed(self, data: bytes) -> None:
        """Let the guest receive ``data``, after what was fed before. There is no bound: ask `pending` first."""

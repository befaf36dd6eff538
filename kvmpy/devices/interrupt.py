"""The interrupt of one virtio device: the InterruptStatus word, and the eventfd that raises its GSI.

::

    worker (C or Python)     raise_(bits):  status |= bits; write(fd, 1) --> irqfd --> an edge on the GSI
    guest reads 0x60         the word, answered by the run loop
    guest writes 0x64        status &= ~bits, by the run loop

The eventfd makes a pulse, so the GSI is an edge, and nothing has to lower a level when the last bit is acknowledged.
Each raise is an edge, also while the bit is set: a controller drops the edges of a pin that is masked, and a driver
that polled then, and never acknowledged, would wait for ever. Many raises before the guest runs are one interrupt.

Source: virtio 1.2 §4.2.2 (InterruptStatus, InterruptACK), §4.2.3.4.
"""

import os
from typing import Any, Self

from kvmpy._shim import ffi, lib


class Interrupt:
    """``fd`` is for an irqfd; ``pointer``, a ``struct kvmpy_interrupt *``, for C: alive as long as this object.

    The methods may be called from any thread.
    """

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.pointer = ffi.new("struct kvmpy_interrupt *")
        self.pointer.fd = self.fd

    @property
    def status(self) -> int:
        """The bits that are raised and not acknowledged: ``lib.VIRTIO_MMIO_INT_*``."""
        return int(self.pointer.status)

    @property
    def word(self) -> Any:
        """The status as a ``uint64_t *``, for a `FastRange`."""
        return ffi.addressof(self.pointer, "status")

    def raise_(self, bits: int) -> None:
        """Set ``bits`` of the status and interrupt the guest."""
        lib.kvmpy_interrupt_raise(self.pointer, bits)

    def acknowledge(self, bits: int) -> None:
        """Clear ``bits`` of the status."""
        lib.kvmpy_interrupt_acknowledge(self.pointer, bits)

    def close(self) -> None:
        """Close the eventfd; raising then only sets the status. Nobody else raises any more. Twice is harmless."""
        if self.fd >= 0:
            self.pointer.fd = -1
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

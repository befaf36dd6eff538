"""Cases 45 and 46: a driver that cannot make up its mind on interrupts."""

import os
from collections.abc import Callable
from functools import partial

from kvmpy._shim import lib
from kvmpy.conformance.bench import Bench
from kvmpy.conformance.case import OK, Variant
from kvmpy.conformance.cases.ring import PACKED, SPLIT
from kvmpy.conformance.layout import EventSuppression
from kvmpy.conformance.world import World


def interrupt_of(bench: Bench, suppress: Callable[[], None], *, expected: bool, what: str) -> None:
    """Send a request and check that there was one interrupt, or none."""
    suppress()
    bench.device.interrupt.acknowledge(lib.VIRTIO_MMIO_INT_VRING)
    drain(bench.device.interrupt.fd)
    bench.send(bench.read())
    bench.expect(bench.interrupted == expected, f"{what}: interrupt status {bench.interrupted}, not {expected}")
    bench.expect(drain(bench.device.interrupt.fd) == expected, f"{what}: not just one interrupt, or not none")


def drain(eventfd: int) -> int:
    """Return how often an eventfd was raised since the last time."""
    try:
        return os.eventfd_read(eventfd)
    except BlockingIOError:
        return 0


def poisoned_used_event(bench: Bench) -> None:
    """Set used_event to all sorts of values: an interrupt comes when it is passed, once, and never otherwise."""
    ring = bench.split
    for event in (0, 0, 1, 65535, 0x8000, 5, 6, 3, 2**16 - 2):
        now = ring.used_idx
        set_event = partial(setattr, ring, "used_event", event)
        interrupt_of(bench, set_event, expected=event == now, what=f"used_event {event} at {now}")


def poisoned_off_wrap(bench: Bench) -> None:
    """The same on a packed ring: the chain takes three slots, and an event beyond the ring interrupts always."""
    ring = bench.packed_ring
    for offset, wrap in ((0, 1), (0, 1), (8, 1), (8, 0), (12, 0), (15, 1), (2, 0), (99, 1), (0, 0)):
        slots = [((ring.used_slot + i) % 16, ring.used_wrap ^ (ring.used_slot + i >= 16)) for i in range(3)]
        event = EventSuppression(offset | wrap << 15, lib.VRING_PACKED_EVENT_FLAG_DESC)
        passed = offset >= 16 or (offset, bool(wrap)) in slots
        interrupt_of(bench, partial(setattr, ring, "driver_event", event), expected=passed, what=f"{offset}, {wrap}")


def avail_flags(bench: Bench, flags: int) -> None:
    """Set flags of the available ring: only bit 0 has a meaning."""
    expected = not flags & lib.VRING_AVAIL_F_NO_INTERRUPT
    suppress = partial(setattr, bench.split, "avail_flags", flags)
    interrupt_of(bench, suppress, expected=expected, what=f"flags 0x{flags:x}")


def event_flags(bench: Bench, flags: int) -> None:
    """Set the driver's event flags: only DISABLE silences the device."""
    expected = flags != lib.VRING_PACKED_EVENT_FLAG_DISABLE
    suppress = partial(setattr, bench.packed_ring, "driver_event", EventSuppression(0, flags))
    interrupt_of(bench, suppress, expected=expected, what=f"flags 0x{flags:x}")


# ----------------------------------------------------------------------------------------------------------------

V = Variant

POISON = (
    V("used_event", OK, poisoned_used_event, World(without=0), SPLIT),
    V("off_wrap", OK, poisoned_off_wrap, World(without=0), PACKED),
)
JUNK = (
    *(V(f"0x{n:x}", OK, partial(avail_flags, flags=n), rings=SPLIT) for n in (0xFFFE, 0xFFFF, 2)),
    *(V(f"0x{n:x}", OK, partial(event_flags, flags=n), rings=PACKED) for n in (1, 2, 3, 0xFFFF)),
)

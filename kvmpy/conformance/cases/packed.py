"""Cases 32 to 35: what only packed rings have."""

from functools import partial

from kvmpy._shim import lib
from kvmpy.conformance.bench import DATA, Bench
from kvmpy.conformance.case import IGNORED, OK, Variant, needs_reset
from kvmpy.conformance.cases.descriptors import LOW_END, with_empty_buffer
from kvmpy.conformance.cases.lifecycle import queue_at
from kvmpy.conformance.cases.ring import PACKED
from kvmpy.conformance.driver import NO_STATUS
from kvmpy.conformance.layout import AVAIL, NEXT, USED, WRITE, EventSuppression
from kvmpy.conformance.world import World
from kvmpy.devices.virtqueue import Fault


def first_flags(bench: Bench, flags: int) -> None:
    """Publish a chain whose first descriptor is not available: the device has nothing to consume."""
    buffers = bench.read()
    bench.ring.edit(bench.ring.add(buffers), 0, flags=flags)
    bench.ring.publish()
    with bench.watched():
        bench.driver.notify()
    left = bench.packed_ring.descriptor(0).flags == flags and bench.memory.read(buffers[2].gpa, 1)[0] == NO_STATUS
    bench.expect(left, "a chain was consumed that was not available")


def second_flags(bench: Bench, flags: int) -> None:
    """Publish a chain whose second descriptor is not available."""
    bench.ring.edit(bench.add(bench.read()), 1, flags=flags | NEXT | WRITE)
    bench.kick()


def last_id(bench: Bench, identity: int) -> None:
    """Give the last descriptor, whose id counts, another one."""
    bench.ring.edit(bench.add(bench.read()), 2, id=identity)
    bench.kick()


def other_ids(bench: Bench) -> None:
    """Give the descriptors before the last other ids: they mean nothing."""
    head = bench.add(bench.read())
    bench.ring.edit(head, 0, id=65535)
    bench.ring.edit(head, 1, id=65535)
    bench.kick()


def same_id_twice(bench: Bench) -> None:
    """Use one id for two chains of a batch: it says nothing to the device, and comes back twice."""
    identity = bench.add(bench.read(0))
    bench.ring.free.insert(0, identity)
    bench.add(bench.read(1))
    bench.kick()


def around_the_end(bench: Bench, *, wrong: bool) -> None:
    """Let a chain run over the end of the ring, where the wrap counter flips; or keep it, which is ``wrong``."""
    for _ in range(7):
        bench.send(bench.request(lib.VIRTIO_BLK_T_FLUSH).buffers)
    head = bench.add(bench.read())
    if wrong:
        bench.ring.edit(head, 2, flags=AVAIL | WRITE)
    bench.kick()


def event_at(bench: Bench, off_wrap: int, *, interrupts: bool) -> None:
    """Ask for an interrupt at a place in the ring; the chain that follows takes the slots 0 to 2."""
    bench.packed_ring.driver_event = EventSuppression(off_wrap, lib.VRING_PACKED_EVENT_FLAG_DESC)
    bench.send(bench.read())
    bench.expect(bench.interrupted == interrupts, f"off_wrap 0x{off_wrap:x}: interrupt {bench.interrupted}")


V = Variant
WRAP = 1 << lib.VRING_PACKED_EVENT_F_WRAP_CTR
WITH_EVENTS = World(without=0)
NOT_AVAILABLE = (
    V("wrap counter inverted", IGNORED, partial(first_flags, flags=USED | NEXT), rings=PACKED),
    V("marked as used", IGNORED, partial(first_flags, flags=AVAIL | USED | NEXT), rings=PACKED),
    V("neither", IGNORED, partial(first_flags, flags=NEXT), rings=PACKED),
    V("second inverted", needs_reset(Fault.PACKED_NOT_AVAILABLE), partial(second_flags, flags=USED), rings=PACKED),
    V("second used", needs_reset(Fault.PACKED_NOT_AVAILABLE), partial(second_flags, flags=AVAIL | USED), rings=PACKED),
)
IDS = (
    V("16", needs_reset(Fault.BUFFER_ID), partial(last_id, identity=16), rings=PACKED),
    V("65535", needs_reset(Fault.BUFFER_ID), partial(last_id, identity=65535), rings=PACKED),
    V("not the last one", OK, other_ids, rings=PACKED),
    V("duplicate", OK, same_id_twice, rings=PACKED),
)
ENDS = (
    V("right wrap", OK, partial(around_the_end, wrong=False), rings=PACKED),
    V("wrong wrap", needs_reset(Fault.PACKED_NOT_AVAILABLE), partial(around_the_end, wrong=True), rings=PACKED),
)
ODDITIES = (
    V("length 0", OK, partial(with_empty_buffer, position=1, gpa=DATA), rings=PACKED),
    V(
        "driver event in the hole",
        needs_reset(Fault.RING_ADDRESS),
        partial(queue_at, area=1, gpa=LOW_END),
        rings=PACKED,
    ),
    V(
        "device event in the hole",
        needs_reset(Fault.RING_ADDRESS),
        partial(queue_at, area=2, gpa=LOW_END),
        rings=PACKED,
    ),
    V("off_wrap 2", OK, partial(event_at, off_wrap=2 | WRAP, interrupts=True), WITH_EVENTS, PACKED),
    V("off_wrap 3", OK, partial(event_at, off_wrap=3 | WRAP, interrupts=False), WITH_EVENTS, PACKED),
    V("off_wrap 16", OK, partial(event_at, off_wrap=16 | WRAP, interrupts=True), WITH_EVENTS, PACKED),
    V("off_wrap 32767", OK, partial(event_at, off_wrap=0x7FFF, interrupts=True), WITH_EVENTS, PACKED),
)

"""Cases 1 to 10: rings, and chains as a whole.

In a chain of a read, the header is at position 0, the data at 1, the status at 2.
"""

from functools import partial

from kvmpy._shim import lib
from kvmpy.conformance.bench import DATA, Bench
from kvmpy.conformance.case import OK, Variant, needs_reset
from kvmpy.conformance.driver import HEADER, SEGMENT
from kvmpy.conformance.layout import NEXT, Buffer, Descriptor, ring_areas
from kvmpy.conformance.world import HIDDEN_SECTOR, World
from kvmpy.devices.virtqueue import Fault

SPLIT, PACKED = ("split",), ("packed",)
TOO_LONG = needs_reset(Fault.CHAIN_TOO_LONG)
SIXTEEN_PIECES = (32,) * 13 + (96, 1)
"""A sector and a status, cut so that with the header they fill a queue of 16."""


# --- 1 to 4: next -----------------------------------------------------------------------------------------------


def next_is_itself(bench: Bench, position: int) -> None:
    """Let a descriptor of a read be its own next."""
    head = bench.add(bench.read())
    index = bench.split.chain_of(head)[position]
    bench.split.edit(head, position, set_flags=NEXT, next=index)
    bench.kick()


def loop_through(bench: Bench, count: int) -> None:
    """Lead from the last of ``count`` readable descriptors to the first."""
    head = bench.ring.add([Buffer(DATA + 16 * i, 16) for i in range(count)])
    bench.split.edit(head, count - 1, set_flags=NEXT, next=head)
    bench.kick()


def status_leads_to_header(bench: Bench) -> None:
    """Lead from the status back to the header: into a loop, but first to a readable buffer behind writable ones."""
    head = bench.add(bench.read())
    bench.split.edit(head, 2, set_flags=NEXT, next=head)
    bench.kick()


def as_long_as_the_queue(bench: Bench) -> None:
    """Fill the queue with one chain."""
    bench.send(bench.read(writable=SIXTEEN_PIECES))


def longer_than_the_queue(bench: Bench) -> None:
    """Have one buffer more than the queue has descriptors, in an indirect table."""
    bench.send(bench.read(writable=(16, *SIXTEEN_PIECES[:-2], 80, 1)), table=DATA)


def goes_around_the_ring(bench: Bench) -> None:
    """Fill the packed ring with one chain, and say that it goes on."""
    head = bench.add(bench.read(writable=SIXTEEN_PIECES))
    bench.ring.edit(head, 15, set_flags=NEXT)
    bench.kick()


def next_beyond_the_table(bench: Bench, next: int) -> None:
    """Let the header's next be no descriptor."""
    bench.split.edit(bench.add(bench.read()), 0, next=next)
    bench.kick()


# --- 5 to 9: the available ring ---------------------------------------------------------------------------------


def head_beyond_the_table(bench: Bench, head: int) -> None:
    """Make available what is no descriptor, behind a request that is sound."""
    bench.add(bench.read())
    bench.split.offer(head)
    bench.kick()


def index_moves(bench: Bench, by: int) -> None:
    """Move the available index by itself, after two requests."""
    bench.send(bench.read())
    bench.send(bench.read())
    bench.split.avail_idx = (bench.split.avail_idx + by) % 2**16
    bench.notify()


def index_wraps(bench: Bench) -> None:
    """Let the index pass 65535, with an interrupt wanted just there: it must come once, and then."""
    ring = bench.split
    ring.set_descriptor(0, Descriptor(DATA, 16))
    for slot in range(ring.size):
        ring.set_avail(slot, 0)
    ring.used_event = 65535
    before = bench.copy()
    for _ in range(2**16 // ring.size + 1):
        bench.device.interrupt.acknowledge(lib.VIRTIO_MMIO_INT_VRING)
        passes = ring.avail_idx + ring.size == 2**16
        ring.avail_idx = ring.next_avail = (ring.avail_idx + ring.size) % 2**16
        bench.driver.notify()
        bench.expect(ring.used_idx == ring.avail_idx, f"served up to {ring.used_idx}, not {ring.avail_idx}")
        bench.expect(bench.interrupted == passes, f"at index {ring.used_idx} the interrupt is wrong")
    areas = ring_areas(ring.setup)
    bench.compare(before, areas[1:])
    ring.last_used = ring.used_idx
    bench.send(bench.read())


def ring_wraps(bench: Bench) -> None:
    """Go around a packed ring seven times."""
    for sector in range(40):
        bench.send(bench.read(sector))


def head_twice(bench: Bench) -> None:
    """Make one head available twice at once: two requests, and two answers."""
    bench.add_again(bench.add(bench.read()))
    bench.kick()


def head_again_in_flight(bench: Bench) -> None:
    """Make a head available again while its request is executed."""
    head = bench.add(bench.read(HIDDEN_SECTOR))
    allow_rings(bench)

    def again() -> None:
        bench.add_again(head)
        bench.ring.publish()

    bench.image.on_ask = again
    bench.kick()
    bench.expect(len(bench.answers) == 2, f"{len(bench.answers)} answers, not 2")


# --- 10: between validation and use -----------------------------------------------------------------------------


def allow_rings(bench: Bench) -> None:
    """Say that the driver writes its own side of the rings while the device is watched."""
    for gpa, size in ring_areas(bench.ring.setup):
        bench.allow(gpa, size)


def descriptors_change(bench: Bench) -> None:
    """Let each descriptor of the chain point elsewhere once the device has seen it."""
    head = bench.add(bench.read(HIDDEN_SECTOR))
    allow_rings(bench)

    def spoil() -> None:
        for position in range(3):
            bench.ring.edit(head, position, addr=2**64 - 8, len=2**32 - 1)

    bench.image.on_ask = spoil
    bench.kick()


def header_changes(bench: Bench) -> None:
    """Make a write of another sector out of a read, once the device has understood it."""
    buffers = bench.read(HIDDEN_SECTOR)
    bench.allow(buffers[0].gpa, HEADER.size)
    header = HEADER.pack(lib.VIRTIO_BLK_T_OUT, 0, 0)
    bench.image.on_ask = lambda: bench.memory.write(buffers[0].gpa, header)
    bench.send(buffers)


def table_changes(bench: Bench) -> None:
    """Fill the indirect table with something else, once the device has seen it."""
    bench.allow(DATA, 3 * 16)
    bench.image.on_ask = lambda: bench.memory.fill(DATA, 3 * 16, 0xFF)
    bench.send(bench.read(HIDDEN_SECTOR), table=DATA)


def segments_change(bench: Bench) -> None:
    """Let a discard name other sectors, once the device has found it sound."""
    segment = SEGMENT.pack(HIDDEN_SECTOR, 1, 0)
    buffers = bench.request(lib.VIRTIO_BLK_T_DISCARD, data_out=segment).buffers
    bench.allow(buffers[1].gpa, SEGMENT.size)
    bench.image.on_ask = lambda: bench.memory.write(buffers[1].gpa, SEGMENT.pack(2**63, 2**31, 2**31))
    bench.send(buffers)


# ----------------------------------------------------------------------------------------------------------------

V = Variant
LOOPS = (
    V("the header", TOO_LONG, partial(next_is_itself, position=0), rings=SPLIT),
    V("the status", TOO_LONG, partial(next_is_itself, position=2), rings=SPLIT),
)
LONG_LOOPS = (
    *(V(f"{n} descriptors", TOO_LONG, partial(loop_through, count=n), rings=SPLIT) for n in (2, 3, 16)),
    V("status to header", needs_reset(Fault.BUFFER_ORDER), status_leads_to_header, rings=SPLIT),
)
LONG_CHAINS = (
    V("as long as the queue", OK, as_long_as_the_queue),
    V("one more, indirect", TOO_LONG, longer_than_the_queue),
    V("around the ring", TOO_LONG, goes_around_the_ring, rings=PACKED),
)
NEXTS = tuple(
    V(f"next {n}", needs_reset(Fault.NEXT), partial(next_beyond_the_table, next=n), rings=SPLIT) for n in (16, 65535)
)
HEADS = tuple(
    V(f"head {n}", needs_reset(Fault.HEAD), partial(head_beyond_the_table, head=n), rings=SPLIT) for n in (16, 65535)
)
JUMPS = tuple(
    V(f"by {n}", needs_reset(Fault.AVAIL_INDEX), partial(index_moves, by=n), rings=SPLIT) for n in (17, 0x8000)
)
STEPS_BACK = tuple(
    V(f"by {-n}", needs_reset(Fault.AVAIL_INDEX), partial(index_moves, by=n), rings=SPLIT) for n in (-1, -2)
)
WRAPS = (
    V("index 65535 to 0", OK, index_wraps, World(without=0, size=256), SPLIT),
    V("seven times around", OK, ring_wraps, World(without=0), PACKED),
)
TWICE = (V("in one batch", OK, head_twice, rings=SPLIT), V("in flight", OK, head_again_in_flight, rings=SPLIT))
CHANGES = (
    V("descriptors", OK, descriptors_change),
    V("header", OK, header_changes),
    V("indirect table", OK, table_changes),
    V("discard segments", OK, segments_change),
)

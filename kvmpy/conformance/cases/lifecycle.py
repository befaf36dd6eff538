"""Cases 36 to 38, 40 and 41: the life of a device, from reset to reset."""

import threading
from functools import partial

from kvmpy._shim import lib
from kvmpy.conformance.bench import Bench
from kvmpy.conformance.case import IGNORED, OK, REFUSED, Variant, needs_reset
from kvmpy.conformance.cases.descriptors import BETWEEN_SLOTS, HIGH_END, LOW_END
from kvmpy.conformance.cases.ring import PACKED, SPLIT
from kvmpy.conformance.driver import ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK
from kvmpy.conformance.world import HIDDEN_SECTOR, World
from kvmpy.devices.queue_worker import QueueWorker
from kvmpy.devices.virtqueue import Fault

LIMIT = 10.0
"""Seconds that anything may take that is waited for."""
BAD_RING = needs_reset(Fault.RING_ADDRESS)


# --- 36: kicks that are for nobody ------------------------------------------------------------------------------


def kick_before_driver_ok(bench: Bench) -> None:
    """Kick too early: nothing may be consumed; with DRIVER_OK all is served, without another kick."""
    bench.driver.negotiate(bench.features)
    bench.driver.set_up_queue(0)
    bench.add(bench.read())
    bench.kick()
    bench.expect(bench.outstanding == 1 and not bench.interrupted, "a chain was consumed before DRIVER_OK")
    with bench.watched():
        bench.driver.set_status(DRIVER_OK)
    bench.take_back()


def kick_after_reset(bench: Bench) -> None:
    """Kick a ring that is no longer the device's."""
    bench.add(bench.read())
    bench.ring.publish()
    bench.driver.reset()
    bench.notify()
    bench.forget()


def kick_not_ready(bench: Bench) -> None:
    """Kick a queue that was described but never made ready."""
    bench.driver.negotiate(bench.features)
    ring = bench.driver.set_up_queue(0)
    bench.driver.set(lib.VIRTIO_MMIO_QUEUE_READY, 0)
    bench.driver.set_status(DRIVER_OK)
    bench.add(bench.read())
    bench.kick()
    bench.expect(bench.outstanding == 1 and not ring.used(), "a queue was served that is not ready")
    bench.forget()


def kick_nonexistent(bench: Bench, index: int) -> None:
    """Kick a queue that the device does not have; then one that it has."""
    bench.notify(index)
    bench.send(bench.read())


# --- 37 and 38: where a queue may be ----------------------------------------------------------------------------


def queue_of(bench: Bench, size: int) -> None:
    """Make a queue ready that has so many descriptors."""
    driver = bench.driver
    driver.negotiate(bench.features)
    driver.describe_queue(driver.place(0, 16)._replace(size=size))
    driver.set(lib.VIRTIO_MMIO_QUEUE_READY, 1)
    bench.expect(not driver.get(lib.VIRTIO_MMIO_QUEUE_READY), f"a queue of {size} is ready")


def odd_size(bench: Bench) -> None:
    """Use a queue whose size is no power of two, as packed rings may (§2.8.10.1)."""
    bench.driver.start(bench.features, size=5)
    for sector in range(9):
        bench.send(bench.read(sector))


def queue_at(bench: Bench, area: int, gpa: int) -> None:
    """Make a queue ready one of whose areas is somewhere else."""
    driver = bench.driver
    driver.negotiate(bench.features)
    setup = driver.place(0, 16)
    name = ("descriptor_area", "driver_area", "device_area")[area]
    driver.describe_queue(setup._replace(**{name: gpa}))
    driver.set(lib.VIRTIO_MMIO_QUEUE_READY, 1)
    bench.expect(not driver.get(lib.VIRTIO_MMIO_QUEUE_READY), f"a queue with its {name} at 0x{gpa:x} is ready")


def areas_overlap(bench: Bench) -> None:
    """Put all three areas at one place: the driver only harms itself, and nothing is available."""
    driver = bench.driver
    driver.negotiate(bench.features)
    setup = driver.place(0, 16)
    bench.memory.fill(setup.descriptor_area, 0x1000)
    bench.allow(setup.descriptor_area, 0x1000)
    driver.describe_queue(setup._replace(driver_area=setup.descriptor_area, device_area=setup.descriptor_area))
    driver.set(lib.VIRTIO_MMIO_QUEUE_READY, 1)
    with bench.watched():
        driver.set_status(DRIVER_OK)


def areas_change(bench: Bench) -> None:
    """Write other addresses and another size to a queue that is ready: it keeps what it has."""
    setup = bench.ring.setup
    bench.driver.describe_queue(setup._replace(size=4, descriptor_area=HIGH_END, driver_area=1, device_area=2**63))
    bench.send(bench.read())


# --- 40: features -----------------------------------------------------------------------------------------------


def accept_unoffered(bench: Bench, bit: int) -> None:
    """Accept a feature that was not offered: FEATURES_OK must not stick (§2.2.2)."""
    agreed = bench.driver.negotiate(bench.features | 1 << bit)
    bench.refuse(not agreed, f"FEATURES_OK with bit {bit}")


def accept_bit_64(bench: Bench) -> None:
    """Accept a feature of a word that nobody has."""
    driver = bench.driver
    driver.reset()
    driver.set_status(ACKNOWLEDGE | DRIVER)
    driver.accept(bench.features)
    driver.set(lib.VIRTIO_MMIO_DRIVER_FEATURES_SEL, 2)
    driver.set(lib.VIRTIO_MMIO_DRIVER_FEATURES, 1)
    driver.set_status(FEATURES_OK)
    bench.refuse(not driver.status & FEATURES_OK, "FEATURES_OK with bit 64")


def without_version_1(bench: Bench) -> None:
    """Accept all but VERSION_1: there is no older interface (§6.1)."""
    agreed = bench.driver.negotiate(bench.features & ~(1 << lib.VIRTIO_F_VERSION_1))
    bench.refuse(not agreed, "FEATURES_OK without VERSION_1")


def skip_features_ok(bench: Bench) -> None:
    """Go from DRIVER to DRIVER_OK, with a queue: nobody knows what its rings look like."""
    driver = bench.driver
    driver.reset()
    driver.set_status(ACKNOWLEDGE | DRIVER)
    driver.accept(bench.features)
    driver.set_up_queue(0)
    driver.set_status(DRIVER_OK)
    bench.refuse(not driver.status & DRIVER_OK, "DRIVER_OK without FEATURES_OK")


def features_change(bench: Bench) -> None:
    """Write other features to a device that is live: they are fixed since FEATURES_OK."""
    bench.driver.accept(0)
    bench.driver.accept(2**64 - 1)
    bench.send(bench.read())


# --- 41: resets -------------------------------------------------------------------------------------------------


def hold_a_read(bench: Bench) -> threading.Event:
    """Have a request executed that does not end before the event is set."""
    asked, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        asked.set()
        go_on.wait(LIMIT)

    bench.image.on_ask = hold
    bench.add(bench.read(HIDDEN_SECTOR))
    bench.ring.publish()
    bench.driver.notify()
    bench.expect(asked.wait(LIMIT), "the request was never executed")
    return go_on


def reset_in_flight(bench: Bench) -> None:
    """Reset the device while it executes a request: when the status reads 0, nobody writes to memory any more."""
    go_on = hold_a_read(bench)
    reset = threading.Thread(target=bench.driver.reset)
    reset.start()
    go_on.set()
    reset.join(LIMIT)
    bench.expect(not reset.is_alive(), "the reset does not return")
    bench.expect(bench.driver.status == 0, "the status is not 0")
    with bench.watched():
        alive = [thread.name for thread in threading.enumerate() if thread.name == "bench-queue0"]
        bench.expect(not alive, "a worker outlives the reset")
    bench.forget()
    bench.image.on_ask = None


def reset_storm(bench: Bench) -> None:
    """Bring the device up, send requests, and reset it without waiting, again and again."""
    for _ in range(50):
        bench.start()
        for sector in range(3):
            bench.add(bench.read(sector))
        bench.ring.publish()
        bench.driver.notify()
    bench.driver.reset()
    bench.forget()


def other_sizes(bench: Bench) -> None:
    """Bring the device up anew with queues of other sizes."""
    for size in (4, 256, 8):
        bench.driver.start(bench.features, size=size)
        bench.send(bench.read())


# ----------------------------------------------------------------------------------------------------------------

V = Variant

THREADED = World(make_worker=QueueWorker)
KICKS = (
    V("before DRIVER_OK", OK, kick_before_driver_ok),
    V("after reset", IGNORED, kick_after_reset),
    V("queue not ready", IGNORED, kick_not_ready),
    *(V(f"queue {n}", OK, partial(kick_nonexistent, index=n)) for n in (1, 0xFFFF, 0xFFFF_FFFF)),
)
SIZES = (
    *(V(str(n), BAD_RING, partial(queue_of, size=n)) for n in (0, 257, 512, 2**16 - 1, 2**32 - 1)),
    V("5", BAD_RING, partial(queue_of, size=5), rings=SPLIT),
    V("5", OK, odd_size, rings=PACKED),
)
AREAS = (
    *(
        V(f"{kind} area {name}", BAD_RING, partial(queue_at, area=area, gpa=gpa))
        for area, kind in enumerate(("descriptor", "driver", "device"))
        for name, gpa in (
            ("unaligned", 0x1_0001),
            ("in the hole", LOW_END),
            ("behind RAM", HIGH_END),
            ("across slots", BETWEEN_SLOTS - (16, 4, 4)[area]),
            ("to the end of 2^64", 2**64 - (16, 4, 4)[area]),
        )
        if not (name == "across slots" and area)
    ),
    V("driver area across the end", BAD_RING, partial(queue_at, area=1, gpa=HIGH_END - 4), rings=SPLIT),
    V("device area across the end", BAD_RING, partial(queue_at, area=2, gpa=HIGH_END - 4), rings=SPLIT),
    V("all in one place", IGNORED, areas_overlap),
    V("changed while ready", OK, areas_change),
)
FEATURES = (
    *(V(f"bit {n}", REFUSED, partial(accept_unoffered, bit=n)) for n in (1, 24, 33, 63)),
    V("bit 64", REFUSED, accept_bit_64),
    V("no VERSION_1", REFUSED, without_version_1),
    V("FEATURES_OK skipped", REFUSED, skip_features_ok),
    V("changed when live", OK, features_change),
)
RESETS = (
    V("in flight", IGNORED, reset_in_flight, THREADED),
    V("storm", IGNORED, reset_storm),
    V("storm, threads", IGNORED, reset_storm, THREADED),
    V("other sizes", OK, other_sizes),
)

"""What needs real vCPUs: kicks and resets that race, a storm of notifications, an interrupt nobody acknowledges.

The vCPUs are those of `kvmpy.conformance.guest`; the driver on the host sends the requests, and the storm of the
guest's notifications is what has them served.
"""

import threading
import time
from collections.abc import Callable

from kvmpy._shim import lib
from kvmpy.conformance import guest
from kvmpy.conformance.bench import DATA, REQUESTS, Bench
from kvmpy.conformance.case import IGNORED, OK, Variant
from kvmpy.conformance.cases.lifecycle import hold_a_read
from kvmpy.conformance.cases.ring import allow_rings
from kvmpy.conformance.driver import NO_STATUS
from kvmpy.conformance.guest import Guest, forever, increment, output, set_memory, store
from kvmpy.conformance.layout import DESCRIPTOR_SIZE, Buffer, ring_areas
from kvmpy.conformance.world import World
from kvmpy.devices.queue_worker import QueueWorker
from kvmpy.storage.disk import SECTOR_SIZE

LIMIT = 10.0
"""Seconds that anything may take that is waited for."""
READS = 50
NOTIFY = store(lib.VIRTIO_MMIO_QUEUE_NOTIFY, 0)
STORM = forever(NOTIFY + increment(guest.ROUNDS))
COUNT = forever(increment(guest.OTHER_ROUNDS))


def wait_until(true: Callable[[], bool]) -> bool:
    """Wait until something is true, which nobody tells us of; return whether it is."""
    end = time.monotonic() + LIMIT
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.0005)
    return True


def allow_requests(bench: Bench) -> None:
    """Say that the driver writes its requests and rings while memory is watched."""
    allow_rings(bench)
    bench.allow(REQUESTS, DATA - REQUESTS)


def read_in_storm(bench: Bench) -> bool:
    """Publish a read and let the guest's kicks have it served."""
    before = len(bench.returned)
    bench.add(bench.read(len(bench.returned) % 8))
    bench.ring.publish()

    def is_back() -> bool:
        bench.take_back()
        return len(bench.returned) > before

    return wait_until(is_back)


def moves(running: Guest, counter: int) -> bool:
    """Tell whether a vCPU gets on."""
    before = running.counter(counter)
    return wait_until(lambda: running.counter(counter) != before)


def notify_storm(bench: Bench) -> None:
    """Notify as fast as a vCPU can: requests are served, the other vCPU gets on, and nothing is exited to us."""
    allow_requests(bench)
    with Guest(bench, STORM, COUNT, irqfd=True) as storm:
        with bench.watched():
            served = [read_in_storm(bench) for _ in range(READS)]
        bench.expect(all(served), "a read was not served during the storm")
        bench.expect(moves(storm, guest.ROUNDS), "there are no notifications")
        bench.expect(moves(storm, guest.OTHER_ROUNDS), "the other vCPU starves")
        exits = sum(window.writes for window in storm.machine.mmio)
        bench.expect(exits == 0, f"{exits} notifications left the kernel")


def never_acknowledged(bench: Bench) -> None:
    """Take interrupts and never write InterruptACK: there is at most one for each batch; after all, it goes on."""
    allow_requests(bench)
    code = guest.START_PIC + guest.ENABLE_INTERRUPTS + STORM
    with Guest(bench, code, irqfd=True) as running:
        bench.expect(moves(running, guest.ROUNDS), "the guest does not start")
        with bench.watched():
            served = [read_in_storm(bench) for _ in range(READS)]
            came = wait_until(lambda: running.counter(guest.INTERRUPTS) > 0)
        interrupts = running.counter(guest.INTERRUPTS)
        bench.expect(all(served), "a read was not served")
        bench.expect(came and interrupts <= READS, f"{interrupts} interrupts for {READS} requests")
        bench.expect(bench.interrupted, "the status was acknowledged by nobody, and is clear")
        bench.expect(moves(running, guest.ROUNDS), "the vCPU is stuck in its handler")
        bench.driver.set(lib.VIRTIO_MMIO_INTERRUPT_ACK, lib.VIRTIO_MMIO_INT_VRING)
        read_in_storm(bench)
        more = wait_until(lambda: running.counter(guest.INTERRUPTS) > interrupts)
        bench.expect(more, "acknowledged at last, the guest has no more interrupts")


def changed_by_vcpu(bench: Bench) -> None:
    """Let a vCPU change an address all the time, from RAM to none and back, while the device reads it.

    Each time the device served what it saw, or refused it; what it never did is write anywhere else.
    """
    data = ring_areas(bench.ring.setup)[0][0] + DESCRIPTOR_SIZE
    flip = set_memory(data + 4, 0xFFFF_FFFF) + set_memory(data + 4, 0) + increment(guest.ROUNDS)
    allow_requests(bench)
    bench.allow(DATA, SECTOR_SIZE)
    with Guest(bench, forever(flip), irqfd=False) as running:
        bench.expect(moves(running, guest.ROUNDS), "the guest does not start")
        for _ in range(READS):
            bench.start()
            header, _, status = bench.read()
            bench.ring.add([header, Buffer(DATA, SECTOR_SIZE, True), status])
            bench.ring.publish()
            with bench.watched():
                bench.driver.notify()
            answer = bench.memory.read(status.gpa, 1)[0]
            told = bench.driver.needs_reset if answer == NO_STATUS else answer == lib.VIRTIO_BLK_S_OK
            bench.expect(told, f"status 0x{answer:x}, and no DEVICE_NEEDS_RESET")
    bench.start()
    bench.send(bench.read())


def kicks_through_resets(bench: Bench) -> None:
    """Kick all the time while the host's driver resets the device and brings it up again."""
    with Guest(bench, STORM, irqfd=True):
        for _ in range(20):
            bench.driver.reset()
            bench.forget()
            with bench.watched():
                bench.expect(bench.driver.status == 0, "the status is not 0")
            bench.start()
            bench.expect(read_in_storm(bench), "a read was not served after a reset")


def reset_by_vcpu(bench: Bench) -> None:
    """Let a vCPU reset the device while a request is executed: when its write is done, nobody writes any more."""
    go_on = hold_a_read(bench)
    code = store(lib.VIRTIO_MMIO_STATUS, 0) + output(guest.SIGNAL_PORT, 1) + forever(increment(guest.ROUNDS))
    with Guest(bench, code, irqfd=False) as running:
        bench.expect(not running.signal.seen.is_set(), "the reset did not wait for the request")
        go_on.set()
        bench.expect(running.signal.seen.wait(LIMIT), "the reset does not return")
        with bench.watched():
            alive = [thread for thread in threading.enumerate() if thread.name == "bench-queue0"]
            bench.expect(not alive, "a worker outlives the reset")
    bench.image.on_ask = None
    bench.forget()


V = Variant
THREADED = World(make_worker=QueueWorker)
KICKS = (V("by a vCPU, resets", OK, kicks_through_resets, THREADED, needs_kvm=True),)
RESETS = (V("by a vCPU", IGNORED, reset_by_vcpu, THREADED, needs_kvm=True),)
CHANGES = (V("by a vCPU", OK, changed_by_vcpu, needs_kvm=True),)
STORMS = (V("", OK, notify_storm, THREADED, needs_kvm=True),)
UNACKNOWLEDGED = (V("", OK, never_acknowledged, THREADED, needs_kvm=True),)

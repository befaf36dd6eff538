"""Cases 39 and 42: registers, accessed as no driver does."""

from kvmpy._shim import lib
from kvmpy.conformance.bench import Bench
from kvmpy.conformance.case import OK, Variant
from kvmpy.conformance.world import SECTORS
from kvmpy.devices.virtio_mmio import MMIO_SIZE, QUEUE_RESET
from kvmpy.machine.bus import Bus

QUEUE_REGISTERS = (lib.VIRTIO_MMIO_QUEUE_NUM_MAX, lib.VIRTIO_MMIO_QUEUE_READY, QUEUE_RESET)
"""What reads as something of the queue that QueueSel selects."""


def no_such_queue(bench: Bench) -> None:
    """Select queue 0xffff, and read and write every register but Status."""
    driver = bench.driver
    driver.set(lib.VIRTIO_MMIO_QUEUE_SEL, 0xFFFF)
    for register in QUEUE_REGISTERS:
        bench.expect(driver.get(register) == 0, f"register 0x{register:x} of queue 0xffff is not 0")
    for register in range(0, lib.VIRTIO_MMIO_CONFIG, 4):
        if register not in (lib.VIRTIO_MMIO_STATUS, lib.VIRTIO_MMIO_QUEUE_SEL):
            driver.get(register)
            driver.set(register, 0xFFFF_FFFF)
    driver.set(lib.VIRTIO_MMIO_QUEUE_SEL, 0)
    bench.send(bench.read())


def odd_accesses(bench: Bench) -> None:
    """Access each register with widths that it does not have, and unaligned: nothing happens."""
    before = bench.driver.status
    for offset in range(lib.VIRTIO_MMIO_CONFIG):
        for size in (1, 2, 8, *((4,) if offset % 4 else ())):
            bench.expect(len(bench.device.read(offset, size)) == size, f"a read of {size} bytes is not that long")
            bench.device.write(offset, bytes(size))
    bench.expect(bench.driver.status == before, "an odd access changed the status")
    bench.send(bench.read())


def last_byte_and_past(bench: Bench) -> None:
    """Access the last byte of the window, across its end, and behind it, by way of the bus."""
    base = lib.KVMPY_VIRTIO_MMIO
    bus = Bus("memory", 1 << 52)
    bus.attach(base, MMIO_SIZE, bench.device, name="disk")
    for address, size in ((base + MMIO_SIZE - 1, 1), (base + MMIO_SIZE - 4, 8), (base + MMIO_SIZE, 4)):
        bench.expect(len(bus.read(address, size)) == size, f"a read at 0x{address:x} is not {size} bytes long")
        bus.write(address, b"\xff" * size)
    bench.send(bench.read())


def read_only_config(bench: Bench) -> None:
    """Write every field of the configuration but writeback, in every width."""
    before = bench.device.read(lib.VIRTIO_MMIO_CONFIG, 64)
    for offset in range(64):
        for size in (1, 2, 4, 8):
            if not offset <= 32 < offset + size:
                bench.device.write(lib.VIRTIO_MMIO_CONFIG + offset, b"\xff" * size)
    bench.expect(bench.device.read(lib.VIRTIO_MMIO_CONFIG, 64) == before, "a read-only field was changed")
    bench.send(bench.read())


def config_changes(bench: Bench) -> None:
    """Read the capacity while it changes: the generation tells, and an interrupt comes."""
    for sectors in (SECTORS // 2, SECTORS):
        before = bench.driver.get(lib.VIRTIO_MMIO_CONFIG_GENERATION)
        bench.device.interrupt.acknowledge(lib.VIRTIO_MMIO_INT_CONFIG)
        with bench.block.exclusive():
            bench.image.resize(sectors)
        bench.expect(bench.driver.get(lib.VIRTIO_MMIO_CONFIG_GENERATION) != before, "the generation did not change")
        bench.expect(bench.driver.config(0, 8) == sectors, "the capacity is another")
        status = bench.driver.get(lib.VIRTIO_MMIO_INTERRUPT_STATUS)
        bench.expect(status & lib.VIRTIO_MMIO_INT_CONFIG, "there was no configuration interrupt")
    bench.send(bench.read(SECTORS - 1))


# ----------------------------------------------------------------------------------------------------------------

V = Variant

NO_QUEUE = (V("", OK, no_such_queue),)
ACCESSES = (
    V("other widths", OK, odd_accesses),
    V("the window's end", OK, last_byte_and_past),
    V("read-only fields", OK, read_only_config),
    V("ConfigGeneration", OK, config_changes),
)

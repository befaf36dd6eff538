"""A driver's side of virtio-mmio registers, and a tiny virtio device to be behind them."""

import os
import select
import struct
import threading

from kvmpy._shim import lib
from kvmpy.devices.virtio_device import Identity, feature_bits
from kvmpy.devices.virtio_mmio import QUEUE_RESET, VirtioMmio
from kvmpy.devices.virtqueue import Fault
from kvmpy.machine.memory import GuestMemory
from kvmpy.units import MiB

CAMPAIGN = 10_000
ROUNDS = CAMPAIGN if os.environ.get("KVMPY_CAMPAIGN") == "1" else CAMPAIGN // 50
LIMIT = 10.0
"""Seconds that anything may take that a test waits for."""
ACKNOWLEDGE, DRIVER = lib.VIRTIO_CONFIG_S_ACKNOWLEDGE, lib.VIRTIO_CONFIG_S_DRIVER
FEATURES_OK, DRIVER_OK = lib.VIRTIO_CONFIG_S_FEATURES_OK, lib.VIRTIO_CONFIG_S_DRIVER_OK
NEEDS_RESET, FAILED = lib.VIRTIO_CONFIG_S_NEEDS_RESET, lib.VIRTIO_CONFIG_S_FAILED
NEGOTIATED = ACKNOWLEDGE | DRIVER | FEATURES_OK
LIVE = NEGOTIATED | DRIVER_OK
VERSION_1 = feature_bits(lib.VIRTIO_F_VERSION_1)
RING_RESET = feature_bits(lib.VIRTIO_F_RING_RESET)
PACKED = feature_bits(lib.VIRTIO_F_RING_PACKED)
TICKER_FEATURE = feature_bits(3)
RINGS = 0x10000
"""gpa of the rings of queue 0; each queue has 64 KiB."""

FAULT, RAISE, WAIT = 0xF000_0001, 0xF000_0002, 0xF000_0003
"""What a word in the descriptor area tells a `TickerQueue` to do; no count ever gets there. Else it counts."""


class TickerQueue:
    """A queue that counts how often it is looked at, in the first word of its device area, in guest memory."""

    def __init__(self, device, memory, setup, interrupt, kick_fd):
        self._device, self._memory, self.setup = device, memory, setup
        self._interrupt, self._kick_fd = interrupt, kick_fd
        self._stop_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.stopped = False
        self.closed = False

    def process(self):
        (order,) = struct.unpack("<I", self._memory.read(self.setup.descriptor_area, 4))
        if order == FAULT:
            return Fault.HEAD
        if order == RAISE:
            raise RuntimeError("a defect in a device")
        if order == WAIT:
            # What a read from a slow disk is: under way, and in nobody's power to cancel.
            self._device.entered.set()
            assert self._device.gate.wait(LIMIT)
        (count,) = struct.unpack("<I", self._memory.read(self.setup.device_area, 4))
        self._memory.write(self.setup.device_area, struct.pack("<I", count + 1))
        self._interrupt.raise_(lib.VIRTIO_MMIO_INT_VRING)
        with self._device.looked:
            self._device.looked.notify_all()
        return None

    def serve(self):
        poll = select.poll()
        poll.register(self._kick_fd, select.POLLIN)
        poll.register(self._stop_fd, select.POLLIN)
        while not self.stopped:
            fault = self.process()
            if fault is not None:
                return fault
            if any(fd == self._kick_fd for fd, _ in poll.poll(LIMIT * 1000)):
                os.eventfd_read(self._kick_fd)
        return None

    def stop(self):
        assert not self.closed, "a queue is stopped after it was closed"
        self.stopped = True
        self._device.told_to_stop.set()
        os.eventfd_write(self._stop_fd, 1)

    def close(self):
        if not self.closed:
            self.closed = True
            os.close(self._stop_fd)


class Letters:
    """A configuration space of the letters a to p, all in one case, which `swap` changes."""

    def __init__(self):
        self._lock = threading.Lock()
        self.generation = 0
        self.text = b"abcdefghijklmnop"

    def read(self, offset, size):
        with self._lock:
            return self.text[offset : offset + size].ljust(size, b"\0")

    def write(self, offset, data):
        pass

    def swap(self):
        with self._lock:
            self.text = self.text.swapcase()
            self.generation += 1


class Ticker:
    """A virtio device of queues that count; ``looked`` is notified of it.

    A queue that was told to WAIT sets ``entered`` and goes on when ``gate`` is set; one that shall end sets
    ``told_to_stop``.
    """

    def __init__(self, memory, queues=2):
        self.identity = Identity(42, VERSION_1 | RING_RESET | PACKED | TICKER_FEATURE, queues)
        self.config = Letters()
        self.on_config_change = None
        self.negotiated = []
        self.opened = []
        self.gate, self.entered = threading.Event(), threading.Event()
        self.told_to_stop = threading.Event()
        self.looked = threading.Condition()
        self._memory = memory

    def negotiate(self, features):
        self.negotiated.append(features)

    def open_queue(self, setup, interrupt, kick_fd):
        queue = TickerQueue(self, self._memory, setup, interrupt, kick_fd)
        self.opened.append(queue)
        return queue


class MmioDriver:
    """What a driver does with the registers of one device. Everything is one 4-byte access a line."""

    def __init__(self, mmio, memory):
        self.mmio, self.memory = mmio, memory

    def read(self, register):
        data = self.mmio.read(register, 4)
        assert len(data) == 4
        return int.from_bytes(data, "little")

    def write(self, register, value):
        self.mmio.write(register, value.to_bytes(4, "little"))

    @property
    def status(self):
        return self.read(lib.VIRTIO_MMIO_STATUS)

    @status.setter
    def status(self, value):
        self.write(lib.VIRTIO_MMIO_STATUS, value)

    def offered(self):
        """Return the device's features, all 64."""
        words = []
        for sel in (0, 1):
            self.write(lib.VIRTIO_MMIO_DEVICE_FEATURES_SEL, sel)
            words.append(self.read(lib.VIRTIO_MMIO_DEVICE_FEATURES))
        return words[0] | words[1] << 32

    def accept(self, features):
        """Write the driver's features, in as many words as they have."""
        for sel in range(max(2, (features.bit_length() + 31) // 32)):
            self.write(lib.VIRTIO_MMIO_DRIVER_FEATURES_SEL, sel)
            self.write(lib.VIRTIO_MMIO_DRIVER_FEATURES, features >> 32 * sel & 0xFFFF_FFFF)

    def negotiate(self, features=VERSION_1):
        """Go from a reset to FEATURES_OK, or as far as the device goes; return the status."""
        self.status = 0
        self.status = ACKNOWLEDGE
        self.status = ACKNOWLEDGE | DRIVER
        self.accept(features)
        self.status = NEGOTIATED
        return self.status

    def areas(self, index):
        """Return where this driver puts the three parts of a queue."""
        base = RINGS + 0x10000 * index
        return base, base + 0x4000, base + 0x8000

    def set_queue(self, index, *, size=8, areas=None):
        """Write a queue's size and addresses, and make it ready; return what QueueReady reads."""
        self.write(lib.VIRTIO_MMIO_QUEUE_SEL, index)
        self.write(lib.VIRTIO_MMIO_QUEUE_NUM, size)
        lows = (lib.VIRTIO_MMIO_QUEUE_DESC_LOW, lib.VIRTIO_MMIO_QUEUE_AVAIL_LOW, lib.VIRTIO_MMIO_QUEUE_USED_LOW)
        for low, gpa in zip(lows, areas or self.areas(index), strict=True):
            self.write(low, gpa & 0xFFFF_FFFF)
            self.write(low + 4, gpa >> 32)
        self.write(lib.VIRTIO_MMIO_QUEUE_READY, 1)
        return self.ready(index)

    def ready(self, index):
        self.write(lib.VIRTIO_MMIO_QUEUE_SEL, index)
        return self.read(lib.VIRTIO_MMIO_QUEUE_READY)

    def stop_queue(self, index):
        self.write(lib.VIRTIO_MMIO_QUEUE_SEL, index)
        self.write(lib.VIRTIO_MMIO_QUEUE_READY, 0)

    def reset_queue(self, index):
        self.write(lib.VIRTIO_MMIO_QUEUE_SEL, index)
        self.write(QUEUE_RESET, 1)

    def start(self, features=VERSION_1, *, queues=(0, 1), size=8):
        """Go from a reset to a live device."""
        assert self.negotiate(features) == NEGOTIATED
        for index in queues:
            assert self.set_queue(index, size=size) == 1
        self.status = LIVE
        assert self.status & DRIVER_OK

    def kick(self, index):
        self.write(lib.VIRTIO_MMIO_QUEUE_NOTIFY, index)

    def acknowledge(self):
        """Return what the device interrupts for, and acknowledge it."""
        bits = self.read(lib.VIRTIO_MMIO_INTERRUPT_STATUS)
        self.write(lib.VIRTIO_MMIO_INTERRUPT_ACK, bits)
        return bits

    # --- what only a Ticker has ---

    def order(self, index, order):
        """Tell a `TickerQueue` what to do when it looks."""
        self.memory.write(self.areas(index)[0], struct.pack("<I", order))

    def count(self, index):
        """Return how often a `TickerQueue` has looked."""
        return int.from_bytes(self.memory.read(self.areas(index)[2], 4), "little")


class Bench:
    """A Ticker behind registers, with its memory; ``errors`` is what its workers raised."""

    def __init__(self, make_worker, queues=2):
        self.memory = GuestMemory(2 * MiB)
        self.device = Ticker(self.memory, queues)
        self.errors = []
        self.failed = threading.Event()
        self.mmio = VirtioMmio(
            self.device, self.memory, name="ticker0", on_error=self._on_error, make_worker=make_worker
        )
        self.driver = MmioDriver(self.mmio, self.memory)

    def _on_error(self, error):
        self.errors.append(error)
        self.failed.set()

    def wait_for_count(self, index, count):
        """Return when queue ``index`` has looked ``count`` times."""
        with self.device.looked:
            assert self.device.looked.wait_for(lambda: self.driver.count(index) >= count, LIMIT)

    def close(self):
        self.device.gate.set()
        self.mmio.close()
        self.memory.close()


def wait_for_config_interrupt(mmio):
    """Return when the device has interrupted for its configuration."""
    poll = select.poll()
    poll.register(mmio.interrupt.fd, select.POLLIN)
    while not mmio.interrupt.status & lib.VIRTIO_MMIO_INT_CONFIG:
        assert poll.poll(LIMIT * 1000), "no interrupt in time"
        os.eventfd_read(mmio.interrupt.fd)


def in_thread(function):
    """Run ``function`` in a thread; return it, started."""
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread


def joined(thread):
    """Wait for a thread; tell whether it has ended in time."""
    thread.join(LIMIT)
    return not thread.is_alive()

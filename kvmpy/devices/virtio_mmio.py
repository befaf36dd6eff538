"""virtio-mmio, version 2: the registers through which a guest finds, configures and drives one virtio device.

::

    0x000 R  MagicValue "virt"      0x030  W QueueSel               0x080  W QueueDescLow    0x084  W QueueDescHigh
    0x004 R  Version 2              0x034 R  QueueNumMax            0x090  W QueueDriverLow  0x094  W QueueDriverHigh
    0x008 R  DeviceID               0x038  W QueueNum               0x0a0  W QueueDeviceLow  0x0a4  W QueueDeviceHigh
    0x00c R  VendorID               0x044 RW QueueReady             0x0ac  W SHMSel
    0x010 R  DeviceFeatures         0x050  W QueueNotify            0x0b0 R  SHMLenLow       0x0b4 R  SHMLenHigh
    0x014  W DeviceFeaturesSel      0x060 R  InterruptStatus        0x0b8 R  SHMBaseLow      0x0bc R  SHMBaseHigh
    0x020  W DriverFeatures         0x064  W InterruptACK           0x0c0 RW QueueReset
    0x024  W DriverFeaturesSel      0x070 RW Status                 0x0fc R  ConfigGeneration    0x100 Config ...

    Status:  0 --ACKNOWLEDGE--> 1 --DRIVER--> 3 --FEATURES_OK--> 11 --DRIVER_OK--> 15: the queues that are ready live
             ^                                  the features are fixed                  |
             +---- write 0: every queue drained, then all as in the beginning ----------+---> | DEVICE_NEEDS_RESET
                                                                                              | FAILED: queues end
The steps are taken in this order or not at all: a bit that comes too early, or whose condition does not hold, reads
back as 0. That is how the specification has FEATURES_OK refused (§2.2.2); DRIVER_OK is treated alike, because without
agreed features nobody knows what the rings look like. No bit is cleared but by a reset.

Registers are 4 bytes wide and aligned; any other access to them reads zeros and changes nothing, and so does one to
what is no register. What may only be written reads as zero. With KVM most of the traffic never comes here: QueueNotify
is an ioeventfd, the interrupt registers are the run loop's. The GSI is an edge (see `kvmpy.devices.interrupt`), so an
acknowledgement lowers no line.

Not here: what the device is for (`VirtioDevice`), how a queue is served (`kvmpy.devices.queue_worker`).

Source: virtio 1.2 §2.1 to §2.6, §3.1, §4.2.
"""

from collections.abc import Callable
from contextlib import ExitStack
from threading import Lock

from kvmpy._shim import lib
from kvmpy.devices.interrupt import Interrupt
from kvmpy.devices.queue_worker import MakeWorker, QueueWorker
from kvmpy.devices.virtio_device import VirtioDevice
from kvmpy.devices.virtio_mmio_queue import ADDRESS_REGISTERS, MmioQueue, setup_fault
from kvmpy.devices.virtqueue import QUEUE_SIZE_MAX, Fault
from kvmpy.machine.bus import Action, FastRange
from kvmpy.machine.memory import GuestMemory

MMIO_SIZE = 0x1000
MAGIC = int.from_bytes(b"virt", "little")
VERSION = 2
VENDOR_ID = int.from_bytes(b"KVMP", "little")
QUEUE_RESET = 0x0C0
"""The one register that the kernel's header does not name."""

STEPS = (
    lib.VIRTIO_CONFIG_S_ACKNOWLEDGE,
    lib.VIRTIO_CONFIG_S_DRIVER,
    lib.VIRTIO_CONFIG_S_FEATURES_OK,
    lib.VIRTIO_CONFIG_S_DRIVER_OK,
)
ENDED = lib.VIRTIO_CONFIG_S_NEEDS_RESET | lib.VIRTIO_CONFIG_S_FAILED
"""With one of these in the status nothing is served until a reset."""
SHM_REGISTERS = (
    lib.VIRTIO_MMIO_SHM_LEN_LOW,
    lib.VIRTIO_MMIO_SHM_LEN_HIGH,
    lib.VIRTIO_MMIO_SHM_BASE_LOW,
    lib.VIRTIO_MMIO_SHM_BASE_HIGH,
)


class VirtioMmio:
    """One device on the memory bus: `read` and `write` for its 4 KiB, from any vCPU's thread.

    ``interrupt.fd`` wants an irqfd, and each of ``kick_fds`` an ioeventfd on QueueNotify with its index as the data.
    ``fault`` is what broke the device last, since its reset. ``on_error`` gets what a queue's worker raised, which is
    a defect of ours or the host's refusal, never the guest's doing; it may run inside `write`, and must not wait for
    the guest.

    Two locks. `_writing` is held during each write of the guest, also while a reset waits for the workers: writes of
    other vCPUs wait with it. No worker ever takes it. `_changing` guards the status against a worker that reports a
    fault and a disk that changes; nobody waits for anything inside.
    """

    def __init__(
        self,
        device: VirtioDevice,
        memory: GuestMemory,
        *,
        name: str,
        on_error: Callable[[BaseException], None],
        make_worker: MakeWorker = QueueWorker,
    ) -> None:
        self.name = name
        self.fault: Fault | None = None
        self._device, self._memory = device, memory
        self._on_error, self._make_worker = on_error, make_worker
        self._identity = device.identity
        with ExitStack() as undo:
            self.interrupt = undo.enter_context(Interrupt())
            self._queues = [undo.enter_context(MmioQueue(index)) for index in range(self._identity.queues)]
            undo.pop_all()
        self._writing, self._changing = Lock(), Lock()
        self._status = 0
        self._clear()
        device.on_config_change = self._config_changed

    def _clear(self) -> None:
        self._device_features_sel = self._driver_features_sel = self._queue_sel = 0
        self._driver_features = 0
        self._accepts_unknown = False

    @property
    def status(self) -> int:
        """The status register: ``lib.VIRTIO_CONFIG_S_*``."""
        return self._status

    @property
    def kick_fds(self) -> tuple[int, ...]:
        """The eventfd of each queue, by its index."""
        return tuple(queue.kick_fd for queue in self._queues)

    def fast_ranges(self) -> list[FastRange]:
        """Return what C may answer: what an interrupt handler reads and writes."""
        word = self.interrupt.word
        return [
            FastRange(lib.VIRTIO_MMIO_INTERRUPT_STATUS, 4, on_read=Action.WORD, word=word),
            FastRange(lib.VIRTIO_MMIO_INTERRUPT_ACK, 4, on_write=Action.CLEAR, word=word),
        ]

    def close(self) -> None:
        """Drain the queues and close the eventfds; the vCPUs run no more. Closing twice is harmless."""
        with self._writing:
            self._drain()
            for queue in self._queues:
                queue.close()
            self.interrupt.close()

    # --- reading ---

    def read(self, offset: int, size: int) -> bytes:
        """Return a register, or ``size`` bytes of the configuration."""
        if offset >= lib.VIRTIO_MMIO_CONFIG:
            return self._device.config.read(offset - lib.VIRTIO_MMIO_CONFIG, size)
        if size != 4:
            return bytes(size)
        return (self._read_register(offset) & 0xFFFF_FFFF).to_bytes(4, "little")

    def _read_register(self, register: int) -> int:
        match register:
            case lib.VIRTIO_MMIO_MAGIC_VALUE:
                return MAGIC
            case lib.VIRTIO_MMIO_VERSION:
                return VERSION
            case lib.VIRTIO_MMIO_DEVICE_ID:
                return self._identity.device_id
            case lib.VIRTIO_MMIO_VENDOR_ID:
                return VENDOR_ID
            case lib.VIRTIO_MMIO_DEVICE_FEATURES:
                return self._identity.features >> 32 * self._device_features_sel
            case lib.VIRTIO_MMIO_INTERRUPT_STATUS:
                return self.interrupt.status
            case lib.VIRTIO_MMIO_STATUS:
                return self._status
            case lib.VIRTIO_MMIO_CONFIG_GENERATION:
                return self._device.config.generation
            case _ if register in SHM_REGISTERS:
                return 0xFFFF_FFFF  # no such region (§4.2.2)
        queue = self._selected()
        return self._read_queue(queue, register) if queue is not None else 0

    def _read_queue(self, queue: MmioQueue, register: int) -> int:
        match register:
            case lib.VIRTIO_MMIO_QUEUE_NUM_MAX:
                return QUEUE_SIZE_MAX
            case lib.VIRTIO_MMIO_QUEUE_READY:
                return int(queue.ready)
            case _ if register == QUEUE_RESET:
                return int(queue.resetting)
        return 0

    def _selected(self) -> MmioQueue | None:
        return self._queues[self._queue_sel] if self._queue_sel < len(self._queues) else None

    # --- writing ---

    def write(self, offset: int, data: bytes) -> None:
        """Take a write of the guest."""
        with self._writing:
            if offset >= lib.VIRTIO_MMIO_CONFIG:
                self._device.config.write(offset - lib.VIRTIO_MMIO_CONFIG, data)
            elif len(data) == 4:
                self._write_register(offset, int.from_bytes(data, "little"))

    def _write_register(self, register: int, value: int) -> None:
        match register:
            case lib.VIRTIO_MMIO_DEVICE_FEATURES_SEL:
                self._device_features_sel = value
            case lib.VIRTIO_MMIO_DRIVER_FEATURES_SEL:
                self._driver_features_sel = value
            case lib.VIRTIO_MMIO_DRIVER_FEATURES:
                self._write_driver_features(value)
            case lib.VIRTIO_MMIO_QUEUE_SEL:
                self._queue_sel = value
            case lib.VIRTIO_MMIO_QUEUE_NOTIFY:
                self._notify(value)
            case lib.VIRTIO_MMIO_INTERRUPT_ACK:
                self.interrupt.acknowledge(value)
            case lib.VIRTIO_MMIO_STATUS:
                self._write_status(value)
            case _:
                queue = self._selected()
                if queue is not None:
                    self._write_queue(queue, register, value)

    def _write_driver_features(self, value: int) -> None:
        if self._status & lib.VIRTIO_CONFIG_S_FEATURES_OK:
            return
        shift = 32 * self._driver_features_sel
        if shift > 32:
            # We offer no bit above 63, and do not keep what was never offered: it refuses FEATURES_OK until a reset.
            self._accepts_unknown |= value != 0
            return
        self._driver_features = self._driver_features & ~(0xFFFF_FFFF << shift) | value << shift

    def _write_queue(self, queue: MmioQueue, register: int, value: int) -> None:
        match register:
            case lib.VIRTIO_MMIO_QUEUE_READY if value == 1:
                self._make_ready(queue)
            case lib.VIRTIO_MMIO_QUEUE_READY if value == 0:
                queue.drain()
                queue.ready = False
            case _ if register == QUEUE_RESET and value == 1:
                self._reset_queue(queue)
            case lib.VIRTIO_MMIO_QUEUE_NUM:
                queue.write(register, value)
            case _ if register in ADDRESS_REGISTERS:
                queue.write(register, value)

    def _notify(self, index: int) -> None:
        """Have a queue looked at. One that is not live, or not there, is not: nobody may consume its buffers."""
        worker = self._queues[index].worker if index < len(self._queues) else None
        if worker is not None and not self._status & ENDED:
            worker.kick()

    # --- the status machine ---

    def _write_status(self, value: int) -> None:
        if value == 0:
            self._reset()
        elif value & lib.VIRTIO_CONFIG_S_FAILED:
            self._set(lib.VIRTIO_CONFIG_S_FAILED)
            self._drain()
        elif not self._status & ENDED:
            self._advance(value)

    def _advance(self, value: int) -> None:
        """Take the steps that ``value`` has, in their order, up to the first that it lacks or that is refused."""
        for step in STEPS:
            if self._status & step:
                continue
            if not value & step or (step == lib.VIRTIO_CONFIG_S_FEATURES_OK and not self._negotiate()):
                return
            self._set(step)
        for queue in self._queues:
            if queue.ready and queue.worker is None:
                self._start(queue)

    def _set(self, bits: int) -> None:
        with self._changing:
            self._status |= bits

    def _negotiate(self) -> bool:
        """Accept the driver's features: a subset of what is offered, with VERSION_1, which has no older interface."""
        accepted = self._driver_features
        if self._accepts_unknown or accepted & ~self._identity.features or not accepted >> lib.VIRTIO_F_VERSION_1 & 1:
            return False
        self._device.negotiate(accepted)
        return True

    def _reset(self) -> None:
        """Put all back as in the beginning. Nothing writes to guest memory any more when the status reads 0 (§2.4)."""
        self._drain()
        for queue in self._queues:
            queue.clear()
        self._clear()
        self._device.negotiate(0)
        self.fault = None
        with self._changing:
            self.interrupt.acknowledge(self.interrupt.status)
            self._status = 0

    def _drain(self) -> None:
        """Return when no queue is served any more; all end at the same time."""
        for queue in self._queues:
            queue.stop()
        for queue in self._queues:
            queue.drain()

    # --- the life of a queue ---

    def _make_ready(self, queue: MmioQueue) -> None:
        """QueueReady: check the rings. The queue lives from DRIVER_OK on, or now when it comes back from a reset."""
        if self._status & ENDED or not self._status & lib.VIRTIO_CONFIG_S_FEATURES_OK:
            return
        live = self._status & lib.VIRTIO_CONFIG_S_DRIVER_OK
        if live and not queue.was_reset:
            return  # queues are set up before DRIVER_OK (§3.1.1)
        fault = setup_fault(self._memory, queue.setup(self._driver_features))
        if fault is not None:
            self._break(fault)
            return
        queue.ready, queue.was_reset = True, False
        if live:
            self._start(queue)

    def _reset_queue(self, queue: MmioQueue) -> None:
        """QueueReset: drain one queue and forget its registers; the device lives on (§2.6.1)."""
        negotiated = self._status & lib.VIRTIO_CONFIG_S_FEATURES_OK and self._driver_features
        if not negotiated >> lib.VIRTIO_F_RING_RESET & 1:
            return
        queue.resetting = True
        queue.drain()
        queue.clear()
        queue.was_reset = True

    def _start(self, queue: MmioQueue) -> None:
        """Have a queue served from now on. Where the host has no thread for it, the device is broken."""
        if self._status & ENDED:
            return
        try:
            served = self._device.open_queue(queue.setup(self._driver_features), self.interrupt, queue.kick_fd)
            try:
                queue.worker = self._make_worker(
                    served,
                    name=f"{self.name}-queue{queue.index}",
                    kick_fd=queue.kick_fd,
                    on_fault=self._break,
                    on_error=self._worker_failed,
                )
            except BaseException:
                served.close()
                raise
        except Exception as error:
            self._worker_failed(error)
        if self._status & ENDED:
            queue.stop()  # another queue has broken the device when there was no worker to be stopped yet

    def _worker_failed(self, error: BaseException) -> None:
        self._on_error(error)  # first: a guest that sees the device broken may end the run, and nobody would hear of it
        self._break(None)

    def _break(self, fault: Fault | None) -> None:
        """Say that the device needs a reset, and have its queues end. From any thread; does not wait for them."""
        self.fault = fault
        self._set(lib.VIRTIO_CONFIG_S_NEEDS_RESET)
        for queue in self._queues:
            queue.stop()
        if self._status & lib.VIRTIO_CONFIG_S_DRIVER_OK:
            self.interrupt.raise_(lib.VIRTIO_MMIO_INT_CONFIG)

    def _config_changed(self) -> None:
        """Tell the driver that the configuration has changed, once there is one: it reads it from DRIVER on."""
        with self._changing:
            if self._status & lib.VIRTIO_CONFIG_S_DRIVER:
                self.interrupt.raise_(lib.VIRTIO_MMIO_INT_CONFIG)

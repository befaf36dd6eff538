"""A virtio console between a driver and the ring that the host reads."""

from virtio_bench import DATA, VirtioBench

from kvmpy.devices.output import SerialOutput
from kvmpy.devices.queue_worker import InlineWorker
from kvmpy.devices.virtio_console import RECEIVEQ, TRANSMITQ, VirtioConsole
from kvmpy.units import KiB


class ConsoleBench(VirtioBench):
    """``output`` is that ring, of ``capacity`` bytes."""

    def __init__(self, *, capacity=64 * KiB, make_worker=InlineWorker):
        self.output = SerialOutput(capacity)
        super().__init__(lambda memory: VirtioConsole(memory, self.output), make_worker)

    def send(self, *texts, gpa=DATA, **options):
        """Have the guest print ``texts``, each in a buffer of its own, as one chain."""
        buffers = []
        for text in texts:
            self.memory.write(gpa, text)
            buffers.append((gpa, len(text), False))
            gpa += len(text)
        return self.offer(TRANSMITQ, *buffers, **options)

    def feed(self, data):
        """Feed, and notify: without a thread nobody else looks at the ring."""
        self.device.feed(data)
        self.driver.notify(RECEIVEQ)

    def close(self):
        super().close()
        self.output.close()

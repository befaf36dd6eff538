"""vCPUs that do one thing for ever to the device on the bench: what a request stream cannot show.

They share the bench's memory and its device, which has an irqfd and an ioeventfd for each queue, as on a real
board. Each runs a dozen bytes of machine code, below, in 64-bit mode; the driver on the host keeps the rings.

::

    CODE + 0x000  vCPU 0's loop        TABLES          IDT: one gate, for the interrupt of the device
    CODE + 0x100  vCPU 1's loop        COUNTERS + 0    rounds of vCPU 0
    CODE + 0x200  interrupt handler    COUNTERS + 4    rounds of vCPU 1
                                       COUNTERS + 8    interrupts

Not here: what is expected of the device meanwhile.
"""

import threading
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Self

from kvmpy._shim import lib
from kvmpy.conformance.bench import Bench
from kvmpy.kvm import Kvm, Vcpu
from kvmpy.machine import layout, x86
from kvmpy.machine.machine import Machine

CODE, TABLES, COUNTERS, STACK = 0x2_8000, 0x2_9000, 0x2_A000, 0x2_C000
CODE_SIZE, HANDLER_AT = 0x100, CODE + 0x200
ROUNDS, OTHER_ROUNDS, INTERRUPTS = COUNTERS, COUNTERS + 4, COUNTERS + 8
GSI = 5
"""An ISA interrupt that no device of a bench has."""
VECTOR_BASE = 0x20
GATE_SIZE = 16
SIGNAL_PORT = 0xF4

REGISTERS = lib.KVMPY_VIRTIO_MMIO


def _dword(value: int) -> bytes:
    return value.to_bytes(4, "little")


def increment(address: int) -> bytes:
    """incl address"""
    return b"\xff\x04\x25" + _dword(address)


def store(register: int, value: int) -> bytes:
    """movl $value, register(%rbx): where the device is"""
    return b"\xc7\x43" + bytes([register]) + _dword(value)


def set_memory(address: int, value: int) -> bytes:
    """movl $value, address"""
    return b"\xc7\x04\x25" + _dword(address) + _dword(value)


def output(port: int, value: int) -> bytes:
    """movb $value, %al; outb %al, $port"""
    return bytes((0xB0, value, 0xE6, port))


def forever(body: bytes) -> bytes:
    """1: body; jmp 1b"""
    return body + b"\xeb" + (-len(body) - 2 & 0xFF).to_bytes(1, "little")


ENABLE_INTERRUPTS = b"\xfb"
START_PIC = b"".join(
    output(port, value)
    for port, value in (
        (0x20, 0x11),  # ICW1: edge-triggered, with ICW4 (Intel 8259A datasheet, "Initialization Command Words")
        (0x21, VECTOR_BASE),  # ICW2
        (0x21, 0x04),  # ICW3: a slave on line 2
        (0x21, 0x01),  # ICW4: 8086
        (0x21, 0xFF & ~(1 << GSI)),  # the mask
    )
)
HANDLER = b"\x50" + increment(INTERRUPTS) + output(0x20, 0x20) + b"\x58\x48\xcf"
"""pushq %rax; incl; end of interrupt; popq %rax; iretq. It never touches the device."""


class Signal:
    """A port: the first write to it sets ``seen``."""

    def __init__(self) -> None:
        self.seen = threading.Event()

    def read(self, offset: int, size: int) -> bytes:
        """Return zeros."""
        return bytes(size)

    def write(self, offset: int, data: bytes) -> None:
        """Set ``seen``."""
        self.seen.set()


class Guest:
    """A vCPU on ``bench`` for each of ``codes``, running until it is closed.

    ``irqfd`` leads the device's interrupt to the guest; without, the driver on the host may wait for it.
    ``signal.seen`` is set when a vCPU writes SIGNAL_PORT. The memory it uses is allowed to change.

    Raises:
        KvmError: the host refused; KvmUnavailable where there is no KVM.
    """

    def __init__(self, bench: Bench, *codes: bytes, irqfd: bool) -> None:
        self._bench = bench
        self.signal = Signal()
        with ExitStack() as undo:
            kvm = undo.enter_context(Kvm())
            self.machine = Machine(kvm, bench.memory, cores=len(codes))
            undo.callback(self.machine.close)
            self._attach(irqfd)
            self._load(codes)
            self.machine.power_on(lambda vcpu: None)
            for thread in self.machine.threads:
                thread.call(_start)
            self.machine.run()
            self._undo = undo.pop_all()

    def _attach(self, irqfd: bool) -> None:
        device, machine = self._bench.device, self.machine
        machine.pio.attach(SIGNAL_PORT, 1, self.signal, name="signal")
        machine.mmio.attach(REGISTERS, layout.VIRTIO_MMIO_SIZE, device, name="disk")
        for index, fd in enumerate(device.kick_fds):
            machine.vm.ioeventfd(fd, REGISTERS + lib.VIRTIO_MMIO_QUEUE_NOTIFY, 4, datamatch=index)
        if irqfd:
            machine.vm.irqfd(device.interrupt.fd, GSI)

    def _load(self, codes: Sequence[bytes]) -> None:
        memory = self._bench.memory
        x86.write_boot_tables(memory, long=True)
        memory.fill(CODE, STACK - CODE)
        for vcpu_id, code in enumerate(codes):
            memory.write(CODE + CODE_SIZE * vcpu_id, code)
        memory.write(HANDLER_AT, HANDLER)
        # A 64-bit interrupt gate: present, type 14 (Intel SDM vol. 3, figure 6-8).
        gate = (HANDLER_AT & 0xFFFF) | x86.CODE_SELECTOR << 16 | 0x8E00 << 32 | HANDLER_AT >> 16 << 48
        memory.write(TABLES + GATE_SIZE * (VECTOR_BASE + GSI), gate.to_bytes(GATE_SIZE, "little"))
        self._bench.allow(CODE, STACK - CODE)
        # The processor marks what it walks as accessed.
        self._bench.allow(layout.BOOT_PAGE_TABLES, layout.BOOT_PAGE_TABLES_SIZE)

    def counter(self, gpa: int) -> int:
        """Return one of the counters: it runs on, and wraps."""
        return int.from_bytes(self._bench.memory.read(gpa, 4), "little")

    def close(self) -> None:
        """Stop the vCPUs. Closing twice is harmless."""
        self._undo.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _start(vcpu: Vcpu) -> None:
    # First of all: a processor that still waits for its SIPI does not take registers.
    vcpu.set_mp_state(lib.KVM_MP_STATE_RUNNABLE)
    x86.long_mode(vcpu, CODE + CODE_SIZE * vcpu.vcpu_id)
    with vcpu.edit_sregs() as sregs:
        sregs.idt.base, sregs.idt.limit = TABLES, GATE_SIZE * 256 - 1
    with vcpu.edit_regs() as regs:
        regs.rsp, regs.rbx = STACK, REGISTERS

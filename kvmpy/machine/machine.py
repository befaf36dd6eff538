"""A bare board: a VM with memory, in-kernel interrupt controllers, two buses and its vCPUs, each on its thread.

Knows no device and no boot protocol: what hangs on the buses and where the first vCPU starts is decided above.
"""

import errno
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from enum import StrEnum
from typing import NamedTuple, Self

from kvmpy._shim import lib
from kvmpy.errors import CapabilityMissing
from kvmpy.kvm import (
    BudgetSpent,
    DeadlinePassed,
    Debug,
    Exit,
    ExitPort,
    InternalError,
    Intr,
    IoIn,
    IoOut,
    Kvm,
    MmioRead,
    MmioWrite,
    RangeTable,
    Shutdown,
    Space,
    SystemEvent,
    Vcpu,
)
from kvmpy.kvm.ranges import FastRange
from kvmpy.kvm.vm import IrqchipRoute
from kvmpy.machine import layout, mptable
from kvmpy.machine.bus import AddressRange, Bus, Mode
from kvmpy.machine.completer import Completer
from kvmpy.machine.cpuid import cpuid_for
from kvmpy.machine.memory import GuestMemory
from kvmpy.machine.vcpu_thread import VcpuThread

PORTS = 1 << 16
PHYSICAL_ADDRESSES = 1 << 52
LINT0, LINT1 = 0x350, 0x360  # local APIC registers (Intel SDM vol. 3, table 11-1)
LVT_EXTINT, LVT_NMI = 0x700, 0x400
MAX_XAPIC_ID = 254
IOAPIC_PINS = 24


class EndReason(StrEnum):
    """Why a machine stopped."""

    EXIT_PORT = "exit port"
    POWER_OFF = "power-off"
    PANIC = "kernel panic"
    RESET = "reset"
    SHUTDOWN = "triple fault"
    INTERNAL_ERROR = "KVM internal error"
    UNHANDLED = "unhandled exit"
    HALTED = "halted for ever"
    BUDGET = "exit budget spent"
    TIMEOUT = "timeout"
    INTERRUPTED = "interrupted"
    ERROR = "error"


class End(NamedTuple):
    """The end of a run: why, who met it, and what came with it."""

    reason: EndReason
    vcpu_id: int | None = None
    value: int = 0
    exit: Exit | None = None
    error: BaseException | None = None


def _pc_routes() -> Iterator[IrqchipRoute]:
    """Wire the GSIs as a PC does: ISA interrupts reach a PIC and the IOAPIC, the PIT's GSI 0 the IOAPIC's pin 2.

    KVM's own table has GSI 0 on pin 0; the MP table and the MADT say pin 2, as on every PC.
    """
    for gsi in range(16):
        chip = lib.KVM_IRQCHIP_PIC_MASTER if gsi < 8 else lib.KVM_IRQCHIP_PIC_SLAVE
        yield IrqchipRoute(gsi, chip, gsi % 8)
    for gsi in range(IOAPIC_PINS):
        if gsi != mptable.PIT_PIN:
            yield IrqchipRoute(gsi, lib.KVM_IRQCHIP_IOAPIC, gsi or mptable.PIT_PIN)


Tracer = Callable[[Vcpu, Exit], None]


class Machine:
    """A board with ``cores`` vCPUs, which are created paused.

    ``on_end`` is called once, from the thread that met the end; all vCPUs are then out of the guest or on their way.
    ``host_cpus`` pins vCPU i to host CPU ``host_cpus[i]``; ``disable_exits`` is a mask of
    ``lib.KVM_X86_DISABLE_EXITS_*``. ``pio`` and ``mmio`` get their devices before `power_on`.

    Raises:
        KvmError: the host refused a part of it.
    """

    def __init__(
        self,
        kvm: Kvm,
        memory: GuestMemory,
        *,
        cores: int = 1,
        on_end: Callable[[End], None] = lambda end: None,
        host_cpus: Sequence[int] = (),
        disable_exits: int = 0,
    ) -> None:
        self.kvm, self.memory, self.cores = kvm, memory, cores
        self.pio = Bus("port", PORTS)
        self.mmio = Bus("memory", PHYSICAL_ADDRESSES)
        self.threads: list[VcpuThread] = []
        self.tracer: Tracer | None = None
        self.end: End | None = None
        self._on_end = on_end
        self._host_cpus = host_cpus
        self._end_lock = threading.RLock()  # re-entrant: a signal handler may end what its thread is just ending
        self._device_lock = threading.Lock()
        self.vm = kvm.create_vm()
        try:
            # In this order: a filter of MSRs behind memory slots, a slot behind an irqchip, waits for a grace period
            # of the host's kernel, 7 to 16 ms.
            self.completer = Completer(self.vm, memory)
            memory.map_into(self.vm)
            self._create_chips(disable_exits)
        except BaseException:
            self.vm.close()
            raise

    def _create_chips(self, disable_exits: int) -> None:
        vm = self.vm
        if disable_exits:
            vm.enable_cap(lib.KVM_CAP_X86_DISABLE_EXITS, disable_exits)
        if self.cores > MAX_XAPIC_ID:
            if not vm.check_extension(lib.KVM_CAP_X2APIC_API):
                raise CapabilityMissing(errno.EINVAL, "KVM_CAP_X2APIC_API", f"{self.cores} vCPUs need 32-bit APIC ids")
            vm.enable_cap(
                lib.KVM_CAP_X2APIC_API,
                lib.KVM_X2APIC_API_USE_32BIT_IDS | lib.KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK,
            )
        vm.set_identity_map_addr(layout.IDENTITY_MAP)
        vm.set_tss_addr(layout.TSS)
        vm.create_irqchip()
        vm.set_gsi_routing(_pc_routes())
        vm.create_pit2()

    # --- power --------------------------------------------------------------------------------------------------

    def power_on(self, start: Callable[[Vcpu], None]) -> None:
        """Create the vCPUs, paused, and let ``start`` set the first one's registers. Raises KvmError."""
        rows = list(self._fast_ranges())
        self._table = RangeTable((space, owner.base, fast) for space, owner, fast in rows)
        owners = {id(fast): owner for _, owner, fast in rows}
        self._rows = [(owners[id(fast)], fast) for fast in self._table.ranges]
        self._supported_cpuid = self.kvm.get_supported_cpuid()
        self._tsc_deadline = bool(self.kvm.check_extension(lib.KVM_CAP_TSC_DEADLINE_TIMER))
        for vcpu_id in range(self.cores):
            thread = VcpuThread(
                self.vm,
                vcpu_id,
                prepare=self._prepare,
                handle=self._handle if self.cores == 1 else self._handle_in_turn,
                on_error=self._on_error,
                host_cpu=self._host_cpus[vcpu_id] if self._host_cpus else None,
            )
            self.threads.append(thread)
            # In turn: the first vCPU created is the bootstrap processor, and an error names its vCPU.
            try:
                thread.call(lambda vcpu: None)
            except RuntimeError:
                assert self.end is not None
                raise self.end.error or RuntimeError("no vCPU") from None
        self.threads[0].call(start)

    def _fast_ranges(self) -> Iterator[tuple[Space, AddressRange, FastRange]]:
        for space, bus in ((Space.PIO, self.pio), (Space.MMIO, self.mmio)):
            for owner in bus:
                describe = getattr(owner.device, "fast_ranges", None)
                if describe is not None and owner.mode is Mode.C:
                    for fast in describe():
                        yield space, owner, fast

    def _prepare(self, vcpu: Vcpu) -> None:
        vcpu.set_cpuid2(cpuid_for(self._supported_cpuid, vcpu.vcpu_id, self.cores, tsc_deadline=self._tsc_deadline))
        vcpu.use_ranges(self._table)
        self.completer.attach(vcpu)
        # The PICs reach the first processor through LINT0: virtual-wire mode (MP specification 1.4 §3.6.2.2).
        lapic = vcpu.get_state("LAPIC")
        for register, value in ((LINT0, LVT_EXTINT), (LINT1, LVT_NMI)):
            for i, byte in enumerate(value.to_bytes(4, "little")):
                lapic.regs[register + i] = bytes([byte])
        vcpu.set_state("LAPIC", lapic)

    def run(self) -> None:
        """Let all vCPUs run (again); after the end they stay where they are."""
        if self.end is not None:
            return
        for thread in self.threads:
            if self.completer.finish_strings:
                thread.call(self.completer.begin)
            thread.resume()
        if self.end is not None:  # just now: its kick may have come before we resumed
            self._kick()

    def pause(self) -> None:
        """Take all vCPUs out of the guest; they are out on return, their last exits complete."""
        for thread in self.threads:
            thread.pause()

    def pause_ended(self) -> None:
        """Pause, where threads may have ended already."""
        for thread in self.threads:
            with suppress(RuntimeError):
                thread.pause()

    def vcpus(self) -> Iterator[Vcpu]:
        """Yield the vCPUs that were created."""
        return (thread.vcpu for thread in self.threads if thread.vcpu is not None)

    def exits_total(self) -> int:
        """Return the exits of all vCPUs so far."""
        return sum(vcpu.exits_total for vcpu in self.vcpus())

    def fast_use(self, owner: AddressRange) -> tuple[int, int]:
        """Return the (reads, writes) of ``owner``'s range that C answered, over all vCPUs."""
        reads = writes = 0
        for vcpu in self.vcpus():
            for (space_owner, _), (range_reads, range_writes) in zip(self._rows, vcpu.range_counts(), strict=True):
                if space_owner is owner:
                    reads, writes = reads + range_reads, writes + range_writes
        return reads, writes

    def assists(self) -> Counter[str]:
        """Return how often each assist was used, by name, over all vCPUs."""
        return self.completer.counts(self.vcpus())

    def finish(self, end: End) -> None:
        """Say that the run is over; only the first call counts. From any thread."""
        with self._end_lock:
            if self.end is not None:
                return
            self.end = end
        self._kick()
        self._on_end(end)

    def _kick(self) -> None:
        for vcpu in self.vcpus():
            vcpu.kick()

    def close(self) -> None:
        """Stop the threads and close the VM; closing twice is harmless. The memory is the caller's."""
        for thread in self.threads:
            thread.stop()
        for thread in self.threads:
            thread.join()
        self.vm.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- exits --------------------------------------------------------------------------------------------------

    def _handle(self, vcpu: Vcpu, exit: Exit) -> bool:
        """Serve one exit; False when this vCPU shall not go on."""
        if isinstance(exit, IoOut) and exit.count == 1:  # the commonest, before any pattern is tried
            self.pio.write(exit.port, exit.data)
        elif isinstance(exit, Intr):
            return self.end is None
        else:
            self._serve(vcpu, exit)
        if self.tracer is not None:
            self.tracer(vcpu, exit)
        return self.end is None

    def _handle_in_turn(self, vcpu: Vcpu, exit: Exit) -> bool:
        """As `_handle`, for several vCPUs: one at a time, so that a device needs no lock against the others."""
        if isinstance(exit, InternalError | Debug | DeadlinePassed):  # no device's
            return self._handle(vcpu, exit)
        with self._device_lock:
            return self._handle(vcpu, exit)

    def _serve(self, vcpu: Vcpu, exit: Exit) -> None:
        match exit:
            case IoIn(port=port, size=size, count=1):
                exit.reply(self.pio.read(port, size))
            case IoIn(port=port, size=size, count=count):
                exit.reply(b"".join(self.pio.read(port, size) for _ in range(count)))
            case IoOut(port=port, size=size, data=data):  # string I/O: each element reaches the device
                for at in range(0, len(data), size):
                    self.pio.write(port, data[at : at + size])
            case MmioWrite(phys_addr=gpa, data=data):
                self.mmio.write(gpa, data)
            case MmioRead(phys_addr=gpa, size=size):
                exit.reply(self.mmio.read(gpa, size))
            case _:
                if not self.completer.complete(vcpu, exit):
                    self._finish_with(vcpu, exit)

    def _finish_with(self, vcpu: Vcpu, exit: Exit) -> None:
        reason, value = EndReason.UNHANDLED, 0
        match exit:
            case ExitPort(value=value):
                reason = EndReason.EXIT_PORT
            case Shutdown():
                reason = EndReason.SHUTDOWN
            case InternalError():
                reason = EndReason.INTERNAL_ERROR
            case BudgetSpent():
                reason = EndReason.BUDGET
            case SystemEvent(type=lib.KVM_SYSTEM_EVENT_SHUTDOWN):
                reason = EndReason.POWER_OFF
            case SystemEvent(type=lib.KVM_SYSTEM_EVENT_RESET):
                reason = EndReason.RESET
        self.finish(End(reason, vcpu.vcpu_id, value, exit))

    def _on_error(self, vcpu_id: int, error: BaseException) -> None:
        self.finish(End(EndReason.ERROR, vcpu_id, error=error))

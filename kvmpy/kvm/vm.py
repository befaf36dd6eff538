"""The VM file descriptor: memory slots, interrupts, clocks; it creates vCPUs.

VM ioctls come from the process that created the VM: never fork with an open Vm.

Source: KVM API §4, "VM ioctls".
"""

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self

from kvmpy._shim import ffi, lib
from kvmpy.kvm.ioctl import ioctl, ioctl_value
from kvmpy.kvm.stats import read_stats
from kvmpy.kvm.vcpu import Vcpu
from kvmpy.units import PAGE_SIZE

if TYPE_CHECKING:
    from kvmpy.kvm.system import Kvm


class HostMemory(Protocol):
    """Memory of this process that can become a slot: ``size`` bytes at ``hva``, both page-aligned."""

    @property
    def hva(self) -> int: ...
    @property
    def size(self) -> int: ...


class MsiRoute(NamedTuple):
    """A GSI that is delivered as a message: ``address`` and ``data`` as a PCI device would write them."""

    gsi: int
    address: int
    data: int


class IrqchipRoute(NamedTuple):
    """A GSI that is a pin of an in-kernel chip (``lib.KVM_IRQCHIP_*``)."""

    gsi: int
    irqchip: int
    pin: int


class Vm:
    """A virtual machine. Closing it closes its vCPUs; it keeps its Kvm and the memory of its slots alive."""

    def __init__(self, kvm: "Kvm", fd: int) -> None:
        self.kvm = kvm
        self.fd = fd
        self._vcpus: list[Vcpu] = []
        self._slots: dict[int, HostMemory] = {}

    def check_extension(self, capability: int) -> int:
        """Return what KVM says of ``lib.KVM_CAP_*`` for this VM: 0 is absent."""
        return ioctl_value(self.fd, "KVM_CHECK_EXTENSION", capability)

    def enable_cap(self, capability: int, *args: int) -> None:
        """Enable a capability with up to four arguments. Raises KvmError."""
        request = ffi.new("struct kvm_enable_cap *", {"cap": capability, "args": list(args)})
        ioctl(self.fd, "KVM_ENABLE_CAP", request, f"cap={capability}")

    def create_vcpu(self, vcpu_id: int) -> Vcpu:
        """Create a vCPU; its ioctls shall come from the thread that calls this. Raises KvmError."""
        fd = ioctl_value(self.fd, "KVM_CREATE_VCPU", vcpu_id, f"vcpu_id={vcpu_id}")
        try:
            vcpu = Vcpu(self, vcpu_id, fd)
        except BaseException:
            os.close(fd)
            raise
        self._vcpus.append(vcpu)
        return vcpu

    # --- memory -------------------------------------------------------------------------------------------------

    def set_user_memory_region(self, *, slot: int, guest_phys_addr: int, memory: HostMemory, flags: int = 0) -> None:
        """Back guest physical memory from ``guest_phys_addr`` on with ``memory``, as ``slot``.

        ``flags``: ``lib.KVM_MEM_READONLY``, ``lib.KVM_MEM_LOG_DIRTY_PAGES``. Raises KvmError (EEXIST: overlaps
        another slot; EINVAL: unaligned, or a change that KVM does not allow). Source: KVM API §4.35.
        """
        self._set_region(slot, guest_phys_addr, memory.size, memory.hva, flags)
        self._slots[slot] = memory

    def delete_user_memory_region(self, slot: int) -> None:
        """Take ``slot`` away, also under a running guest: its accesses there become MMIO exits. Raises KvmError."""
        self._set_region(slot, 0, 0, 0, 0)
        self._slots.pop(slot, None)

    def _set_region(self, slot: int, gpa: int, size: int, hva: int, flags: int) -> None:
        region = ffi.new("struct kvm_userspace_memory_region *", [slot, flags, gpa, size, hva])
        ioctl(self.fd, "KVM_SET_USER_MEMORY_REGION", region, f"slot={slot} gpa=0x{gpa:x} size=0x{size:x}")

    def get_dirty_log(self, slot: int) -> bytes:
        """Return and clear the bitmap of pages written since the last call: bit n of it is page n of the slot.

        Source: KVM API §4.8.
        """
        pages = self._slots[slot].size // PAGE_SIZE
        bitmap = ffi.new("unsigned char[]", (pages + 63) // 64 * 8)
        log = ffi.new("struct kvm_dirty_log *", {"slot": slot})
        log.dirty_bitmap = bitmap
        ioctl(self.fd, "KVM_GET_DIRTY_LOG", log, f"slot={slot}")
        return bytes(ffi.buffer(bitmap))

    def set_tss_addr(self, gpa: int) -> None:
        """Say where KVM may keep three pages for real mode on Intel. Source: KVM API §4.15."""
        ioctl_value(self.fd, "KVM_SET_TSS_ADDR", gpa)

    def set_identity_map_addr(self, gpa: int) -> None:
        """Say where KVM may keep a page table for real mode on Intel. Source: KVM API §4.41."""
        ioctl(self.fd, "KVM_SET_IDENTITY_MAP_ADDR", ffi.new("uint64_t *", gpa))

    # --- interrupts ---------------------------------------------------------------------------------------------

    def create_irqchip(self) -> None:
        """Create PICs, IOAPIC and local APICs in the kernel; before the first vCPU. Source: KVM API §4.24."""
        ioctl_value(self.fd, "KVM_CREATE_IRQCHIP")

    def create_pit2(self) -> None:
        """Create an i8254 in the kernel, with the speaker port 0x61 stubbed. Source: KVM API §4.71."""
        ioctl(self.fd, "KVM_CREATE_PIT2", ffi.new("struct kvm_pit_config *", {"flags": lib.KVM_PIT_SPEAKER_DUMMY}))

    def get_irqchip(self, chip_id: int) -> Any:
        """Return a ``struct kvm_irqchip`` (``lib.KVM_IRQCHIP_*``)."""
        chip = ffi.new("struct kvm_irqchip *", {"chip_id": chip_id})
        ioctl(self.fd, "KVM_GET_IRQCHIP", chip)
        return chip

    def set_irqchip(self, chip: Any) -> None:
        """Set a chip from what `get_irqchip` gave."""
        ioctl(self.fd, "KVM_SET_IRQCHIP", chip)

    def irq_line(self, gsi: int, level: bool) -> None:
        """Set an interrupt pin of the in-kernel irqchip. Source: KVM API §4.25."""
        ioctl(self.fd, "KVM_IRQ_LINE", ffi.new("struct kvm_irq_level *", {"irq": gsi, "level": level}), f"gsi={gsi}")

    def irqfd(self, fd: int, gsi: int, *, resamplefd: int | None = None) -> None:
        """Raise ``gsi`` whenever the eventfd ``fd`` is written; a ``resamplefd`` makes it level-triggered.

        Source: KVM API §4.75.
        """
        flags = lib.KVM_IRQFD_FLAG_RESAMPLE if resamplefd is not None else 0
        request = ffi.new("struct kvm_irqfd *", {"fd": fd, "gsi": gsi, "flags": flags})
        request.resamplefd = resamplefd or 0
        ioctl(self.fd, "KVM_IRQFD", request, f"gsi={gsi}")

    def remove_irqfd(self, fd: int, gsi: int) -> None:
        """Undo `irqfd`."""
        request = ffi.new("struct kvm_irqfd *", {"fd": fd, "gsi": gsi, "flags": lib.KVM_IRQFD_FLAG_DEASSIGN})
        ioctl(self.fd, "KVM_IRQFD", request, f"gsi={gsi}")

    def ioeventfd(self, fd: int, address: int, size: int, *, pio: bool = False, datamatch: int | None = None) -> None:
        """Turn guest writes of ``size`` bytes (0: any) at ``address`` into writes of the eventfd ``fd``: no exit.

        Source: KVM API §4.59.
        """
        self._ioeventfd(fd, address, size, pio, datamatch, 0)

    def remove_ioeventfd(
        self, fd: int, address: int, size: int, *, pio: bool = False, datamatch: int | None = None
    ) -> None:
        """Undo `ioeventfd`; the arguments are the same."""
        self._ioeventfd(fd, address, size, pio, datamatch, lib.KVM_IOEVENTFD_FLAG_DEASSIGN)

    def _ioeventfd(self, fd: int, address: int, size: int, pio: bool, datamatch: int | None, flags: int) -> None:
        flags |= lib.KVM_IOEVENTFD_FLAG_PIO if pio else 0
        flags |= lib.KVM_IOEVENTFD_FLAG_DATAMATCH if datamatch is not None else 0
        request = ffi.new("struct kvm_ioeventfd *", [datamatch or 0, address, size, fd, flags])
        ioctl(self.fd, "KVM_IOEVENTFD", request, f"address=0x{address:x} size={size}")

    def signal_msi(self, address: int, data: int) -> bool:
        """Deliver a message-signalled interrupt; tell whether the guest took it. Source: KVM API §4.70."""
        request = ffi.new("struct kvm_msi *", [address & 0xFFFF_FFFF, address >> 32, data, 0])
        return ioctl(self.fd, "KVM_SIGNAL_MSI", request) > 0

    def set_gsi_routing(self, routes: Iterable[MsiRoute | IrqchipRoute]) -> None:
        """Replace the whole table of what each GSI means. Source: KVM API §4.52."""
        chosen = list(routes)
        table = ffi.new("struct kvm_irq_routing *", [len(chosen), 0, len(chosen)])
        for i, route in enumerate(chosen):
            entry = table.entries[i]
            entry.gsi = route.gsi
            if isinstance(route, MsiRoute):
                entry.type = lib.KVM_IRQ_ROUTING_MSI
                entry.u.msi.address_lo = route.address & 0xFFFF_FFFF
                entry.u.msi.address_hi = route.address >> 32
                entry.u.msi.data = route.data
            else:
                entry.type = lib.KVM_IRQ_ROUTING_IRQCHIP
                entry.u.irqchip.irqchip = route.irqchip
                entry.u.irqchip.pin = route.pin
        ioctl(self.fd, "KVM_SET_GSI_ROUTING", table)

    def filter_msr_writes(self, indices: Sequence[int]) -> None:
        """Bring guest writes of these MSRs, up to 16, to user space as Wrmsr; all other MSRs are KVM's as before.

        The next call replaces the list. Needs KVM_CAP_X86_USER_SPACE_MSR enabled with KVM_MSR_EXIT_REASON_FILTER,
        else the guest gets #GP. Source: KVM API §4.97.
        """
        none = ffi.new("__u8[]", 8)  # a bit each, of one MSR: denied; KVM copies whole words
        request = ffi.new("struct kvm_msr_filter *")
        for i, index in enumerate(indices):
            request.ranges[i] = (lib.KVM_MSR_FILTER_WRITE, 1, index, none)
        ioctl(self.fd, "KVM_X86_SET_MSR_FILTER", request, f"msrs {[f'0x{index:x}' for index in indices]}")

    # --- clocks and figures -------------------------------------------------------------------------------------

    def get_clock(self) -> int:
        """Return kvmclock in nanoseconds. Source: KVM API §4.29."""
        clock = ffi.new("struct kvm_clock_data *")
        ioctl(self.fd, "KVM_GET_CLOCK", clock)
        return int(clock.clock)

    def set_clock(self, clock_ns: int) -> None:
        """Set kvmclock to ``clock_ns`` nanoseconds."""
        ioctl(self.fd, "KVM_SET_CLOCK", ffi.new("struct kvm_clock_data *", {"clock": clock_ns}))

    def get_stats(self) -> dict[str, int]:
        """Return KVM's own statistics of this VM, by name. Raises KvmError where the host has none."""
        return read_stats(self.fd)

    # --- lifetime -----------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Close the vCPUs and the descriptor; closing twice is harmless. KVM takes 20 to 30 ms for it on some hosts."""
        while self._vcpus:
            self._vcpus.pop().close()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        self._slots.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

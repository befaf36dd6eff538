"""The vCPU file descriptor: run it, and read and write its state.

A vCPU's ioctls come from the thread that created it; only `kick` and `close` may be called from others.

Registers. An ioctl on a vCPU costs microseconds, so where the kernel has KVM_CAP_SYNC_REGS the general registers
travel in the shared page: each exit brings them, and a change goes back with the next KVM_RUN.

Source: KVM API §4, "vcpu ioctls"; §5, "The kvm_run structure".
"""

import errno
import mmap
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

from kvmpy._shim import ffi, lib
from kvmpy.errors import KvmError
from kvmpy.kvm import exits
from kvmpy.kvm.cpuid_entry import CpuidEntry
from kvmpy.kvm.decode import ExitRecord, decode, reason_name
from kvmpy.kvm.exits import Exit, IoOut
from kvmpy.kvm.ioctl import ioctl, ioctl_value, refuse
from kvmpy.kvm.ranges import RangeTable
from kvmpy.kvm.state import STATES, Regs, Sregs, Translation
from kvmpy.kvm.stats import read_stats

if TYPE_CHECKING:
    from kvmpy.kvm.vm import Vm

NO_BUDGET = (1 << 64) - 1
_REGS_SIZE = ffi.sizeof("struct kvm_regs")
# After an exit the processor's caches and predictors are cold, and each step costs several times what it does in a
# warm loop. So `next_exit` knows by name what it needs, and goes the shortest way to the commonest exit.
_kvmpy_run, _STOP_OUT = lib.kvmpy_run, lib.KVMPY_STOP_OUT
_ADDRESS, _DATA, _SIZE = 2, 3, 4  # struct kvmpy_exit in words
_BYTES = [bytes([value]) for value in range(256)]


class Vcpu:
    """One virtual processor; made by `Vm.create_vcpu`, which it keeps alive."""

    def __init__(self, vm: "Vm", vcpu_id: int, fd: int) -> None:
        self.vm = vm
        self.vcpu_id = vcpu_id
        self.fd = fd
        # Re-entrant: a signal handler may kick or close what this thread is just kicking.
        self._close_lock = threading.RLock()
        # The run page, as bytes and as a struct. Whoever uses the struct holds the bytes meanwhile: the page is
        # unmapped when nobody does, and that may be soon after another thread calls `close`.
        page = memoryview(mmap.mmap(fd, vm.kvm.get_vcpu_mmap_size()))
        self._page: tuple[memoryview, Any] = page, ffi.cast("struct kvm_run *", ffi.from_buffer(page))
        self._loop: Any = ffi.new("struct kvmpy_loop *")
        self._loop.run = self._page[1]
        self._loop.vcpu_fd = fd
        self._loop.max_exits = NO_BUDGET
        self._exit = memoryview(ffi.buffer(ffi.addressof(self._loop, "exit")))
        self._exit_words = self._exit[:40].cast("B").cast("Q")
        self._sync = bool(vm.kvm.check_extension(lib.KVM_CAP_SYNC_REGS) & lib.KVM_SYNC_X86_REGS)
        if self._sync:
            self._page[1].kvm_valid_regs = lib.KVM_SYNC_X86_REGS
        self._completed, self.assist = False, ffi.NULL
        self.use_ranges(RangeTable())

    # --- running ------------------------------------------------------------------------------------------------

    def use_ranges(self, table: RangeTable) -> None:
        """Let C answer the ranges of ``table``; the counts of each start at zero."""
        self._table = table
        self._counts = ffi.new("struct kvmpy_range_count[]", max(table.length, 1))
        self._loop.ranges = table.pointer
        self._loop.nr_ranges = table.length
        self._loop.counts = self._counts

    def use_assist(self, assist: Any) -> None:
        """Let C complete instructions that KVM could not, by this ``struct kvmpy_assist *``, which becomes `assist`."""
        self.assist = self._loop.assist = assist

    def next_exit(self) -> Exit:
        """Run the guest until an exit that is not C's, a kick, or the end of the budget, and return it.

        A signal lets Python's own handlers run (so that Ctrl-C works) and the guest then goes on.

        Raises:
            KvmError: KVM_RUN failed.
            ValueError: the vCPU is closed.
        """
        while True:
            stop = _kvmpy_run(self._loop)
            if stop == _STOP_OUT:
                words = self._exit_words
                data, size = words[_DATA], words[_SIZE]
                return IoOut(words[_ADDRESS], size, _BYTES[data] if size == 1 else data.to_bytes(size, "little"))
            if stop == 0:  # KVMPY_STOP_EXIT
                return decode(self._exit, *self._open_page())
            if stop != lib.KVMPY_STOP_SIGNAL:
                return self._stopped(stop)

    def _open_page(self) -> tuple[memoryview, Any]:
        """Return the run page. Raises ValueError: the vCPU is closed, or another thread is closing it."""
        page = self._page
        if self.fd < 0:
            raise ValueError(f"vCPU {self.vcpu_id} is closed")
        return page

    def _stopped(self, stop: int) -> Exit:
        self._open_page()
        if stop == lib.KVMPY_STOP_KICK:
            return exits.Intr()
        if stop == lib.KVMPY_STOP_BUDGET:
            return exits.BudgetSpent(self.exits_total)
        if stop == lib.KVMPY_STOP_DEADLINE:
            return exits.DeadlinePassed()
        if stop == lib.KVMPY_STOP_EXIT_PORT:
            return exits.ExitPort(int(self._loop.exit.data))
        refuse(self._loop.error, "KVM_RUN", f"vcpu_id={self.vcpu_id}")
        raise AssertionError("refuse always raises")

    def run(self, *, max_exits: int | None = None, timeout: float | None = None) -> Iterator[Exit]:
        """Yield each exit that C does not answer, until the caller leaves the loop.

        After ``max_exits`` exits (those answered in C included) it yields BudgetSpent, after ``timeout`` seconds
        DeadlinePassed, and ends; the limit ends with it. A `kick` yields Intr and goes on.
        """
        self.set_budget(max_exits=max_exits, timeout=timeout)
        try:
            while True:
                exit = self.next_exit()
                yield exit
                if isinstance(exit, exits.BudgetSpent | exits.DeadlinePassed):
                    return
        finally:
            self.set_budget()

    def set_budget(self, *, max_exits: int | None = None, timeout: float | None = None) -> None:
        """Stop after ``max_exits`` more exits or ``timeout`` seconds from now; None lifts the limit."""
        self._loop.max_exits = NO_BUDGET if max_exits is None else min(self.exits_total + max_exits, NO_BUDGET)
        self.set_deadline(timeout)

    def set_deadline(self, timeout: float | None) -> None:
        """Stop with DeadlinePassed ``timeout`` seconds from now; None lifts the limit."""
        deadline_ns = time.monotonic_ns() + int((timeout or 0) * 1e9)
        self._loop.deadline_ns = 0 if timeout is None else min(max(deadline_ns, 1), NO_BUDGET)

    def trace_exits(self, on: bool) -> None:
        """Return every exit to Python, also those that C could answer; or stop doing so."""
        self._set_flag(lib.KVMPY_LOOP_TO_PYTHON, on)

    def measure_time(self, on: bool) -> None:
        """Add up the TSC cycles spent inside KVM_RUN (`cycles_in_run`); or stop doing so."""
        self._set_flag(lib.KVMPY_LOOP_TIMES, on)

    def _set_flag(self, flag: int, on: bool) -> None:
        self._loop.flags = self._loop.flags | flag if on else self._loop.flags & ~flag

    def record_stamps(self, stamps: Any, capacity: int) -> None:
        """Write TSC pairs (KVM_RUN entered, KVM_RUN returned), one an exit, into ``stamps``, a ``uint64_t[]``.

        ``capacity`` is in pairs; recording stops when it is full. The caller keeps ``stamps`` alive. `ffi.NULL` and
        0 end the recording.
        """
        self._stamps = stamps
        self._loop.stamps = stamps
        self._loop.stamps_capacity = capacity
        self._loop.stamps_length = 0

    def complete(self) -> bool:
        """Finish the instruction of the last exit without running on; tell whether that made a new exit.

        Needed before registers are read or written, or state is saved, after an exit that was answered. The new exit,
        if any, is what `next_exit` returns next. Source: KVM API §5, KVM_EXIT_IO, the note on pending operations.
        """
        result = int(lib.kvmpy_complete(self._loop))
        if result < 0:
            refuse(-result, "KVM_RUN", f"vcpu_id={self.vcpu_id}, immediate_exit")
        self._completed = True
        return result > 0

    def kick(self) -> None:
        """Make the vCPU come back from the guest with Intr, now or at its next entry. From any thread."""
        with self._close_lock:
            if self.fd >= 0:
                lib.kvmpy_kick(self._loop)

    # --- what happened ------------------------------------------------------------------------------------------

    @property
    def exits_total(self) -> int:
        """The exits so far, those answered in C included."""
        return int(self._loop.exits_total)

    @property
    def cycles_in_run(self) -> int:
        """TSC cycles spent inside KVM_RUN while `measure_time` was on."""
        return int(self._loop.cycles_in_run)

    def exits_by_reason(self) -> dict[str, int]:
        """Return how many exits there were of each reason that occurred, by its KVM name without ``KVM_EXIT_``."""
        counts = ffi.unpack(self._loop.exits, lib.KVMPY_NR_REASONS)
        return {reason_name(reason): count for reason, count in enumerate(counts) if count}

    def range_counts(self) -> list[tuple[int, int]]:
        """Return (reads, writes) answered in C for each range of the table, in its order."""
        return [(self._counts[i].reads, self._counts[i].writes) for i in range(self._table.length)]

    def last_exits(self) -> list[ExitRecord]:
        """Return up to the last 64 exits, oldest first."""
        total = self.exits_total
        numbers = range(max(0, total - lib.KVMPY_RING), total)
        rows = (self._loop.ring[number % lib.KVMPY_RING] for number in numbers)
        return [
            ExitRecord(r.number, r.rip, r.address, r.data, r.reason, r.count, r.size, bool(r.is_write)) for r in rows
        ]

    def get_stats(self) -> dict[str, int]:
        """Return KVM's own statistics of this vCPU, by name. Raises KvmError where the host has none."""
        return read_stats(self.fd)

    # --- registers ----------------------------------------------------------------------------------------------

    def _regs_in_page(self) -> bool:
        """Tell whether the general registers in the run page are the vCPU's own: KVM_RUN has come back once."""
        return self._sync and (self._completed or self.exits_total > 0)

    def get_regs(self) -> Regs:
        """Return a copy of the general registers: no ioctl after an exit, where the host has sync regs."""
        regs: Regs = ffi.new("struct kvm_regs *")
        page, run = self._page
        if self._regs_in_page() and page:
            ffi.memmove(regs, lib.kvmpy_sync_regs(run), _REGS_SIZE)
        else:
            ioctl(self.fd, "KVM_GET_REGS", regs)
        return regs

    def set_regs(self, regs: Regs) -> None:
        """Set the general registers to what `get_regs` gave, changed."""
        page, run = self._page
        if self._regs_in_page() and page:
            ffi.memmove(lib.kvmpy_sync_regs(run), regs, _REGS_SIZE)
            run.kvm_dirty_regs |= lib.KVM_SYNC_X86_REGS
        else:
            ioctl(self.fd, "KVM_SET_REGS", regs)

    @contextmanager
    def edit_regs(self) -> Iterator[Regs]:
        """Finish the last exit, then give the general registers to the block and write them back after it.

        Raises:
            ValueError: finishing it made another exit (`complete`): the instruction would overwrite what is set here.
        """
        self._finish_instruction()
        regs = self.get_regs()
        yield regs
        self.set_regs(regs)

    def get_sregs(self) -> Sregs:
        """Return a copy of the segment, control and system registers."""
        sregs: Sregs = ffi.new("struct kvm_sregs *")
        ioctl(self.fd, "KVM_GET_SREGS", sregs)
        return sregs

    def set_sregs(self, sregs: Sregs) -> None:
        """Set the segment, control and system registers. Raises KvmError (EINVAL: a combination that cannot be)."""
        ioctl(self.fd, "KVM_SET_SREGS", sregs)

    @contextmanager
    def edit_sregs(self) -> Iterator[Sregs]:
        """Finish the last exit, then give the system registers to the block and write them back; as `edit_regs`."""
        self._finish_instruction()
        sregs = self.get_sregs()
        yield sregs
        self.set_sregs(sregs)

    def _finish_instruction(self) -> None:
        if self.complete():
            raise ValueError(f"vCPU {self.vcpu_id}: its instruction made another exit, take that first (next_exit)")

    # --- the rest of the state ----------------------------------------------------------------------------------

    def get_state(self, name: str) -> Any:
        """Return a copy of one more structure of the vCPU's state, by the name of its ioctl without ``KVM_GET_``.

        FPU, LAPIC, VCPU_EVENTS, DEBUGREGS, XSAVE, XCRS.
        """
        state = ffi.new(f"{STATES[name]} *")
        ioctl(self.fd, f"KVM_GET_{name}", state)
        return state

    def set_state(self, name: str, state: Any) -> None:
        """Set what `get_state` gave. Raises KvmError."""
        ioctl(self.fd, f"KVM_SET_{name}", state)

    def get_mp_state(self) -> int:
        """Return ``lib.KVM_MP_STATE_*``: runnable, halted, or an AP's way through INIT and SIPI."""
        state = ffi.new("struct kvm_mp_state *")
        ioctl(self.fd, "KVM_GET_MP_STATE", state)
        return int(state.mp_state)

    def set_mp_state(self, mp_state: int) -> None:
        """Set ``lib.KVM_MP_STATE_*``; needs the in-kernel irqchip."""
        ioctl(self.fd, "KVM_SET_MP_STATE", ffi.new("struct kvm_mp_state *", [mp_state]))

    def get_msrs(self, indices: Sequence[int]) -> dict[int, int]:
        """Return the MSRs that KVM can read, by index: it stops at the first that it cannot."""
        table = self._msr_table(dict.fromkeys(indices, 0))
        count = ioctl(self.fd, "KVM_GET_MSRS", table)
        return {table.entries[i].index: table.entries[i].data for i in range(count)}

    def set_msrs(self, msrs: dict[int, int]) -> None:
        """Set MSRs by index. Raises KvmError that names the first one which KVM refuses; those before it are set."""
        table = self._msr_table(msrs)
        count = ioctl(self.fd, "KVM_SET_MSRS", table)
        if count < len(msrs):
            refused = table.entries[count]
            raise KvmError(errno.EINVAL, "KVM_SET_MSRS", f"msr 0x{refused.index:x} = 0x{refused.data:x}")

    @staticmethod
    def _msr_table(msrs: dict[int, int]) -> Any:
        table = ffi.new("struct kvm_msrs *", [len(msrs), len(msrs)])
        for i, (index, data) in enumerate(msrs.items()):
            table.entries[i].index = index
            table.entries[i].data = data
        return table

    def set_cpuid2(self, entries: Sequence[CpuidEntry]) -> None:
        """Set what CPUID tells this vCPU; before its first KVM_RUN. Raises KvmError."""
        table = ffi.new("struct kvm_cpuid2 *", [len(entries), len(entries)])
        for i, e in enumerate(entries):
            row = table.entries[i]
            row.function, row.index, row.flags = e.function, e.index, e.flags
            row.eax, row.ebx, row.ecx, row.edx = e.eax, e.ebx, e.ecx, e.edx
        ioctl(self.fd, "KVM_SET_CPUID2", table, f"{len(entries)} entries")

    def set_guest_debug(self, control: int, debugreg: Sequence[int] = ()) -> None:
        """Ask for Debug exits: ``control`` of ``lib.KVM_GUESTDBG_*``, DR0..DR7. Source: KVM API §4.87."""
        request = ffi.new("struct kvm_guest_debug *", {"control": control})
        for i, value in enumerate(debugreg):
            request.arch.debugreg[i] = value
        ioctl(self.fd, "KVM_SET_GUEST_DEBUG", request)

    def interrupt(self, vector: int) -> None:
        """Queue an external interrupt; without an in-kernel irqchip. Source: KVM API §4.16."""
        ioctl(self.fd, "KVM_INTERRUPT", ffi.new("struct kvm_interrupt *", [vector]), f"vector={vector}")

    def nmi(self) -> None:
        """Queue an NMI. Source: KVM API §4.64."""
        ioctl_value(self.fd, "KVM_NMI")

    def request_interrupt_window(self, on: bool) -> None:
        """Ask for IrqWindowOpen as soon as the guest can take an interrupt."""
        page = self._open_page()
        page[1].request_interrupt_window = on

    def reply_msr(self, data: int | None) -> None:
        """Answer a Rdmsr (``data``) or Wrmsr (any number); None makes the guest's instruction raise #GP."""
        page = self._open_page()
        page[1].msr.error = data is None
        page[1].msr.data = data or 0

    def translate(self, linear_address: int) -> Translation:
        """Walk the guest's page tables. Source: KVM API §4.17."""
        walk = ffi.new("struct kvm_translation *", {"linear_address": linear_address})
        ioctl(self.fd, "KVM_TRANSLATE", walk)
        return Translation(walk.physical_address, bool(walk.valid), bool(walk.writeable))

    def get_tsc_khz(self) -> int:
        """Return the frequency of the guest's TSC in kHz."""
        return ioctl_value(self.fd, "KVM_GET_TSC_KHZ")

    # --- lifetime -----------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Close the descriptor, from any thread: a `next_exit` under way in another comes back with ValueError first.

        Closing twice is harmless.
        """
        with self._close_lock:
            if self.fd < 0:
                return
            fd, self.fd = self.fd, -1
            # The loop reads vcpu_fd at each entry: from here on it meets EBADF. The number must not be reused
            # before the thread inside has left.
            self._loop.vcpu_fd = -1
            lib.kvmpy_kick(self._loop)  # also the barrier between the store above and the load below
            while self._loop.tid:
                time.sleep(0)
                lib.kvmpy_kick(self._loop)
            lib.kvmpy_loop_close(self._loop)
            self._loop.run = ffi.NULL
            self._page = memoryview(b""), ffi.NULL
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

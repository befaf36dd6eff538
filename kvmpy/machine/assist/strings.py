"""Finishing long string instructions, where KVM executes ring 0 by its emulator: for speed alone.

There a REP STOS or REP MOVS costs half a microsecond an element: a kernel clears its bss for a third of a second, and
each new page of a program for a quarter of a millisecond. But a string instruction may be left after any element
(Intel SDM vol. 2, REP): the registers say how far it is. So whoever meets a vCPU at one may do the rest, at the speed
of the host's memory.

It is met in two ways. A timer takes the vCPU out of the guest from time to time and looks at RIP. And where it was met
so more than once, a breakpoint meets it always, as long as that is worth the exit.

Rights, accessed and dirty bits are those of the page tables, page by page. The first page that cannot be had ends it:
KVM executes what remains, and the fault is its own. Devices are no memory: they too are left to KVM. So are the page
tables themselves, those that CR3 leads to: KVM keeps shadows of them, and learns only of what the guest writes. It
keeps those of other address spaces, too. A kernel that cleared such a table by a string instruction, and not entry by
entry before it freed it, would find old translations; Linux does not, and for others nobody turns this on.

Floor: machine.
"""

import time
from typing import NamedTuple

from kvmpy._shim import lib
from kvmpy.errors import GuestMemoryError
from kvmpy.kvm import Vcpu
from kvmpy.kvm.state import Regs, Sregs
from kvmpy.machine import paging
from kvmpy.machine.assist.context import CR4_LA57, MAX_PHYS_ADDR, paging_of
from kvmpy.machine.guest_debug import ASSIST_SLOT, SLOTS, GuestDebug
from kvmpy.machine.memory import GuestMemory
from kvmpy.units import PAGE_SIZE

FIRST_LOOK, RAREST_LOOK = 0.001, 0.064  # seconds
WORTH_FINISHING = 64
"""Elements that must remain for a look to do anything."""
MEETINGS = 2
"""So often a look must find an instruction before it gets a breakpoint."""
TRIAL = 64
"""Every so many hits a breakpoint must have been worth them: WORTH_AN_EXIT elements each, on average."""
WORTH_AN_EXIT = 128
MOST_PAGES = 1024
"""At one go: the vCPU takes no interrupt meanwhile."""

MOST_SITES = 4096
"""Remembered at all: a guest that writes new ones for ever starts anew."""
OUR_SLOTS = frozenset(range(SLOTS)) - {ASSIST_SLOT}

RFLAGS_DF = 1 << 10


class StringInstruction(NamedTuple):
    """REP STOS or REP MOVS of elements of ``size`` bytes."""

    code: bytes
    size: int
    moves: bool


INSTRUCTIONS = (
    StringInstruction(b"\xf3\xaa", 1, False),
    StringInstruction(b"\xf3\xab", 4, False),
    StringInstruction(b"\xf3\x48\xab", 8, False),
    StringInstruction(b"\xf3\xa4", 1, True),
    StringInstruction(b"\xf3\xa5", 4, True),
    StringInstruction(b"\xf3\x48\xa5", 8, True),
)
LONGEST = 3


class _Site:
    """An instruction that has a breakpoint: how much it did in this trial, and when it was last hit."""

    def __init__(self, slot: int) -> None:
        self.slot, self.hits, self.elements = slot, 0, 0
        self.last_hit = time.monotonic()


class StringAssist:
    """One vCPU's. To be used from the vCPU's thread, between two exits."""

    def __init__(self, vcpu: Vcpu, memory: GuestMemory, debug: GuestDebug, max_phys_addr: int = MAX_PHYS_ADDR) -> None:
        self._vcpu, self._memory, self._debug = vcpu, memory, debug
        self._max_phys_addr = max_phys_addr
        self.finished = 0
        """Instructions of which this did a part."""
        self._interval = FIRST_LOOK
        self._met: dict[int, int] = {}
        self._sites: dict[int, _Site] = {}
        self._given_up: set[int] = set()

    def look(self) -> None:
        """Look whether the vCPU is at a string instruction and finish it; say when to look next."""
        done, rip = 0, int(self._vcpu.get_regs().rip)
        events = self._vcpu.get_state("VCPU_EVENTS")
        if not (events.exception.injected or events.exception.pending):
            done = self._finish(WORTH_FINISHING)
        if done:
            if len(self._met) + len(self._given_up) > MOST_SITES:
                self._met.clear()
                self._given_up.clear()
            self._meet(rip)
        self._interval = FIRST_LOOK if done else min(2 * self._interval, RAREST_LOOK)
        self._vcpu.set_deadline(self._interval)

    def hit(self, pc: int) -> bool:
        """Take a breakpoint at ``pc``; False: it is none of these."""
        site = self._sites.get(pc)
        if site is None:
            return False
        done = self._finish(1)
        site.last_hit = time.monotonic()
        site.hits += 1
        site.elements += done
        if site.hits == TRIAL:
            if site.elements < TRIAL * WORTH_AN_EXIT:
                self._give_up(pc)
                return True
            site.hits = site.elements = 0
        if not done:
            self._debug.step(True)  # KVM has to do it: with the breakpoint out of force
        return True

    def _meet(self, rip: int) -> None:
        self._met[rip] = self._met.get(rip, 0) + 1
        if self._met[rip] < MEETINGS or rip in self._sites or rip in self._given_up:
            return
        free = set(OUR_SLOTS) - {site.slot for site in self._sites.values()}
        if free:
            slot = free.pop()
        else:
            oldest = min(self._sites, key=lambda rip: self._sites[rip].last_hit)
            slot = self._sites.pop(oldest).slot
            self._met[oldest] = 0
        self._sites[rip] = _Site(slot)
        self._debug.set_breakpoint(slot, rip)

    def _give_up(self, rip: int) -> None:
        self._debug.set_breakpoint(self._sites.pop(rip).slot, None)
        self._given_up.add(rip)

    def _finish(self, least: int) -> int:
        """Do what remains of the instruction at RIP, and return how many elements that were."""
        regs = self._vcpu.get_regs()
        if regs.rcx < least or regs.rflags & RFLAGS_DF:
            return 0
        sregs = self._vcpu.get_sregs()
        if sregs.ss.dpl or not sregs.cs.l:
            return 0
        instruction = self._instruction_at(regs, sregs)
        if instruction is None:
            return 0
        done = self._move(regs, sregs, instruction)
        if done:
            self.finished += 1
            regs.rcx -= done
            regs.rdi = (regs.rdi + done * instruction.size) % (1 << 64)
            if instruction.moves:
                regs.rsi = (regs.rsi + done * instruction.size) % (1 << 64)
            if not regs.rcx:
                regs.rip += len(instruction.code)
                regs.rflags &= ~lib.X86_EFLAGS_RF
            self._vcpu.set_regs(regs)
        return done

    def _instruction_at(self, regs: Regs, sregs: Sregs) -> StringInstruction | None:
        rip = int(regs.rip)
        if rip % PAGE_SIZE > PAGE_SIZE - LONGEST:
            return None
        try:
            gpa = paging.translate(self._memory, self._paging(regs, sregs), rip, fetch=True)
            code = self._memory.read(gpa, LONGEST)
        except (paging.PageFault, paging.PageUnsupported, GuestMemoryError):
            return None
        return next((known for known in INSTRUCTIONS if code.startswith(known.code)), None)

    def _move(self, regs: Regs, sregs: Sregs, instruction: StringInstruction) -> int:
        """Store or move page by page, as far as the pages can be had; return how many elements."""
        size, remaining, done = instruction.size, int(regs.rcx), 0
        target, source, tables = int(regs.rdi), int(regs.rsi), self._paging(regs, sregs)
        element = int(regs.rax).to_bytes(8, "little")[:size]
        for _ in range(MOST_PAGES):
            room = PAGE_SIZE - max(target % PAGE_SIZE, source % PAGE_SIZE if instruction.moves else 0)
            count = min(room // size, remaining)
            if not count:
                break
            try:
                to = paging.translate(self._memory, tables, target, write=True)
                if self._is_table(tables, to):
                    break
                if instruction.moves:
                    origin = paging.translate(self._memory, tables, source)
                    if origin < to < origin + count * size:
                        break  # each element would be read where it was just written
                    self._memory.write(to, self._memory.read(origin, count * size))
                elif element == bytes([element[0]]) * size:
                    self._memory.fill(to, count * size, element[0])
                else:
                    self._memory.write(to, element * count)
            except (paging.PageFault, paging.PageUnsupported, GuestMemoryError):
                break
            done, remaining = done + count, remaining - count
            target, source = (target + count * size) % (1 << 64), (source + count * size) % (1 << 64)
        return done

    def _is_table(self, tables: paging.Paging, gpa: int) -> bool:
        levels = 5 if tables.cr4 & CR4_LA57 else 4
        return bool(lib.kvmpy_is_table(self._memory.table, tables.cr3, levels, gpa))

    def _paging(self, regs: Regs, sregs: Sregs) -> paging.Paging:
        return paging_of(sregs, int(regs.rflags), self._max_phys_addr)

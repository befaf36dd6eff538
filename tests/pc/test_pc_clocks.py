"""The clocks of a running PC: the RTC interrupts by IRQ 8, and KVM's own clock is there for who asks."""

import os
import threading
from collections.abc import Callable

import pytest

from kvmpy.machine.machine import EndReason
from kvmpy.pc import Pc, RunResult

pytestmark = pytest.mark.kvm

MakePc = Callable[..., Pc]
RunGuest = Callable[..., RunResult]

COUNT = 5
"""Interrupts that a guest waits for."""

RTC_GUEST = """
        cli
        xorw %ax, %ax
        movw %ax, %ds
        movw $handler, 0x70 * 4                 # the slave's first interrupt, IRQ 8, is vector 0x70
        movw %cs, 0x70 * 4 + 2
        movw $words, %si
1:      lodsw
        movb %ah, %bl                           # port, value
        movb %al, %dl
        xorb %dh, %dh
        movb %bl, %al
        outb %al, %dx
        cmpw $words_end, %si
        jne 1b
2:      sti
        hlt
        cli
        cmpb $5, count
        jb 2b
        movb $0x0b, %al                         # no more of them
        outb %al, $0x70
        movb $0x02, %al
        outb %al, $0x71
        xorb %al, %al
        outb %al, $KVMPY_PORT_EXIT
        hlt

handler:
        movb $0x0c, %al
        outb %al, $0x70
        inb $0x71, %al
        orb %al, flags
        incb count
        movb $0x20, %al
        outb %al, $0xa0
        outb %al, $0x20
        iretw

words:                                          # ICW1 to ICW4; of all interrupts the cascade and IRQ 8 alone
        .byte 0x20, 0x11, 0x21, 0x08, 0x21, 4, 0x21, 1, 0x21, 0xfb
        .byte 0xa0, 0x11, 0xa1, 0x70, 0xa1, 2, 0xa1, 1, 0xa1, 0xfe
        .byte 0x70, 0x0a, 0x71, {rate}, 0x70, 0x0b, 0x71, {enables}, 0x70, 0x0c
words_end:
        .org 0x200
count:  .byte 0
flags:  .byte 0
"""
COUNT_AT = 0x1200


@pytest.mark.parametrize(("rate", "enables", "flags"), [(0x26, 0x42, 0xC0), (0x23, 0x42, 0xC0)])
def test_periodic_interrupts_end_hlt(make_pc: MakePc, rate: int, enables: int, flags: int) -> None:
    """MC146818A: IRQ 8 by the PICs; each reading of register C makes way for the next edge."""
    pc = make_pc(RTC_GUEST.format(rate=rate, enables=enables))
    result = pc.run(timeout=20.0)
    assert (result.reason, result.status) == (EndReason.EXIT_PORT, 0)
    count, seen = pc.memory.read(COUNT_AT, 2)
    assert count == COUNT
    assert seen & flags == flags


def test_alarm_of_any_second_ends_hlt(make_pc: MakePc) -> None:
    """With alarm bytes that fit all, the next second interrupts."""
    code = RTC_GUEST.format(rate=0x20, enables=0x22).replace("cmpb $5", "cmpb $1")
    code = code.replace(
        ".byte 0x70, 0x0a", ".byte 0x70, 1, 0x71, 255, 0x70, 3, 0x71, 255, 0x70, 5, 0x71, 255, 0x70, 0x0a"
    )
    pc = make_pc(code)
    assert pc.run(timeout=20.0).status == 0
    assert pc.memory.read(COUNT_AT, 2)[1] & 0xA0 == 0xA0


def test_rtc_leaves_no_thread_behind(make_pc: MakePc) -> None:
    """Also of a guest that ends with its interrupts on."""
    before = threading.active_count()
    pc = make_pc(RTC_GUEST.format(rate=0x26, enables=0x42).replace("movb $0x02, %al", "movb $0x42, %al"))
    pc.run(timeout=20.0)
    assert "rtc" in [thread.name for thread in threading.enumerate()]
    pc.close()
    assert threading.active_count() == before


def test_rtc_takes_no_time_of_a_pinned_vcpu(make_pc: MakePc) -> None:
    """Its thread is started by the vCPU's, and runs on the host CPUs of everybody else."""
    ours = os.sched_getaffinity(0)
    guest = RTC_GUEST.format(rate=0x26, enables=0x42).replace("movb $0x02, %al", "movb $0x42, %al")
    pc = make_pc(guest, pin=[max(ours)])
    pc.run(timeout=20.0)
    (rtc,) = (thread for thread in threading.enumerate() if thread.name == "rtc")
    assert os.sched_getaffinity(rtc.native_id or 0) == ours


def test_guest_that_wants_no_interrupt_makes_no_thread(run_guest: RunGuest) -> None:
    names: list[list[str]] = []
    run_guest(
        "movb $0, %al ; outb %al, $0x70 ; inb $0x71, %al ; outb %al, $KVMPY_PORT_EXIT ; hlt",
        tracer=lambda vcpu, exit: names.append([thread.name for thread in threading.enumerate()]),
        trace_exits=True,
    )
    assert names
    assert not any("rtc" in seen for seen in names)


# --- KVM's clock ------------------------------------------------------------------------------------------------

KVMCLOCK = """
        movl $0x4b564d01, %ecx                  # MSR_KVM_SYSTEM_TIME_NEW
        movl $0x200001, %eax                    # where, and bit 0: on
        xorl %edx, %edx
        wrmsr
        rdtsc
        movl %eax, 0x200100
        movl %edx, 0x200104
        xorb %al, %al
        outb %al, $KVMPY_PORT_EXIT
        hlt
"""


def test_kvmclock_tells_the_time(make_pc: MakePc) -> None:
    """Linux, Documentation/virt/kvm/x86/msr.rst, MSR_KVM_SYSTEM_TIME_NEW: version, mul and shift, at the address."""
    pc = make_pc(KVMCLOCK, "long")
    assert pc.run(timeout=20.0).status == 0
    page = pc.memory.read(0x20_0000, 0x108)
    version, tsc_timestamp = (int.from_bytes(page[at : at + size], "little") for at, size in ((0, 4), (8, 8)))
    system_time = int.from_bytes(page[16:24], "little")
    mul, shift = int.from_bytes(page[24:28], "little"), int.from_bytes(page[28:29], "little", signed=True)
    tsc = int.from_bytes(page[0x100:0x108], "little")
    assert version
    assert version % 2 == 0, "an odd version is one that is being written"
    nanoseconds = mul * 2.0 ** (shift - 32)
    assert 0.1 < nanoseconds < 10, "of one cycle"
    assert 0 <= system_time + (tsc - tsc_timestamp) * nanoseconds < 60e9, "since the machine was made"

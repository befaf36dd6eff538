"""SYSCALL from CPL 3 reaches the kernel on every host, with our help where the host's KVM leaves it half done."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

from kvmpy import Kvm
from kvmpy._shim import ffi, lib
from kvmpy.kvm import DeadlinePassed, Debug, InternalError, IoOut, Vcpu
from kvmpy.machine import x86
from kvmpy.machine.assist import Assist
from kvmpy.machine.completer import SYSCALL_MSRS
from kvmpy.machine.guest_debug import ASSIST_SLOT
from kvmpy.machine.probe import has, tables
from kvmpy.machine.probe.bench import Bench, Mode
from kvmpy.units import MiB

pytestmark = pytest.mark.kvm

STAR, LSTAR, FMASK = SYSCALL_MSRS

# The bench maps its RAM for users; the kernel of these guests is the same RAM, mapped again without the user bit.
ALIAS = 2 * MiB
KERNEL = 0x12000
ENTRY = ALIAS + KERNEL
SELECTORS = x86.CODE_SELECTOR << 32 | (tables.USER_DATA - 8 | 3) << 48

SYSCALL = bytes.fromhex(
    "0f05"  # syscall
)
JUMP_TO_ENTRY = bytes.fromhex(
    "ffe0"  # jmp *%rax
)
REPORT = bytes.fromhex(
    "e7f4"  # out %eax, $0xf4
)
HANDLER = tables.HANDLERS + 8 * 14
FIRST_INSTRUCTIONS = {
    "endbr64": bytes.fromhex("f30f1efa"),
    "nop": bytes.fromhex("0f1f00"),
    "clac": bytes.fromhex("0f01ca"),
    "cld": bytes.fromhex("fc"),
    "xor": bytes.fromhex("31c9"),  # not one that C knows
}


class Arrival(NamedTuple):
    """Where a guest came out, and with what."""

    port: int
    regs: dict[str, int]
    cs: int
    ss: int
    cpl: int


Run = Callable[..., Arrival]


@pytest.fixture
def bench() -> Iterator[Bench]:
    """A VM with two views of its memory."""
    with Kvm() as kvm, Bench(kvm) as bench:
        flags = x86.PRESENT | x86.WRITABLE | x86.PAGE_SIZE_BIT
        bench.memory.write(tables.PAGES_64 + 0x2008, flags.to_bytes(8, "little"))
        bench.memory.write(KERNEL, REPORT)
        yield bench


@pytest.fixture(params=["c", "python"])
def assisted(request: pytest.FixtureRequest, bench: Bench) -> Run:
    """Return a function that runs user code to a report, with the assist of SYSCALL armed: by C, or by its twin."""

    def run(code: bytes, *, handler: bytes = b"", fmask: int = 0, lstar: int = ENTRY, **registers: int) -> Arrival:
        if handler:
            bench.memory.write(HANDLER, handler + REPORT)
        assist = Assist(bench.memory)
        with bench.start(code, Mode.CPL3, **registers) as vcpu:
            vcpu.use_assist(ffi.new("struct kvmpy_assist *", {"memory": bench.memory.table}))
            vcpu.trace_exits(request.param == "python")
            for index, data in ((STAR, SELECTORS), (FMASK, fmask), (LSTAR, lstar)):
                vcpu.set_msrs({index: data})
                assist.msr_written(vcpu, index, data)
            run.assist, run.state = assist, vcpu.assist  # type: ignore[attr-defined]
            return _arrive(vcpu, assist)

    return run


def _arrive(vcpu: Vcpu, assist: Assist) -> Arrival:
    vcpu.set_budget(timeout=5)
    while True:
        match vcpu.next_exit():
            case IoOut(port=port):
                regs, sregs = vcpu.get_regs(), vcpu.get_sregs()
                names = ("rax", "rcx", "r11", "rsp", "rflags", "rip")
                values = {name: int(getattr(regs, name)) for name in names}
                return Arrival(port, values, sregs.cs.selector, sregs.ss.selector, sregs.ss.dpl)
            case Debug() as exit:
                assert assist.complete_debug(vcpu, exit)
            case DeadlinePassed():
                raise AssertionError("the guest did not arrive")
            case InternalError() as exit:
                assert assist.complete(vcpu, exit)
            case other:
                raise AssertionError(other)


def test_syscall_enters_the_kernel_at_cpl0(assisted: Run) -> None:
    arrival = assisted(SYSCALL, rax=0x5A)
    assert arrival.port == tables.DONE_PORT
    assert arrival.cpl == 0
    assert arrival.cs == x86.CODE_SELECTOR
    assert arrival.ss == x86.CODE_SELECTOR + 8
    assert arrival.regs["rax"] == 0x5A
    assert arrival.regs["rcx"] == tables.CODE + len(SYSCALL)
    assert arrival.regs["rsp"] == tables.USER_STACK
    assert ENTRY <= arrival.regs["rip"] <= ENTRY + len(REPORT)


def test_syscall_masks_the_flags(assisted: Run) -> None:
    carry, zero = 1 << 0, 1 << 6
    flags = lib.X86_EFLAGS_FIXED | 3 << 12 | carry | zero
    arrival = assisted(SYSCALL, fmask=carry, rflags=flags)
    assert arrival.regs["rflags"] & (carry | zero) == zero
    assert arrival.regs["r11"] & (carry | zero) == carry | zero


@pytest.mark.parametrize("name", FIRST_INSTRUCTIONS)
def test_jump_to_the_kernels_entry_stays_a_page_fault(assisted: Run, name: str) -> None:
    """Whatever instruction its handler begins with."""
    arrival = assisted(JUMP_TO_ENTRY, handler=FIRST_INSTRUCTIONS[name], rax=ENTRY, rcx=tables.CODE + 0x20)
    assert arrival.port == tables.DONE_PORT
    assert arrival.cpl == 0
    assert HANDLER < arrival.regs["rip"] <= HANDLER + len(FIRST_INSTRUCTIONS[name]) + len(REPORT)


def test_other_page_fault_reaches_its_handler(assisted: Run) -> None:
    load_from_rax = bytes.fromhex(
        "8b00"  # mov (%rax), %eax
    )
    arrival = assisted(load_from_rax, handler=FIRST_INSTRUCTIONS["nop"], rax=ALIAS)
    assert arrival.port == tables.DONE_PORT
    assert arrival.regs["rip"] > HANDLER


@pytest.mark.parametrize("flag", [1 << 9, 1 << 0, 1 << 18], ids=["IF", "CF", "AC"])
def test_jump_that_looks_like_a_syscall_has_its_flags_unmasked(assisted: Run, flag: int) -> None:
    """R11 would be RFLAGS to the kernel: who forges it, with IOPL say, must not get there."""
    code = JUMP_TO_ENTRY + SYSCALL
    forged = {"rax": ENTRY, "rcx": tables.CODE + len(code), "r11": 3 << 12}
    arrival = assisted(code, handler=FIRST_INSTRUCTIONS["nop"], fmask=flag, rflags=2 | flag, **forged)
    assert arrival.port == tables.DONE_PORT
    assert HANDLER < arrival.regs["rip"] < ALIAS


@pytest.mark.parametrize("rcx", [0, 1, 0xFFFF_FFFF_FFFF_FFFF, 0x8000_0000_0000_0000, tables.RAM_SIZE * 2])
def test_rcx_that_points_nowhere_is_no_syscall(assisted: Run, rcx: int) -> None:
    arrival = assisted(JUMP_TO_ENTRY, handler=FIRST_INSTRUCTIONS["nop"], rax=ENTRY, rcx=rcx)
    assert arrival.regs["rip"] > HANDLER
    assert arrival.regs["rip"] < ALIAS


def test_help_is_counted_where_it_was_given(assisted: Any) -> None:
    if has("syscall-cpl3"):
        pytest.skip("this host needs no help with SYSCALL")
    assisted(SYSCALL)
    by_c, by_python = int(assisted.state.syscall), assisted.assist.counts()["syscall"]
    assert by_c + by_python == 1


def test_guest_without_a_page_fault_handler_gets_no_breakpoint(bench: Bench) -> None:
    assist = Assist(bench.memory)
    with bench.start(SYSCALL, Mode.CPL3) as vcpu:
        vcpu.use_assist(ffi.new("struct kvmpy_assist *", {"memory": bench.memory.table}))
        sregs = vcpu.get_sregs()
        sregs.idt.limit = 13 * 16 + 15
        vcpu.set_sregs(sregs)
        assist.msr_written(vcpu, LSTAR, ENTRY)
        assert vcpu.assist.page_fault_handler == 0
        sregs.idt.base, sregs.idt.limit = 0xDEAD_BEEF_0000_0000, 0xFFF
        vcpu.set_sregs(sregs)
        assist.msr_written(vcpu, LSTAR, ENTRY)
        assert vcpu.assist.page_fault_handler == 0


def test_breakpoint_is_on_the_handler(bench: Bench) -> None:
    assist = Assist(bench.memory)
    with bench.start(SYSCALL, Mode.CPL3) as vcpu:
        vcpu.use_assist(ffi.new("struct kvmpy_assist *", {"memory": bench.memory.table}))
        assist.msr_written(vcpu, LSTAR, ENTRY)
        assert vcpu.assist.page_fault_handler == HANDLER
        assert vcpu.assist.lstar == ENTRY
        assert ASSIST_SLOT == 0

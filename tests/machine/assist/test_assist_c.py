"""What C completes by itself leaves what its Python twin leaves: registers, flags, and the frame in the handler."""

from collections.abc import Iterator
from typing import NamedTuple

import pytest

from kvmpy import Kvm
from kvmpy._shim import ffi, lib
from kvmpy.kvm import InternalError, IoOut
from kvmpy.machine.assist import Assist
from kvmpy.machine.probe import has, tables
from kvmpy.machine.probe.bench import Bench, Mode

pytestmark = pytest.mark.kvm

AC = 1 << 18
INT3 = bytes.fromhex(
    "cc"  # int3
)
CLAC = bytes.fromhex(
    "0f01ca"  # clac
)
STAC = bytes.fromhex(
    "0f01cb"  # stac
)
CHANGING = bytes.fromhex(
    "0f01cb"  # stac
    "0f01ca"  # clac
    "0f01cb"  # stac
    "0f01ca"  # clac
)


class Left(NamedTuple):
    """What a guest left at its OUT: the port, its registers, and the words on its stack."""

    port: int
    registers: tuple[int, ...]
    stack: bytes


@pytest.fixture
def bench() -> Iterator[Bench]:
    with Kvm() as kvm, Bench(kvm) as bench:
        yield bench


def run(
    bench: Bench, code: bytes, *, by_c: bool, mode: Mode = Mode.CPL0, **registers: int
) -> tuple[Left, dict[str, int]]:
    """Run ``code`` to its end; return what it left, and how often C completed what."""
    assist = Assist(bench.memory)
    bench.memory.fill(tables.KERNEL_STACK - 64, 64)
    with bench.start(code, mode, **registers) as vcpu:
        vcpu.use_assist(ffi.new("struct kvmpy_assist *", {"memory": bench.memory.table}))
        vcpu.trace_exits(not by_c)
        vcpu.set_budget(timeout=10)
        while isinstance(exit := vcpu.next_exit(), InternalError):
            assert assist.complete(vcpu, exit), exit
        assert isinstance(exit, IoOut), exit
        regs = vcpu.get_regs()
        values = tuple(int(getattr(regs, name)) for name in ("rax", "rcx", "rsp", "rip", "rflags"))
        counts = {name: int(getattr(vcpu.assist, name)) for name in ("int3", "clac", "stac")}
    return Left(exit.port, values, bench.memory.read(tables.KERNEL_STACK - 64, 64)), counts


@pytest.mark.parametrize("code", [INT3, CLAC, STAC, CHANGING], ids=["int3", "clac", "stac", "both"])
@pytest.mark.parametrize("flags", [0, AC, AC | 0x8D5])
def test_c_leaves_what_its_twin_leaves(bench: Bench, code: bytes, flags: int) -> None:
    registers = {"rflags": lib.X86_EFLAGS_FIXED | flags}
    (mine, _), (twins, counts) = (run(bench, code, by_c=by_c, **registers) for by_c in (True, False))
    assert mine == twins
    assert not any(counts.values())


@pytest.mark.parametrize(("code", "expected"), [(CLAC, 0), (STAC, AC)], ids=["clac", "stac"])
def test_access_flag_is_set_and_cleared(bench: Bench, code: bytes, expected: int) -> None:
    for before in (0, AC):
        left, _ = run(bench, code, by_c=True, rflags=lib.X86_EFLAGS_FIXED | before)
        assert left.registers[-1] & AC == expected


def test_int3_reaches_its_handler_behind_itself(bench: Bench) -> None:
    left, _ = run(bench, INT3, by_c=True)
    assert left.port == tables.TRAP_PORT
    frame = [int.from_bytes(left.stack[at : at + 8], "little") for at in range(24, 64, 8)]
    assert frame[0] == tables.CODE + len(INT3)
    assert frame[3] == tables.KERNEL_STACK


def test_c_counts_what_it_completed(bench: Bench) -> None:
    if has("int3-cpl0"):
        pytest.skip("this host's KVM does it all itself")
    assert run(bench, INT3, by_c=True)[1] == {"int3": 1, "clac": 0, "stac": 0}
    assert run(bench, CHANGING, by_c=True)[1] == {"int3": 0, "clac": 2, "stac": 2}


def test_ring_3_is_not_helped(bench: Bench) -> None:
    """CLAC there is an invalid opcode; INT3 goes through its gate."""
    for code, vector in ((CLAC, 6), (INT3, 3)):
        left, counts = run(bench, code, by_c=True, mode=Mode.CPL3)
        assert (left.port, left.registers[0] & 0xFF) == (tables.TRAP_PORT, vector)
        assert not any(counts.values())

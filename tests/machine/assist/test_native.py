"""The executor: it gives the host back what it had, shares nothing between threads, and maps no page W and X."""

import ctypes
import threading
from pathlib import Path

import pytest
from native_state import INITIAL, MEMORY, Guest, State, seeded
from random_instructions import Encoder

from kvmpy import Kvm
from kvmpy.machine.assist import find, vector
from kvmpy.machine.assist.fpu import AREA_SIZE
from kvmpy.machine.assist.native import RSP, STATUS_FLAGS, executor, host_features, mxcsr_mask
from kvmpy.machine.probe.bench import Bench

RDI = 7
ROUND_DOWN = 0x400  # FE_DOWNWARD of <fenv.h>
OWN_CONTROL = bytes.fromhex("0fae1f"), bytes.fromhex("d97f04")  # stmxcsr (%rdi), fnstcw 4(%rdi)


def own_control() -> bytes:
    """Return the MXCSR and the x87 control word that this thread has."""
    host, registers = executor(), [0] * 16
    for code in OWN_CONTROL:
        registers[RDI] = host.bounce_address
        host.execute(code, registers, 0)
    return bytes(host.bounce[:6])


def test_registers_go_in_and_come_out() -> None:
    """But rsp, which stays as it was given."""
    registers = [0x1111_1111_1111_1111 * number for number in range(16)]
    expected = list(registers)
    assert executor().execute(b"\x90", registers, 0) == 0
    assert registers == expected
    for low in range(8):
        if low != RSP:
            executor().execute(bytes([0x48, 0xFF, 0xC0 | low]), registers, 0)  # inc
            executor().execute(bytes([0x49, 0xFF, 0xC8 | low]), registers, 0)  # dec, r8 to r15
            expected[low], expected[low + 8] = expected[low] + 1, expected[low + 8] - 1
    assert registers[:12] + registers[13:] == expected[:12] + expected[13:]


@pytest.mark.parametrize("flags", [0, STATUS_FLAGS, 1, 0x40, 0x800, 0xFFFF_FFFF])
def test_status_flags_go_in_and_come_out(flags: int) -> None:
    """The others are the host's: an interrupt flag, a direction flag or a trap flag of the guest's has no effect."""
    assert executor().execute(b"\x90", [0] * 16, flags) == flags & STATUS_FLAGS


def test_the_host_gets_its_fpu_back() -> None:
    """Masks, rounding and flags are the guest's only while its instruction runs."""
    libm = ctypes.CDLL("libm.so.6")
    libm.fesetround(ROUND_DOWN)
    try:
        before, host = own_control(), executor()
        host.area[:] = INITIAL.ljust(AREA_SIZE, b"\0")
        host.area[0:2], host.area[24:28] = b"\x00\x0c", b"\x3f\xff\0\0"
        host.execute(bytes.fromhex("d9ee"), [0] * 16, 0, use_fpu=True)  # fldz
        assert (host.area[1], host.area[24:28]) == (0x0C, b"\x3f\xff\0\0")
        assert own_control() == before
        assert (before[1:4], before[4:]) == (b"\x3f\0\0", b"\x7f\x07")
    finally:
        libm.fesetround(0)


def test_the_hosts_x87_stack_is_empty_afterwards() -> None:
    """Else the host's own long doubles would overflow it."""
    host, registers = executor(), [0] * 16
    host.area[:] = INITIAL.ljust(AREA_SIZE, b"\0")
    host.area[4] = 0x7F  # seven registers are full, and then the eighth is
    host.execute(bytes.fromhex("d9e8"), registers, 0, use_fpu=True)  # fld1
    assert host.area[4] == 0xFF
    registers[RDI] = host.bounce_address
    host.execute(bytes.fromhex("d937"), registers, 0)  # fnstenv (%rdi)
    assert host.bounce[8:10] == b"\xff\xff"


def test_no_page_is_writable_and_executable() -> None:
    executor()
    rights = [line.split()[1] for line in Path("/proc/self/maps").read_text().splitlines() if "kvmpy-native" in line]
    assert {"rw-s", "r-xs"} <= set(rights)
    assert not any("w" in right and "x" in right for right in rights)


def test_the_hosts_processor_is_known() -> None:
    assert {"fpu", "sse2", "fxsr"} <= host_features()
    assert mxcsr_mask() & 0xFFBF == 0xFFBF


@pytest.mark.kvm
def test_threads_execute_at_the_same_time() -> None:
    """Each vCPU's thread has registers, FPU state and an operand of its own."""
    wrong: list[str] = []

    def work(number: int) -> None:
        with Kvm() as kvm, Bench(kvm) as bench, bench.start(b"") as vcpu:
            guest = Guest(vcpu, bench.memory, vector.find)
            for _ in range(300):
                memory, xsave = bytes([number]) * 256, INITIAL[:160] + bytes([number]) * 16 + INITIAL[176:]
                state = State(bytes.fromhex("660ffc06"), (MEMORY,) * 16, memory=memory, xsave=xsave)  # paddb
                if guest.run(state).xsave[160:176] != bytes([2 * number]) * 16:
                    wrong.append(f"thread {number}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.kvm
def test_no_address_of_the_host_reaches_the_guest(guest: Guest) -> None:
    """After any instruction: neither in its registers, nor in the FPU's pointers, nor in memory."""
    guest.find = find
    encoder = Encoder(seeded(), vector.TABLE)
    host = executor()
    addresses = [address.to_bytes(8, "little")[1:6] for address in (host.code_address, host.bounce_address)]
    states = [State(bytes.fromhex(code), (MEMORY,) * 16) for code in ("d806", "dd06", "d8c1", "dd36", "d936", "df2e")]
    for state in [*states, *(encoder.encode(*row) for row in encoder.rows)]:
        after = guest.run(state).pack()
        assert not any(address in after for address in addresses), state.code.hex()

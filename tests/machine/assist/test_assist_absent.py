"""A guest that needs no help meets none of this: nothing is imported for it, and nothing is probed."""

import subprocess
import sys
from collections.abc import Callable

import pytest

from kvmpy.machine.completer import SYSCALL_MSRS
from kvmpy.machine.probe import has
from kvmpy.pc import Pc

pytestmark = pytest.mark.kvm
MakePc = Callable[..., Pc]

LSTAR = SYSCALL_MSRS[1]
LESSONS = ("hello", "long_mode", "pvh_hello", "elf64_hello", "exceptions", "ipi", "smp_lock", "timer", "params")
RUN_THEM = """
import sys
from kvmpy.cli.main import main
quiet = ["--serial", "none", "--debugcon", "none", "--timeout", "20"]
statuses = [main(["run", f"lesson:{name}", *quiet]) for name in sys.argv[1:]]
print(statuses, [name for name in sys.modules if name.startswith(("kvmpy.machine.assist", "kvmpy.machine.probe"))])
"""


def test_lessons_import_no_assist_and_no_probe() -> None:
    command = [sys.executable, "-c", RUN_THEM, *LESSONS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == f"{[0] * len(LESSONS)} []\n", done.stdout + done.stderr


WRITE_LSTAR_TWICE = f"""
        movl    ${LSTAR}, %ecx
        movl    $0x1000, %eax ; xorl %edx, %edx ; wrmsr
        movl    $0x2000, %eax ; wrmsr
        rdmsr                                           # what it is now, to the exit port: 0x20
        movb    %ah, %al ; outb %al, $KVMPY_PORT_EXIT
"""


@pytest.mark.parametrize("needs_help", [False, True])
def test_first_write_of_lstar_is_the_last_that_is_seen_where_syscall_works(
    make_pc: MakePc, monkeypatch: pytest.MonkeyPatch, needs_help: bool
) -> None:
    """It alone asks the probe; and the filter of MSR writes is taken away. Where help is needed, each is seen."""
    asked: list[str] = []

    def answer(name: str) -> bool:
        asked.append(name)
        return not needs_help

    monkeypatch.setattr("kvmpy.machine.probe.has", answer)
    pc = make_pc(WRITE_LSTAR_TWICE, "long")
    result = pc.run(timeout=10)
    assert result.status == 0x20
    assert result.exits.get("X86_WRMSR") == (2 if needs_help else 1)
    assert asked == ["syscall-cpl3"] * (2 if needs_help else 1)


def test_host_without_gaps_completes_nothing(make_pc: MakePc) -> None:
    """The same instructions, with an exit for each where KVM leaves them undone, and with none where it does not."""
    pc = make_pc("popcntq %rcx, %rax ; fld1 ; cmpxchg16b (%rsp) ; xorl %eax, %eax ; outb %al, $KVMPY_PORT_EXIT", "long")
    abilities = {"popcnt": "popcnt-cpl0", "fld1": "fld1-cpl0", "cmpxchg16b": "cmpxchg16b-cpl0"}
    result = pc.run(timeout=10)
    assert result.status == 0, result.message
    assert result.assists == {name: 1 for name, ability in abilities.items() if not has(ability)}
    assert result.exits.get("INTERNAL_ERROR", 0) == len(result.assists)

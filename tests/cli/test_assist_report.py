"""What kvmpy completed for the host's KVM, in a run's result and reports."""

from collections.abc import Callable

import pytest

from kvmpy.cli.report import as_dict, ended_text, stats_text
from kvmpy.machine.probe import has
from kvmpy.pc import Pc

pytestmark = pytest.mark.kvm

POPCNT = "movl $0xf0f0, %ecx ; popcnt %ecx, %eax ; outb %al, $0xf4 ; hlt"


def test_the_result_counts_what_was_completed(make_pc: Callable[..., Pc]) -> None:
    """Where KVM does all itself, there is nothing to count."""
    result = make_pc(POPCNT, "long").run(timeout=20.0)
    assert (result.status, result.assists) == (8, {} if has("popcnt-cpl0") else {"popcnt": 1})


def test_reports_name_the_most_frequent_first_and_nothing_where_there_is_none(make_pc: Callable[..., Pc]) -> None:
    pc = make_pc(POPCNT, "long")
    result = pc.run(timeout=20.0)
    some = result._replace(assists={"int3": 2, "syscall": 5012})
    assert "completed for the host's KVM\n  syscall                         5012\n  int3 " in stats_text(pc, some)
    assert "kvmpy: completed for the host's KVM: syscall 5012, int3 2\n" in ended_text(pc, some)
    assert as_dict(pc, some)["assists"] == {"int3": 2, "syscall": 5012}
    none = result._replace(assists={})
    assert "completed" not in stats_text(pc, none) + ended_text(pc, none)

"""From what a probe guest did to a finding: what was expected, what came, and the fix where they differ."""

from collections.abc import Callable
from dataclasses import dataclass

from kvmpy.machine.probe.bench import Bench, Done, Ended, Mode, Outcome, Trap, describe
from kvmpy.machine.probe.finding import Ability, Finding, Verdict

Judgement = tuple[Verdict, str]
"""A verdict and its detail."""

UD = 6  # invalid opcode (Intel SDM vol. 3, table 6-1)
GP = 13


@dataclass(frozen=True, slots=True)
class Probe:
    """How one ability is found, and what to do where it is not there."""

    ability: Ability
    judge: Callable[[Bench], Judgement]
    fix: str

    def find(self, bench: Bench) -> Finding:
        """Run the probe. What the host refuses is a finding too."""
        try:
            verdict, detail = self.judge(bench)
        except OSError as error:
            verdict, detail = Verdict.MISSING, str(error)
        fix = self.fix if verdict not in (Verdict.OK, Verdict.UNKNOWN) else None
        return Finding(self.ability, verdict, detail, fix)


def compare(outcome: Outcome, expected: Outcome, *, ok: str = "") -> Judgement:
    """Judge ``outcome``. A wrong value or a hang is broken; what the guest or we are told of is missing."""
    match outcome:
        case _ if outcome == expected:
            return Verdict.OK, ok
        case Trap(vector=vector) if vector in (UD, GP):
            return Verdict.MISSING, describe(outcome)
        case Ended():
            return Verdict.MISSING, describe(outcome)
        case Done(value=value) if isinstance(expected, Done):
            return Verdict.BROKEN, f"silently wrong: gives 0x{value:x}, right is 0x{expected.value:x}"
    return Verdict.BROKEN, describe(outcome)


def expect(
    code: bytes, expected: Outcome, *, mode: Mode = Mode.CPL0, ok: str = "", **registers: int
) -> Callable[[Bench], Judgement]:
    """Return the judge of a guest that shall end as ``expected``."""

    def judge(bench: Bench) -> Judgement:
        return compare(bench.run(code, mode, **registers), expected, ok=ok)

    return judge

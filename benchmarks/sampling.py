"""What a row of the table says: samples of kvmpy beside samples of a baseline, compared round by round.

The noise of a shared host is slow: it moves whole seconds, not single rounds. So both sides take turns in many short
rounds, each round compares only its own neighbours, and the median over the rounds is what counts. Its interval is
the 95 % one of the sign test: no assumption about how the noise is distributed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import sqrt
from statistics import median


@dataclass(frozen=True, slots=True)
class Estimate:
    """A median over rounds and the interval in which it lies with 95 % confidence."""

    median: float
    low: float
    high: float


def estimate(values: Sequence[float]) -> Estimate:
    """Return the median of ``values``, one for each round, and its interval."""
    ordered = sorted(values)
    middle, reach = (len(ordered) - 1) / 2, 0.98 * sqrt(len(ordered))
    low, high = max(0, int(middle - reach)), min(len(ordered) - 1, int(middle + reach + 1))
    return Estimate(median(ordered), ordered[low], ordered[high])


def summary(values: Sequence[float]) -> dict[str, float]:
    """Return what the JSON file keeps of ``values``."""
    ordered = sorted(values)
    tenth = len(ordered) // 10
    return {
        "rounds": len(ordered),
        "min": ordered[0],
        "p10": ordered[tenth],
        "median": median(ordered),
        "p90": ordered[-1 - tenth],
        "max": ordered[-1],
    }


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. ``aim`` is the most that ``result``, or without one kvmpy's median, should be."""

    name: str
    unit: str
    kvmpy: Sequence[float]
    baseline: Sequence[float] = field(default=())
    result: Estimate | None = None
    result_unit: str = ""
    aim: float | None = None

    @property
    def met(self) -> bool | None:
        """Tell whether the aim is met; None where there is none."""
        if self.aim is None:
            return None
        return (self.result.median if self.result else median(self.kvmpy)) <= self.aim

    def as_json(self) -> dict[str, object]:
        """Return the row for the JSON file."""
        result = self.result
        return {
            "name": self.name,
            "unit": self.unit,
            "kvmpy": summary(self.kvmpy),
            "baseline": summary(self.baseline) if self.baseline else None,
            "result": {"median": result.median, "low": result.low, "high": result.high} if result else None,
            "result_unit": self.result_unit,
            "aim": self.aim,
            "met": self.met,
        }

    def cells(self) -> tuple[str, ...]:
        """Return the row as the table shows it."""
        return (
            self.name,
            f"{median(self.kvmpy):.2f} {self.unit}",
            f"{median(self.baseline):.2f} {self.unit}" if self.baseline else "",
            self._result_text(),
            ""
            if self.aim is None
            else f"{self.aim:g} {self.result_unit or ('' if self.result else self.unit)}".rstrip(),
            {None: "", True: "yes", False: "no"}[self.met],
        )

    def _result_text(self) -> str:
        if self.result is None:
            return ""
        middle, low, high = self.result.median, self.result.low, self.result.high
        if self.result_unit:
            return f"{middle:+.2f} {self.result_unit} ({low:.2f} to {high:.2f})"
        return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def ratio(name: str, unit: str, kvmpy: Sequence[float], baseline: Sequence[float], *, aim: float | None = None) -> Row:
    """Return a row that says how many times the baseline kvmpy takes."""
    result = estimate([a / b for a, b in zip(kvmpy, baseline, strict=True)])
    return Row(name, unit, kvmpy, baseline, result, aim=aim)


def difference(
    name: str, unit: str, kvmpy: Sequence[float], baseline: Sequence[float], *, aim: float | None = None
) -> Row:
    """Return a row that says how much more than the baseline kvmpy takes."""
    result = estimate([a - b for a, b in zip(kvmpy, baseline, strict=True)])
    return Row(name, unit, kvmpy, baseline, result, unit, aim)


def figure(name: str, unit: str, kvmpy: Sequence[float], *, aim: float | None = None) -> Row:
    """Return a row that stands alone."""
    return Row(name, unit, kvmpy, aim=aim)
